"""A real ComfyUI with this plugin in it, over a base folder of its own: start it, run a workflow, stop it.

The demo and the tests share it. Standard library only, since the demo's own Python has nothing installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__:  # the tests import scripts.server: plain "server" is the name of a module of ComfyUI
    from . import environment
else:
    import environment

FLAGS = ("--cpu", "--use-pytorch-cross-attention", "--disable-api-nodes", "--database-url", "sqlite:///:memory:")
FOLDERS = ("custom_nodes", "input", "output", "user", "models/loras", "temp")
START_S = 240
POLL_S = 0.5

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"Note", "MarkdownNote"}
MUTED, BYPASSED = 2, 4


class ServerError(Exception):
    """ComfyUI did not start, stopped answering, or a prompt failed; the message says which node and why."""


class Server:
    """ComfyUI's process. ``with Server(…) as server:`` starts it, waits until it answers, and stops it in the end.

    Args:
        python: the interpreter that has ComfyUI's needs.
        comfyui: ComfyUI's folder.
        base: where its inputs, outputs, models and log go; made where it is missing. The plugin is linked into it.
        flags: how ComfyUI runs; by default on the CPU.
    """

    def __init__(self, python: Path | str, comfyui: Path | str, base: Path, flags: tuple[str, ...] = FLAGS) -> None:
        self.python, self.comfyui, self.base, self.flags = Path(python), Path(comfyui), base, flags
        self.log = base / "server.log"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """How to start it by hand, from any folder."""
        main = self.comfyui / "main.py"
        return [str(self.python), str(main), "--base-directory", str(self.base), "--port", str(self.port), *self.flags]

    def start(self) -> None:
        """Start over the base folder as it is, and wait until the server answers.

        Raises:
            ServerError: it ended, or did not answer in time; with the end of its log.
        """
        for name in FOLDERS:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        environment.link(self.base / "custom_nodes" / "lumina2-trainer", environment.ROOT)
        self.port = free_port()
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=self.comfyui, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError):
                self.ask("/system_stats")
                return
            time.sleep(POLL_S)
        raise ServerError(f"ComfyUI did not start within {START_S} s. The end of {self.log}:\n{self.end_of_log()}")

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def check_alive(self) -> None:
        if self.process is None or self.process.poll() is not None:
            raise ServerError(f"ComfyUI is not running. The end of {self.log}:\n{self.end_of_log()}")

    def end_of_log(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]

    def ask(self, path: str, body: object = None) -> Any:
        """GET, or POST where there is a body; the answer's JSON, or None where it is empty."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    # Workflows and prompts

    def prompt_of(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """What the page would queue for a workflow that it saved."""
        return to_prompt(workflow, self.ask("/object_info"))

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt (in API format), to its id.

        Raises:
            ServerError: a node, a value or a link is not valid. ComfyUI would run the rest without a word.
        """
        try:
            answer = self.ask("/prompt", {"prompt": prompt})
        except urllib.error.HTTPError as error:
            with error:
                raise ServerError(rejection(json.load(error))) from None
        if answer["node_errors"]:
            self.ask("/queue", {"delete": [answer["prompt_id"]]})
            self.ask("/interrupt", {"prompt_id": answer["prompt_id"]})
            raise ServerError(rejection(answer))
        return str(answer["prompt_id"])

    def wait(self, identity: str, limit_s: float, watch: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Wait for a queued prompt to end, to its outputs by node id; ``watch`` is called twice a second.

        Raises:
            ServerError: a node failed, the prompt was interrupted, the server died, or the time is over.
        """
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            self.check_alive()
            watch()
            ended = self.ask(f"/history/{identity}").get(identity)
            if ended:
                watch()
                if ended["status"]["status_str"] != "success":
                    raise ServerError(failure(ended["status"]))
                outputs: dict[str, Any] = ended["outputs"]
                return outputs
            time.sleep(POLL_S)
        raise ServerError(f"The prompt did not end within {limit_s:.0f} s. The end of {self.log}:\n{self.end_of_log()}")

    def run(self, prompt: dict[str, Any], limit_s: float = 600, watch: Callable[[], None] = lambda: None) -> Any:
        """Queue a prompt and wait for its outputs, by node id."""
        return self.wait(self.queue(prompt), limit_s, watch)

    def files(self, output: dict[str, Any]) -> list[Path]:
        """The pictures that one node's output names, in their order."""
        folders = {"output": self.base / "output", "temp": self.base / "temp", "input": self.base / "input"}
        return [folders[image["type"]] / image["subfolder"] / image["filename"] for image in output["images"]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# What went wrong, in a sentence


def rejection(answer: dict[str, Any]) -> str:
    """Why ComfyUI did not take a prompt."""
    reasons = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in answer["node_errors"].values()
        for error in node["errors"]
    ]
    return "; ".join(reasons) or "{message} ({details})".format(**answer["error"])


def failure(status: dict[str, Any]) -> str:
    """Why a prompt ended without success."""
    for event, details in status["messages"]:
        if event == "execution_error":
            return f"{details['node_type']}: {details['exception_message'].strip()}"
        if event == "execution_interrupted":
            return f"{details['node_type']}: interrupted"
    return f"The prompt ended with {status['status_str']}."


# From what the page saves to what it queues


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """Convert a saved workflow (nodes and links) into the API's format.

    Notes and muted nodes are left out, bypassed ones hand on their input of the same type, and a link into a widget
    takes the place of its value.

    Raises:
        ServerError: a node that this ComfyUI does not have, or more saved values than widgets.
    """
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES and node["mode"] != MUTED}
    sources = {link[0]: (link[1], link[2]) for link in workflow["links"]}

    def source(link: int | None) -> list[Any] | None:
        """The output that a link comes from, behind bypassed nodes."""
        identity, slot = sources.get(link, (None, 0))
        node = nodes.get(identity)
        if node is None or node["mode"] != BYPASSED:
            return [str(identity), slot] if node else None
        kind = node["outputs"][slot]["type"]
        same = [socket for socket in node["inputs"] if socket["type"] == kind]
        return source(same[min(slot, len(same) - 1)]["link"]) if same else None

    prompt = {}
    for identity, node in nodes.items():
        if node["mode"] == BYPASSED:
            continue
        if node["type"] not in object_info:
            raise ServerError(f"This ComfyUI has no node {node['type']}.")
        linked = {socket["name"]: source(socket["link"]) for socket in node.get("inputs", [])}
        inputs = {
            **widget_values(node, object_info[node["type"]]),
            **{name: origin for name, origin in linked.items() if origin},
        }
        prompt[str(identity)] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """A saved node's values by the names of its widgets; they are saved by position."""
    names = []
    for section in ("required", "optional"):
        for name in info["input_order"].get(section, []):
            kind, options = (*info["input"][section][name], {})[:2]
            if (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput"):
                names.append(name)
                if options.get("control_after_generate", kind == "INT" and name in {"seed", "noise_seed"}):
                    names.append("")  # "fixed", "randomize", …: a widget of the page's own
    values = node.get("widgets_values") or []
    if len(values) > len(names):
        raise ServerError(f"{node['type']} has {len(names)} widgets, and {len(values)} values are saved for them.")
    return {name: value for name, value in zip(names, values, strict=False) if name}
