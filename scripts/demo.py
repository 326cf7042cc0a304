"""See a diffusion model's bias turned down, measured and found, in a real ComfyUI.

    python scripts/demo.py                 writes pictures, charts and report.json into demo_output/
    python scripts/demo.py --open          opens the first of them, and ComfyUI with the workflows at the end
    python scripts/demo.py --pictures 512  measures on more pictures (default 64)

The first portraits, before and after, are there within a minute or so. Then each of three recipes is measured, and one
is made anew from the model alone, as in workflow 02 but smaller: about five minutes on two processor cores.

Standard library only. The first run makes an environment and obtains ComfyUI (some minutes, a few GB in .cache).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
import time
import webbrowser
from pathlib import Path

from environment import REPOSITORY, HostError, cache_folder, ensure_comfyui, ensure_environment
from host import Server

WORKFLOWS = REPOSITORY / "workflows"
OUTPUT = REPOSITORY / "demo_output"
ATTRIBUTES = ("presentation", "age", "skin_tone")
SMALLEST_RUN = 64
SERVER_OPTIONS = ("--force-channels-last",)  # convolutions of large batches take a quarter less time on a CPU
PLAIN_PAUSE = 10  # seconds between two lines of progress where the output is no terminal
# Half of workflow 02: its recipe steers about as well, in half the time.
FEWER = {
    "DiffLensCapture": {"pictures": 128, "per_class": 50},
    "DiffLensTrainSAE": {"steps": 800},
    "DiffLensCalibrate": {"budget": 320},
}
DRAWN = {  # node: what its picture is called in the output folder
    "DiffLensTrainSAE": "training",
    "DiffLensTrainProbes": "probes",
    "DiffLensAttribute": "features",
    "DiffLensCompare": "before_after",
    "DiffLensReport": "chart",
}
KEPT_COLUMNS = {
    "presentation": "pres.",
    "age": " age",
    "skin_tone": "skin",
    "background": "backgr.",
    "clothes": "clothes",
}


class Display:
    """Progress of the runs: one line, rewritten in place on a terminal; elsewhere a new line now and then."""

    def __init__(self, runs: int) -> None:
        self.runs, self.number, self.tty = runs, 0, sys.stdout.isatty()

    def start(self, title: str, prompt: dict) -> None:
        self.number, self.title, self.prompt = self.number + 1, title, prompt
        self.began = self.shown = time.monotonic()
        if self.tty:
            self.show("", end="")

    def update(self, nodes: dict) -> None:
        """Called with ComfyUI's progress by node id."""
        for node_id, node in nodes.items():
            if node["state"] == "running" and (self.tty or time.monotonic() - self.shown >= PLAIN_PAUSE):
                item = self.prompt[node_id]
                name = item.get("_meta", {}).get("title") or item["class_type"].removeprefix("DiffLens")
                count = f" {node['value']:.0f}/{node['max']:.0f}" if node["max"] > 1 else ""
                self.show(f"{name}{count}", end="" if self.tty else "\n")

    def finish(self) -> None:
        self.show("done", end="\n")

    def show(self, text: str, end: str) -> None:
        self.shown = time.monotonic()
        line = f"  {self.number:2}/{self.runs} {self.title:32} {self.shown - self.began:4.0f} s  {text}"
        if self.tty:
            line = "\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K"
        print(line, end=end, flush=True)


def load_workflow(name: str) -> dict:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def find(prompt: dict, class_type: str, **inputs: object) -> str:
    """Id of the one node of that type with those inputs."""
    (found,) = [
        node_id
        for node_id, node in prompt.items()
        if node["class_type"] == class_type and inputs.items() <= node["inputs"].items()
    ]
    return found


def changed(workflow: dict, changes: dict[str, dict]) -> dict:
    """The workflow with other inputs of some of its nodes, by type of node."""
    prompt = copy.deepcopy(workflow)
    for class_type, inputs in changes.items():
        prompt[find(prompt, class_type)]["inputs"] |= inputs
    return prompt


def for_recipe(workflow: dict, attribute: str, recipe: str, strength: float, pictures: int) -> dict:
    """Workflow 01 for another recipe, strength and number of pictures; the unsteered part stays the same."""
    changes = {
        "EmptyLatentImage": {"batch_size": pictures},
        "DiffLensDebias": {"recipe": recipe, "strength": strength},
        "DiffLensReport": {"attribute": attribute},
        "DiffLensCompare": {"columns": 16},
    }
    return changed(workflow, changes)


def shipped_runs(workflow: dict, pictures: int) -> dict[str, dict]:
    """Workflow 01 for the recipe of every attribute, by attribute."""
    return {name: for_recipe(workflow, name, f"avatars_{name}.safetensors", 1.0, pictures) for name in ATTRIBUTES}


def run(server: Server, display: Display, title: str, prompt: dict) -> dict:
    """Queue a graph, show its progress and return what its nodes put out, by node id."""
    display.start(title, prompt)
    entry = server.run(prompt, timeout=3600, on_progress=display.update)
    display.finish()
    return entry["outputs"]


def read_report(prompt: dict, outputs: dict) -> dict:
    """The numbers of the Fairness Report node."""
    return json.loads(outputs[find(prompt, "DiffLensReport")]["json"][0])


def save_pictures(server: Server, prompt: dict, outputs: dict, name: str) -> None:
    """Write what the nodes of a run drew into the output folder."""
    for class_type, what in DRAWN.items():
        for node_id, node in prompt.items():
            if node["class_type"] == class_type:
                picture = server.get_image(outputs[node_id]["images"][0])
                (OUTPUT / f"{name}_{what}.png").write_bytes(picture)


