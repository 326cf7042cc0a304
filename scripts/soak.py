"""Queue small workflows on a real ComfyUI for hours, cancel half of them at random moments, and see what is left.

    python scripts/soak.py                  2 hours
    python scripts/soak.py --minutes 10     a short form
    python scripts/soak.py --table          only shows the last run that ended

Linux only, by the Python of scripts/test.py's environment. What was cancelled is queued again and must end well. A line
a minute tells how far it is; .cache/soak.json keeps the figures. Exits with 1 if anything is left or went wrong: a
prompt that nobody cancelled failed, the queue stands still, memory, open files or threads grow after the first fifth,
a temporary file stays, or the unsteered picture is another at the end than it was in the beginning.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

from environment import REPOSITORY, cache_folder
from host import HostError, Server

sys.path.insert(0, str(REPOSITORY / "tests" / "host"))

import torch  # noqa: E402
from graphs import Node, to_api  # noqa: E402
from small_graphs import Avatars, diagnose, latents  # noqa: E402

KEPT = cache_folder() / "soak.json"
GROWTH = 64 * 2**20  # bytes by which memory may differ between the second fifth and the last
ENOUGH = 30  # looks at the server, without which nothing is said of its growth
LONGEST = 1800  # seconds after which a prompt stands still, on a machine that others use, too
ATTRIBUTES = ("avatars_age", "avatars_presentation", "avatars_skin_tone")


def steered(graph: Avatars, draw: random.Random) -> Node:
    """One to three Steers, which hold or do not, with strengths, shares and conditionings of their own."""
    model = graph.model[0]
    for name in draw.sample(ATTRIBUTES, draw.randint(1, 3)):
        model = graph.steer(
            graph.recipe(name), model, strength=draw.choice((0.0, 0.5, 1.0)), hold=draw.choice(("on", "off"))
        )[0]  # fmt: skip
    return graph.add("PreviewImage", images=graph.pictures(graph.draw(model, draw.randrange(2**32)))[0])


def trained(graph: Avatars, draw: random.Random) -> Node:
    """A capture that is kept on the disk, and an SAE of it."""
    captured = graph.capture(pictures=16, seed=draw.randrange(2**32), save_as=f"soak {draw.randrange(2**32)}")
    return graph.show(graph.train(captured, steps=100, save_as="soak")[2])


def reported(graph: Avatars, draw: random.Random) -> Node:
    seed = draw.randrange(2**32)
    before, after = graph.draw(seed=seed), graph.draw(graph.steer(graph.recipe())[0], seed)
    return graph.show(graph.report(graph.pictures(before), graph.pictures(after))[0])


def calibrated(graph: Avatars, draw: random.Random) -> Node:
    node = graph.experiment(
        "DiffLensCalibrate", recipe=graph.recipe("avatars_presentation"), target="uniform", budget=80, tolerance=0.05,
        clear=0.9, only_where_needed=draw.random() < 0.5, spare_others=False, seed=draw.randrange(2**32),
    )  # fmt: skip
    return graph.show(node[3])


def diagnosed(graph: Avatars, draw: random.Random) -> Node:
    return graph.show(diagnose(graph, "avatars_presentation", seed=draw.randrange(2**32))[0])


def ranked(graph: Avatars, draw: random.Random) -> Node:
    node = graph.experiment(
        "DiffLensRankByEffect", recipe=graph.recipe("avatars_presentation"), change="amplify", strength=10.0,
        pictures=2, features_per_class=2, steps=1, seed=draw.randrange(2**32),
    )  # fmt: skip
    return graph.show(node[1])


KINDS: dict[str, tuple[int, Callable[[Avatars, random.Random], Node]]] = {  # how often of 12, on the average
    "steered": (6, steered), "reported": (2, reported), "ranked": (1, ranked), "trained": (1, trained),
    "calibrated": (1, calibrated), "diagnosed": (1, diagnosed),
}  # fmt: skip


@dataclass
class Soak:
    """What was seen so far. samples: (seconds, bytes of memory, open files, threads) of the server between runs."""

    day: str = field(default_factory=lambda: date.today().isoformat())
    minutes: float = 0.0
    done: dict[str, int] = field(default_factory=dict)
    cancelled: dict[str, int] = field(default_factory=dict)
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def part(self, first: int, last: int) -> list[list[int]]:
        """Memory, files and threads in those fifths of the time."""
        length = self.samples[-1][0] / 5
        inside = [sample[1:] for sample in self.samples if first * length <= sample[0] <= last * length]
        return [list(column) for column in zip(*inside, strict=True)]

    def grown(self) -> tuple[int, int, int]:
        """By how much the median of memory, of open files and of threads in the last fifth exceeds the second's."""
        pairs = zip(self.part(1, 2), self.part(4, 5), strict=True)
        return tuple(int(statistics.median(late) - statistics.median(early)) for early, late in pairs)

    def table(self) -> str:
        grown, files, threads = self.grown() if len(self.samples) >= ENOUGH else (0, 0, 0)
        rows = {
            "day": self.day,
            "minutes": f"{self.minutes:.0f}",
            "workflows that ended": " + ".join(f"{n} {kind}" for kind, n in self.done.items()),
            "cancelled on the way": " + ".join(f"{n} {kind}" for kind, n in self.cancelled.items()),
            "memory of the server, MB": " to ".join(
                str(end(memory for _, memory, _, _ in self.samples) >> 20) for end in (min, max)
            ),
            "grown from the second fifth to the last": f"{grown / 2**20:.0f} MB, {files} files, {threads} threads",
            "went wrong or was left": "; ".join(self.faults) or "nothing",
        }
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {told} |" for name, told in rows.items())])


