"""Speed of the core beside other libraries and plain implementations, in one table.

    python benchmarks/run.py                  everything that is installed, about 10 minutes on 2 cores
    python benchmarks/run.py --only training  one of: training, attribution, steering, overhead, capture
    python benchmarks/run.py --json FILE      the rows as JSON too

Peers that are not installed are left out. To have all, in an environment of their own (about 4 GB):

    pip install torch sae-lens==6.54.12 eai-sparsify==1.3.3 captum diffusers
    pip install --no-deps dictionary-learning==0.1.0 nnsight==0.3.7
    pip install python-socketio pillow pytest hypothesis

tests/sae/test_formats.py then also checks SAEs against the libraries that wrote them.
Times are seconds (peak memory: MB). ratio is peer / ours, so above 1 we are faster; for the rows against the same work
without us (unsteered, plain sampling, all activations) it is ours / theirs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

TOPICS = ("training", "attribution", "steering", "overhead", "capture")
KEYS = ("name", "size", "ours", "peer", "peer_name", "ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TOPICS)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = []
    print(f"{'what':32} {'size':38} {'ours':>10} {'peer':>10}  {'ratio':>7}  peer")
    for topic in [options.only] if options.only else TOPICS:
        try:
            found = importlib.import_module(topic).rows()
        except ImportError as error:
            print(f"{topic} is left out: {error}", file=sys.stderr)
            continue
        for row in found:
            rows.append({key: row[key] for key in KEYS})
            name, size, ours, peer, who, ratio = rows[-1].values()
            print(f"{name:32} {size:38} {ours:10.4g} {peer:10.4g}  {ratio:7.2f}  {who}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