def mix(report: dict, side: str) -> str:
    """The mix of classes in the pictures "before" or "after", in words."""
    shares = zip(report["classes"], report[side]["shares"], strict=True)
    return ", ".join(f"{share:.0%} {name}" for name, share in shares)


def summary(report: dict) -> dict:
    """A report as report.json holds it."""
    after = report["after"]
    return {
        "n": report["n"],
        "fd_before": report["before"]["fd"],
        "fd_after": after["fd"],
        "fd_after_ci": after["fd_ci"],
        "success": after["success"],
        "kept": report["kept"],
    }


def table(title: str, results: dict[str, dict]) -> str:
    """Results as lines of text; the kept shares are those of KEPT_COLUMNS."""
    head = "  ".join(KEPT_COLUMNS.values())
    lines = ["", f"{title:29} before  after [95 % interval]  success  kept: {head}"]
    for name, result in results.items():
        low, high = result["fd_after_ci"]
        after = f"{result['fd_after']:.3f} [{low:.3f}, {high:.3f}]"
        shares = {other: f"{share:.0%}" for other, share in result["kept"].items()}
        kept = "  ".join(shares.get(other, "-").rjust(len(label)) for other, label in KEPT_COLUMNS.items())
        lines.append(f"{name:29} {result['fd_before']:6.3f}  {after:22} {result['success']:7.0%}        {kept}")
    return "\n".join(lines)


def first_look(server: Server, display: Display, workflow: dict) -> Path:
    """Run workflow 01 as it is shipped and tell where its pictures are; returns the one to look at first."""
    outputs = run(server, display, "a first look", workflow)
    save_pictures(server, workflow, outputs, "first_look")
    report, picture = read_report(workflow, outputs), OUTPUT / "first_look_before_after.png"
    before, after = mix(report, "before"), mix(report, "after")
    print(f"\nLook at: {picture}")
    print(f"The same {report['n']} portraits before ({before}) and after ({after}).\n", flush=True)
    return picture


def demo(server: Server, pictures: int, show: bool, began: float) -> None:
    """Run everything, print the tables and write the output folder; `began`: when the user began to wait."""
    workflow = load_workflow("01_debias_the_avatars")
    whole_way = changed(load_workflow("02_find_the_bias_features,_train_an_SAE"), FEWER)
    shipped = shipped_runs(workflow, pictures)
    display = Display(1 + len(shipped) + 1)
    picture = first_look(server, display, workflow)
    first_look_seconds = round(time.monotonic() - began, 1)
    if show:
        open_window(picture.as_uri())

    attributes = {}
    for attribute, prompt in shipped.items():
        outputs = run(server, display, attribute, prompt)
        save_pictures(server, prompt, outputs, attribute)
        attributes[attribute] = summary(read_report(prompt, outputs))
    outputs = run(server, display, "find the bias features", whole_way)
    save_pictures(server, whole_way, outputs, "found")
    found = summary(read_report(whole_way, outputs))

    seconds = round(time.monotonic() - began, 1)
    report = {
        "attributes": attributes, "found": {"presentation": found},
        "first_look_seconds": first_look_seconds, "seconds": seconds,
    }  # fmt: skip
    (OUTPUT / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(f"Shipped recipes, n = {pictures}", attributes))
    print(table(f"Found just now, n = {found['n']}", {"presentation": found}))
    print("\nbefore, after: distance from a fair mix (Fairness Discrepancy, 0 is fair).")
    print("success: share of pictures that show what they were asked to; kept: share whose other attributes stayed.")
    print(f"{seconds:.0f} s. Pictures, charts and report.json are in {OUTPUT}")


def open_window(url: str) -> None:
    """Open a file or page in the browser, where there is a screen; else `webbrowser` would take over the terminal."""
    if sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)


def leave_open(server: Server) -> None:
    """Show ComfyUI in the browser until Ctrl+C; the workflows stand in its sidebar and among its templates."""
    print(f"\nComfyUI runs at {server.url} until you press Ctrl+C here.")
    print("The workflows are in the sidebar under Workflows, and under Templates.", flush=True)
    open_window(server.url)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        print("\nComfyUI is stopped.")


def copy_workflows(base: Path) -> None:
    """Put the workflows where ComfyUI's sidebar lists the user's own."""
    folder = base / "user" / "default" / "workflows"
    folder.mkdir(parents=True, exist_ok=True)
    for path in WORKFLOWS.glob("*.json"):
        shutil.copy(path, folder)


def picture_count(text: str) -> int:
    """A number of pictures from the command line."""
    if not text.isdigit() or int(text) < SMALLEST_RUN:
        raise argparse.ArgumentTypeError(f"expected a number of at least {SMALLEST_RUN}, got {text!r}")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=picture_count, default=SMALLEST_RUN, help="pictures per attribute")
    parser.add_argument("--open", action="store_true", help="open the first pictures, and ComfyUI at the end")
    options = parser.parse_args()
    try:
        print("Preparing (the first time takes some minutes)", flush=True)
        ensure_environment()
        ensure_comfyui()
        OUTPUT.mkdir(exist_ok=True)
        began = time.monotonic()
        base = cache_folder() / "comfyui-user" if options.open else None
        print("Starting ComfyUI", flush=True)
        with Server(base=base, args=SERVER_OPTIONS) as server:
            demo(server, options.pictures, options.open, began)
            if options.open:
                copy_workflows(server.base)
                leave_open(server)
    except HostError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
