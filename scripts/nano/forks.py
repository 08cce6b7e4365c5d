"""A process that has imported a module once and is copied for each call: what is killed is a copy, and starts at once.

with Forks("nano.resume") as forks:
    forks.call("train_and_die", 3, "/tmp/x")
    os.kill(forks.pid, signal.SIGKILL)
    assert forks.code() == -signal.SIGKILL
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Forks:
    """Calls functions of a module, each in a copy of a process that has done nothing but import it.

    Args:
        module: found on ``path``, the project's folder or scripts.
    """

    pid = 0  # of the last call's process

    def __init__(self, module: str, *path: Path) -> None:
        self.module = module
        self.path = [str(each) for each in (*path, ROOT, ROOT / "scripts")]

    def __enter__(self) -> Forks:
        program = f"import sys; sys.path[:0] = {self.path!r}; from nano.forks import serve; serve({self.module!r})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def call(self, function: str, *arguments: Any) -> None:
        """Begin; the arguments go through JSON."""
        assert self._process.stdin is not None
        print(json.dumps([function, *arguments]), file=self._process.stdin, flush=True)
        self.pid = self._answer()

    def code(self) -> int:
        """The exit code of what was begun, once it has ended: 0, 1 for an error, or minus the signal that killed it."""
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def serve(name: str) -> None:
    """The other end: calls from stdin, process numbers and exit codes to stdout."""
    module, answers = import_module(name), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for what libraries print
    for line in sys.stdin:
        function, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                getattr(module, function)(*arguments)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
