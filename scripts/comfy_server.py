"""A real ComfyUI with this plugin in it, on a free local port: started, asked over HTTP, and stopped.

Standard library only; the demo and the tests share it.
"""

from __future__ import annotations

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

import environment
from environment import ROOT, SetupError

PLUGIN = "lumina2-trainer"
FLAGS = ("--cpu", "--use-pytorch-cross-attention", "--disable-api-nodes", "--database-url", "sqlite:///:memory:")
STARTUP_S, PROMPT_S = 240, 3600
FOLDERS = ("custom_nodes", "input", "output", "user", "temp", "models/loras", "models/diffusers")
NOTES = ("Note", "MarkdownNote")
MUTED, BYPASSED = 2, 4


class ServerError(SetupError):
    """ComfyUI did not start, or refused or failed a prompt; the message says which node and why."""


class Server:
    """A running ComfyUI over ``base``, which holds its models, inputs, outputs and log. Use it in a ``with``."""

    def __init__(self, python: Path, comfyui: Path, base: Path) -> None:
        self.base, self.log = base, base / "server.log"
        for name in FOLDERS:
            (base / name).mkdir(parents=True, exist_ok=True)
        environment.link(base / "custom_nodes" / PLUGIN, ROOT)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [str(python), "main.py", "--base-directory", str(base), *FLAGS]
        self.comfyui = comfyui

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it answers; after ``stop`` it can be started again.

        Raises:
            ServerError: it does not start; with the end of its log.
        """
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "--port", str(self.port)],
                cwd=self.comfyui,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUTF8": "1"},
            )
        deadline = time.monotonic() + STARTUP_S
        try:
            while time.monotonic() < deadline and self.process.poll() is None:
                if self._answers():
                    return
                time.sleep(0.1)
            end = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise ServerError(f"{end}\nComfyUI did not start (log: {self.log}).")
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        try:
            self.ask("/system_stats")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ask(self, path: str, body: Any = None) -> Any:
        """The answer as JSON; with a body it is a POST."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def queue(self, prompt: dict[str, Any]) -> str:
        """Put a prompt in API format into the queue.

        Raises:
            ServerError: ComfyUI finds it invalid, or a part of it, which it would leave out in silence.
        """
        try:
            answer = self.ask("/prompt", {"prompt": prompt})
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
        if "error" in answer or answer.get("node_errors"):
            raise ServerError(f"ComfyUI refuses the prompt: {rejection(answer)}")
        return str(answer["prompt_id"])

    def wait(
        self, identity: str, on_wait: Callable[[], None] = lambda: None, limit_s: float = PROMPT_S
    ) -> dict[str, Any]:
        """The outputs of a prompt by node, once it has ended; ``on_wait`` is called meanwhile, at least twice a second.

        Raises:
            ServerError: a node failed, ComfyUI ended, or the time is over.
        """
        began = time.monotonic()
        while (waited := time.monotonic() - began) < limit_s:
            entry = self.ask(f"/history/{identity}").get(identity)
            if entry and entry["status"]["completed"]:
                return dict(entry["outputs"])
            if entry and entry["status"]["status_str"] == "error":
                raise ServerError(failure(entry["status"]["messages"]))
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended by itself (log: {self.log}).")
            on_wait()
            time.sleep(min(0.05 + waited / 20, 0.5))  # hardly longer than it takes
        raise ServerError(f"The prompt did not end within {limit_s:.0f} s (log: {self.log}).")

    def run(self, prompt: dict[str, Any], on_wait: Callable[[], None] = lambda: None) -> dict[str, Any]:
        return self.wait(self.queue(prompt), on_wait)

    def api_prompt(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """A workflow as the page saves it, in the form that the queue takes."""
        return api_prompt(workflow, self.ask("/object_info"))


def rejection(answer: dict[str, Any]) -> str:
    """What ComfyUI finds wrong in a prompt, node by node."""
    found = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in answer.get("node_errors", {}).values()
        for error in node["errors"]
    ]
    return "; ".join(found) or str(answer["error"]["message"])


def failure(messages: list[Any]) -> str:
    """One sentence of a history's messages."""
    for kind, content in messages:
        if kind == "execution_error":
            return f"{content['node_type']}: {content['exception_message'].strip()}"
        if kind == "execution_interrupted":
            return f"{content['node_type']}: interrupted"
    return "the prompt failed"


def api_prompt(workflow: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Nodes and links of a saved workflow as ``{node: {class_type, inputs}}``.

    Args:
        known: the answer of ``/object_info``: it tells which inputs are widgets, and in which order.

    Raises:
        ServerError: a node's type is unknown, or a node is bypassed.
    """
    origins = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: dict[str, Any] = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES or node.get("mode") == MUTED:
            continue
        if node["type"] not in known or node.get("mode") == BYPASSED:
            raise ServerError(f"The workflow's node {node['type']} is unknown or bypassed.")
        described = known[node["type"]]["input"]
        specifications = {**described.get("required", {}), **described.get("optional", {})}
        inputs = dict(zip(_widgets(specifications), node.get("widgets_values") or [], strict=False))
        inputs.pop(None, None)
        for socket_ in node.get("inputs", []):
            if socket_.get("link") is not None:
                inputs[socket_["name"]] = origins[socket_["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _widgets(specifications: dict[str, Any]) -> list[str | None]:
    """The names that a node's saved widget values belong to; None for a seed's "control after generate"."""
    names: list[str | None] = []
    for name, (kind, *options) in specifications.items():
        option = options[0] if options else {}
        if not (isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")):
            continue
        if option.get("forceInput"):
            continue
        names.append(name)
        if kind == "INT" and option.get("control_after_generate", name in ("seed", "noise_seed")):
            names.append(None)
        if option.get("image_upload"):
            names.append(None)
    return names