def sample(pid: int) -> tuple[int, int, int]:
    """Resident bytes, open files and threads of a process."""
    told = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len([*Path(f"/proc/{pid}/fd").iterdir()])
    return int(told["VmRSS"].split()[0]) * 1024, files, int(told["Threads"])


def forget(server: Server, prompt_id: str) -> None:
    """ComfyUI keeps every prompt's history for ever, which is no leak of ours."""
    server.request("/history", json.dumps({"delete": [prompt_id]}).encode())


def plain(server: Server) -> torch.Tensor:
    """The unsteered picture of one seed."""
    graph = Avatars()
    node = graph.save(graph.draw(seed=3))
    prompt_id = server.queue(to_api(graph))
    drawn = latents(server, server.wait(prompt_id, LONGEST), node)
    forget(server, prompt_id)
    return drawn


def one_round(server: Server, draw: random.Random, seen: Soak, lasts: Counter[str]) -> None:
    """One to three workflows queued at once, some cancelled, and those queued again."""
    queued = []
    for _ in range(draw.randint(1, 3)):
        (kind,) = draw.choices([*KINDS], [often for often, _ in KINDS.values()])
        graph = Avatars(pictures=draw.randint(1, 4) if kind == "steered" else 8)
        KINDS[kind][1](graph, draw)
        queued.append((kind, to_api(graph), server.queue(to_api(graph)), draw.random() < 0.5))
    for kind, graph, prompt_id, cancel in queued:
        begun = time.monotonic()
        if cancel:
            time.sleep(draw.random() * (lasts[kind] or 1))
            server.interrupt(prompt_id)
        try:
            server.wait(prompt_id, LONGEST)
            lasts[kind] = time.monotonic() - begun
        except HostError as error:
            if not cancel or not ("interrupted in" in str(error) or "taken off the queue" in str(error)):
                raise
            seen.cancelled[kind] = seen.cancelled.get(kind, 0) + 1
            forget(server, prompt_id)
            prompt_id = server.queue(graph)
            server.wait(prompt_id, LONGEST)
        seen.done[kind] = seen.done.get(kind, 0) + 1
        forget(server, prompt_id)
    for store in (server.base / "models" / "difflens_activations").glob("soak *"):
        shutil.rmtree(store)


def left(server: Server, scratch: Path) -> list[str]:
    """Temporary files that stayed, and prompts that still wait."""
    files = [*server.base.rglob("*.tmp"), *(server.base / "temp").glob("difflens_*")]
    files += [path for path in scratch.rglob("*") if path.is_file()]
    queue = json.loads(server.request("/queue"))
    return [f"{path.name} stays" for path in files] + [
        f"{len(queue[name])} prompts in {name}" for name in queue if queue[name]
    ]


def soak(minutes: float, seed: int) -> Soak:
    """Queue rounds for so long; what went wrong ends it early."""
    draw, seen, lasts = random.Random(seed), Soak(), Counter()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TMPDIR"] = scratch  # the server's own, so that what stays in it is seen
        base = Path(tempfile.mkdtemp(dir=Path(scratch).parent))
        try:
            with Server(base=base, cpu=True, boot_timeout=LONGEST) as server:
                first, begun, told = plain(server), time.monotonic(), 0.0
                while (now := time.monotonic() - begun) < 60 * minutes and not seen.faults:
                    try:
                        one_round(server, draw, seen, lasts)
                    except HostError as error:
                        seen.faults.append(str(error))
                    seen.samples.append((time.monotonic() - begun, *sample(server.pid)))
                    seen.minutes = seen.samples[-1][0] / 60
                    if now - told > 60:
                        told = now
                        memory, files, threads = seen.samples[-1][1:]
                        counts = f"{sum(seen.done.values())} ended, {sum(seen.cancelled.values())} cancelled"
                        print(f"{seen.minutes:.0f} min: {counts}, {memory >> 20} MB, {files} files, {threads} threads")
                        sys.stdout.flush()
                if seen.faults:
                    print(server.log_tail(100))
                elif not torch.equal(plain(server), first):
                    seen.faults.append("the unsteered picture is another than in the beginning")
                seen.faults += left(server, Path(scratch))
        finally:
            shutil.rmtree(base, ignore_errors=True)
    if len(seen.samples) < ENOUGH:
        seen.faults.append("too few runs to tell whether anything grows")
    elif max(seen.grown()[1:]) > 2 or seen.grown()[0] > GROWTH:
        seen.faults.append("it grew")
    return seen


def main() -> int:
    """Returns 1 if something went wrong or was left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of what is queued and cancelled")
    parser.add_argument("--table", action="store_true", help="queue nothing")
    options = parser.parse_args()
    if options.table:
        seen = Soak(**json.loads(KEPT.read_text(encoding="utf-8")))
    else:
        seen = soak(options.minutes, options.seed)
        print(*seen.faults, sep="\n")
        KEPT.write_text(json.dumps(asdict(seen)), encoding="utf-8")
    print(seen.table())
    return int(bool(seen.faults))


if __name__ == "__main__":
    sys.exit(main())
