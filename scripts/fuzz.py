"""Load mutated files of every format that we read, count what becomes of them, and go on another day.

    python scripts/fuzz.py                        20 000 files of each format; what is done is kept in .cache/fuzz
    python scripts/fuzz.py --minutes 30           as many as that time allows, of those that have fewest first
    python scripts/fuzz.py recipe "SAE"           these formats alone
    python scripts/fuzz.py --table                only shows what was counted

Linux only, by the Python of scripts/test.py's environment. TMPDIR=/dev/shm halves the time. Several can run at once,
each with formats of its own. A file that crashes a loader is made again by its number:
python tests/attacks/worker.py NUMBER 1 FORMAT.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from environment import REPOSITORY, cache_folder

sys.path.insert(0, str(REPOSITORY / "tests" / "attacks"))

from fuzzing import Tally, outcomes, table  # noqa: E402

PART = 1000  # files of a format between two looks at the clock


def kept(name: str) -> Path:
    return cache_folder() / "fuzz" / f"{name}.json"


def load(name: str) -> Tally:
    path = kept(name)
    return Tally(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Tally()


def save(name: str, found: Tally) -> None:
    path = kept(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(found)), encoding="utf-8")
    temporary.replace(path)


def main() -> int:
    """Returns 1 if a file crashed a loader."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("formats", nargs="*", help="all if none is named")
    parser.add_argument("--count", type=int, default=20_000, help="files of each format")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="when to stop")
    parser.add_argument("--table", action="store_true", help="load nothing")
    options = parser.parse_args()
    if not options.formats:
        from formats import FORMATS

        options.formats = list(FORMATS)
    end = time.monotonic() + 60 * options.minutes
    found = {name: load(name) for name in options.formats}
    while not options.table and time.monotonic() < end:
        least = min(one.tried for one in found.values())
        part = min(PART, options.count - least)
        if part <= 0:
            break
        for one in outcomes([name for name in found if found[name].tried == least], least, part):
            name = one["format"]
            found[name].count(one)
            if found[name].tried == least + part:
                save(name, found[name])
                print(f"{name}: {found[name].tried}", file=sys.stderr, flush=True)
                if time.monotonic() > end:
                    break
    print(table(found))
    crashes = [crash for one in found.values() for crash in one.crashes]
    print(*crashes, sep="\n")
    return int(bool(crashes))


if __name__ == "__main__":
    sys.exit(main())
