"""A real ComfyUI server for the demo and the tests, spoken to over HTTP. Standard library only.

    with Server() as server:
        entry = server.run(prompt)
        png = server.get_image(server.images(entry)[0])

environment.py tells where the ComfyUI comes from and how the user chooses another.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from environment import REPOSITORY, HostError, ensure_comfyui, ensure_environment, has_accelerator
from launch_comfyui import EXIT_WITH_PARENT
from websocket import WebSocket

LAUNCHER = REPOSITORY / "scripts" / "launch_comfyui.py"
PACK_NAME = "ComfyUI-DiffLens"
NODE_PREFIX = "DiffLens"
BUSY_FOLDERS = (".git", ".cache", "demo_output", "__pycache__")  # left out where the pack must be copied
NEW_PROCESS_GROUP = 0x200  # subprocess.CREATE_NEW_PROCESS_GROUP, which exists on Windows only

ProgressCallback = Callable[[dict], None]


class Server:
    """ComfyUI on a free local port with its own base folder and one custom node pack; a context manager.

    pack: the pack's folder, or None for a ComfyUI without packs. name: the folder's name below custom_nodes.
    base: the folder for models, input, output, temp and user files, and for the log; by default a temporary
    one that is removed at the end. cpu: True or False, or None for "unless torch finds an accelerator".
    python, comfyui: default to ensure_environment() and ensure_comfyui(). args: further options of ComfyUI.

    Attributes: url, port, base, log (a file), output_dir.
    """

    def __init__(
        self,
        pack: Path | None = REPOSITORY,
        *,
        name: str = PACK_NAME,
        base: Path | None = None,
        cpu: bool | None = None,
        python: Path | None = None,
        comfyui: Path | None = None,
        api_nodes: bool = False,
        args: Sequence[str] = (),
        boot_timeout: float = 180,
    ) -> None:
        self.pack, self.name, self.cpu, self.api_nodes, self.args = pack, name, cpu, api_nodes, args
        self.python, self.comfyui, self.boot_timeout = python, comfyui, boot_timeout
        self._temporary = base is None
        self._given_base = base
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start ComfyUI and return when it answers; a HostError tells why it does not, or lacks the pack."""
        self.python = self.python or ensure_environment()
        self.comfyui = self.comfyui or ensure_comfyui()
        self.base = Path(self._given_base or tempfile.mkdtemp(prefix="difflens-")).resolve()
        self.log, self.output_dir = self.base / "comfyui.log", self.base / "output"
        self._link = self.base / "custom_nodes" / self.name
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        try:
            self._link.parent.mkdir(parents=True, exist_ok=True)
            if self.pack is not None:
                _remove_link(self._link)
                _link_folder(self.pack.resolve(), self._link)
            self._launch()
            self._wait_until_up()
            self._check_pack()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The process of the running server."""
        self._check_alive()
        return self._process.pid

    def stop(self) -> None:
        """End ComfyUI and all it started, and remove the link to the pack and a temporary base folder."""
        if self._process is not None:
            _end_process_tree(self._process)
            self._process = None
        if self.pack is not None:
            _remove_link(self._link)
        if self._temporary:
            shutil.rmtree(self.base, ignore_errors=True)

    def _launch(self) -> None:
        command = [str(self.python), str(LAUNCHER), str(self.comfyui)]
        command += ["--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--disable-all-custom-nodes"]
        command += ["--whitelist-custom-nodes", self.name] if self.pack is not None else []
        command += [] if self.api_nodes else ["--disable-api-nodes"]
        use_cpu = not has_accelerator(self.python) if self.cpu is None else self.cpu
        command += ["--cpu"] if use_cpu else []
        group = {"creationflags": NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", EXIT_WITH_PARENT: "1"}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *self.args], stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                env=environment, cwd=self.base, **group,
            )  # fmt: skip

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.boot_timeout
        while True:
            self._check_alive()
            try:
                self._get_json("/prompt")
                return
            except OSError:
                pass  # not listening yet
            if time.monotonic() > deadline:
                raise HostError(f"ComfyUI did not answer within {self.boot_timeout:g} s.\n{self.log_tail()}")
            time.sleep(0.1)

    def _check_alive(self) -> None:
        if self._process is None:
            raise HostError("The server is not running.")
        if self._process.poll() is not None:
            raise HostError(f"ComfyUI ended with exit code {self._process.returncode}.\n{self.log_tail()}")

    def _check_pack(self) -> None:
        if self.pack is None:
            return
        log = self.log_text()
        if "(IMPORT FAILED)" in log:
            raise HostError(f"ComfyUI could not import {self.pack}.\n{log[max(log.find('Traceback'), 0) :]}")
        if not any(node.startswith(NODE_PREFIX) for node in self.object_info()):
            raise HostError(f"ComfyUI runs, but {self.pack} brought no {NODE_PREFIX} nodes.\n{self.log_tail(60)}")

    def log_text(self) -> str:
        """Everything ComfyUI has printed so far, without its colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(encoding="utf-8", errors="replace"))

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that ComfyUI printed."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    # --- requests ---

    def object_info(self) -> dict:
        """Every node's schema by node id."""
        return self._get_json("/object_info")

    def queue(self, prompt: dict) -> str:
        """Queue a graph in API format and return its prompt id; a HostError lists its faults.

        A graph of which only some outputs are valid is an error too, and is taken back.
        """
        prompt_id = str(uuid.uuid4())
        body = json.dumps({"prompt": prompt, "prompt_id": prompt_id, "client_id": prompt_id}).encode()
        try:
            reply = json.loads(self.request("/prompt", body))
        except urllib.error.HTTPError as error:
            raise HostError(_describe_rejection(error.read(), prompt)) from None
        if reply.get("node_errors"):
            self.interrupt(reply["prompt_id"])
            raise HostError(_describe_rejection(json.dumps(reply).encode(), prompt))
        return reply["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 600, on_progress: ProgressCallback | None = None) -> dict:
        """Wait until a prompt is done and return its history entry.

        on_progress is called with {node id: {"value", "max", "state", ...}} of the nodes begun so far; the
        state is "running", "finished" or "error". Raises HostError if a node failed, naming it and its error;
        if the prompt was interrupted or taken off the queue; if the server is gone; or at the timeout, having
        interrupted the prompt.
        """
        deadline = time.monotonic() + timeout
        follow = None
        try:
            if on_progress:
                follow = WebSocket("127.0.0.1", self.port, f"/ws?clientId={prompt_id}")
            for pause in _pauses():
                entry = self._finished(prompt_id)
                if entry is not None:
                    return entry
                if time.monotonic() > deadline:
                    self.interrupt(prompt_id)
                    raise HostError(f"The prompt was not done within {timeout:g} s, so it was interrupted.")
                if follow is None:
                    time.sleep(pause)
                    continue
                for message in map(json.loads, follow.messages(pause)):
                    if message["type"] == "progress_state":
                        on_progress(message["data"]["nodes"])
        except OSError as error:
            time.sleep(1)  # a server that just crashed needs a moment until its exit code is known
            self._check_alive()
            raise HostError(f"Lost the connection to ComfyUI: {error}\n{self.log_tail()}") from error
        finally:
            if follow is not None:
                follow.close()

    def run(self, prompt: dict, timeout: float = 600, on_progress: ProgressCallback | None = None) -> dict:
        """Queue a graph, wait for it, and return its history entry; see queue() and wait()."""
        return self.wait(self.queue(prompt), timeout, on_progress)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop a prompt, queued or running; without an id, whatever runs."""
        if prompt_id is not None:
            self.request("/queue", json.dumps({"delete": [prompt_id]}).encode())
        self.request("/interrupt", json.dumps({"prompt_id": prompt_id} if prompt_id else {}).encode())

    def images(self, entry: dict) -> list[dict]:
        """References to the images in a history entry, for get_image(), in the order of their nodes' ids."""
        outputs = entry["outputs"]
        node_ids = sorted(outputs, key=lambda node_id: [int(part) for part in re.findall(r"\d+", node_id)])
        return [image for node_id in node_ids for image in outputs[node_id].get("images", [])]

    def get_image(self, reference: dict) -> bytes:
        """The file of an image reference: {"filename", "subfolder", "type"}."""
        return self.request("/view?" + urllib.parse.urlencode(reference))

    def upload_image(self, path: Path) -> str:
        """Put an image file into ComfyUI's input folder and return the name by which LoadImage knows it."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{path.name}"\r\n\r\n'
        body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        reply = json.loads(self.request("/upload/image", body, f"multipart/form-data; boundary={boundary}"))
        return "/".join(filter(None, [reply["subfolder"], reply["name"]]))

    def request(self, path: str, body: bytes | None = None, content_type: str = "application/json") -> bytes:
        """GET a path of the server, or POST a body to it; urllib's errors pass through."""
        headers = {} if body is None else {"Content-Type": content_type}
        request = urllib.request.Request(self.url + path, body, headers)
        no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with no_proxy.open(request, timeout=60) as reply:
            return reply.read()

    def _get_json(self, path: str) -> dict:
        return json.loads(self.request(path))

    def _finished(self, prompt_id: str) -> dict | None:
        """The history entry of a prompt, None while it waits or runs; HostError if it failed or is gone."""
        self._check_alive()
        entry = self._get_json(f"/history/{prompt_id}").get(prompt_id)
        if entry is None:
            queue = self._get_json("/queue")
            if any(item[1] == prompt_id for item in queue["queue_running"] + queue["queue_pending"]):
                return None
            entry = self._get_json(f"/history/{prompt_id}").get(prompt_id)  # ended in between?
        if entry is None:
            raise HostError(f"Prompt {prompt_id} is neither queued nor done: it was taken off the queue.")
        for kind, message in entry["status"]["messages"]:
            node = f"{message.get('node_type')} (node {message.get('node_id')})"
            if kind == "execution_error":
                what = f"{message['exception_type']}: {message['exception_message'].strip()}"
                raise HostError(f"{node} failed: {what}")
            if kind == "execution_interrupted":
                raise HostError(f"The prompt was interrupted in {node}.")
        return entry


def _pauses() -> Iterator[float]:
    """Seconds between two looks at a prompt: short at first, for the sake of quick ones."""
    pause = 0.02
    while True:
        yield pause
        pause = min(pause * 1.5, 0.5)


def _describe_rejection(body: bytes, prompt: dict) -> str:
    """ComfyUI's answer to an invalid prompt as one line per fault."""
    try:
        reply = json.loads(body)
    except ValueError:
        return f"ComfyUI refused the prompt: {body.decode(errors='replace')}"
    error, lines = reply.get("error"), []
    for node_id, fault in (reply.get("node_errors") or {}).items():
        node = fault.get("class_type") or prompt.get(node_id, {}).get("class_type")
        lines += [f"  {node} (node {node_id}): {e['message']}: {e['details']}" for e in fault["errors"]]
    if not lines and error:
        lines.append(f"  {error['message']} ({error['details']})" if error["details"] else f"  {error['message']}")
    return "\n".join(["ComfyUI refused the prompt:", *lines])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _link_folder(source: Path, link: Path) -> None:
    """Make `link` lead to a folder: a symbolic link, or on Windows a junction, or else a copy."""
    if os.name != "nt":
        link.symlink_to(source, target_is_directory=True)
        return
    junction = ["cmd", "/c", "mklink", "/J", str(link), str(source)]
    if subprocess.run(junction, capture_output=True).returncode != 0:
        shutil.copytree(source, link, ignore=shutil.ignore_patterns(*BUSY_FOLDERS))


def _remove_link(link: Path) -> None:
    """Remove what _link_folder made, never what it leads to."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        try:
            link.rmdir()  # a junction
        except OSError:
            shutil.rmtree(link)  # a copy


def _end_process_tree(process: subprocess.Popen) -> None:
    """Ask a process to end, then make it, together with its children; returns when it is gone."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/PID", str(process.pid), "/T", "/F"], capture_output=True)
    else:
        for wish in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, wish)
                process.wait(timeout=10)
            except (OSError, subprocess.TimeoutExpired):
                pass  # nobody left to ask, or it does not listen
    process.wait()
    process.stdin.close()
