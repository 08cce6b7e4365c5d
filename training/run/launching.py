"""Hands a run to accelerate or torchrun, and follows it from here as if it went on in this process."""

from __future__ import annotations

import math
import os
import queue
import socket
import subprocess
import sys
import threading
import uuid
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import torch

from .. import errors
from ..errors import Lumina2Error, RunError
from ..files import write_text
from .control import Control, Interrupt, SampleNow, reachable
from .events import Between, Ended, Listener, Said, Started
from .remote import MARK, PAUSE, RESUME, Failed, Finished, Spec
from .session import Outcome
from .wire import from_line, to_line

PLUGIN = Path(__file__).resolve().parents[2]
LISTEN_EVERY_S = 0.25
LAST_LINES = 30  # of what the processes printed, where they end without a word
END_S = 5  # for what a dead process has printed to be read
SAVING_S = 600  # from an interrupt on; a large model is written meanwhile


def processes_here() -> int:
    """How many processes train together on this computer: one for each GPU."""
    return max(torch.cuda.device_count(), 1)


def command_line(spec_file: Path, processes: int) -> list[str]:
    """What starts the processes. Without GPUs accelerate starts one whatever it is asked for, so torchrun does it."""
    trained = [str(PLUGIN), "launched", str(spec_file)]
    if processes > torch.cuda.device_count():
        port = ["--master_port", str(_free_port())]
        return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *port, *trained]
    several = ["--multi_gpu", "--main_process_port", str(_free_port())] if processes > 1 else []
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--num_processes", str(processes), "--num_machines", "1", *several),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),  # the run has its own
        *trained,
    ]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(spec: Spec, folder: Path, tell: Listener = lambda event: None, control: Control | None = None) -> Outcome:
    """Train in other processes: what ``train_lora`` does, told, commanded and ended in the same ways.

    Args:
        folder: where the file that starts them lies for as long as they run.
        tell: what it raises interrupts the run, and is raised here once everything is saved.

    Raises:
        Lumina2Error: as ``train_lora`` does there; where the processes end without saying why, with the last lines of
            what they printed.
    """
    spec_file = folder / f"{uuid.uuid4().hex}.json"
    write_text(spec_file, to_line(spec) + "\n")
    tell(Said(f"starting {spec.processes} {'process' if spec.processes == 1 else 'processes'}"))
    try:
        with _Child(command_line(spec_file, spec.processes)) as child:
            return _follow(child, spec, tell, control or Control())
    finally:
        spec_file.unlink(missing_ok=True)


def _follow(child: _Child, spec: Spec, tell: Listener, control: Control) -> Outcome:
    trouble: BaseException | None = None
    failed: Failed | None = None
    started = paused = False
    with ExitStack() as findable:
        while (line := child.line()) is not None:
            event = from_line(line) if line else Between(0, math.nan, "starting")
            if isinstance(event, Failed):
                failed = failed or event  # the others' are consequences of the first, and they may still be saving
                continue
            if isinstance(event, Finished):
                child.wait()
                if trouble:
                    raise trouble
                return _outcome(event, spec)
            if isinstance(event, Started):
                started = True
                findable.enter_context(reachable(spec.store.path(event.run), control))
            if trouble is not None:
                with suppress(BaseException):  # the first trouble is the one to raise
                    if isinstance(event, Ended):
                        tell(event)
                continue
            try:
                if line or not started:
                    tell(event)
                for command in control.take():
                    if isinstance(command, SampleNow) and command.prompt:
                        tell(Said("A typed prompt needs the text encoder, which is here: the validation's are drawn."))
                        command = SampleNow()
                    child.send(command)
                if paused != control.paused:
                    paused = not paused
                    child.send(PAUSE if paused else RESUME)
            except BaseException as error:  # an interrupt too
                trouble = error
                child.send(Interrupt())
                child.end_within(SAVING_S if started else 0)  # before that there is nothing to save
    code = child.wait()
    if trouble:
        raise trouble
    if failed:
        raise _error(failed)
    raise RunError(
        f"The training's processes ended with code {code}. The last that they printed:\n" + "\n".join(child.printed)
    )


def _error(failed: Failed) -> Lumina2Error:
    kind = getattr(errors, failed.kind, RunError)
    return kind(failed.message) if issubclass(kind, Lumina2Error) else RunError(failed.message)


def _outcome(finished: Finished, spec: Spec) -> Outcome:
    from safetensors.torch import load_file

    file = spec.store.file(finished.run.folder, spec.settings.full_fine_tune)
    trained = load_file(file) if file.exists() else {}
    return Outcome(finished.run, trained, list(finished.losses), finished.message)


class _Child:
    """The launcher and all that it starts; gone when the block ends."""

    def __init__(self, command: list[str]) -> None:
        self.printed: deque[str] = deque(maxlen=LAST_LINES)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=os.name != "nt",  # Ctrl+C in ComfyUI's terminal reaches it as a command
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        )
        self._readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in (self._process.stdout, self._process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._process.wait()

    def line(self) -> str | None:
        """The next event; empty where none comes for a while; None after the last one."""
        try:
            return self._lines.get(timeout=LISTEN_EVERY_S)
        except queue.Empty:
            return ""

    def send(self, command: Any) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended, and says itself how
            self._process.stdin.write(to_line(command) + "\n")
            self._process.stdin.flush()

    def wait(self) -> int:
        code = self._process.wait()
        for reader in self._readers:
            reader.join(END_S)
        return code

    def end_within(self, seconds: float) -> None:
        """Kill it if it has not ended by then."""
        timer = threading.Timer(seconds, self._kill)
        timer.daemon = True
        timer.start()

    def _kill(self) -> None:
        import psutil  # type: ignore[import-untyped]

        if self._process.poll() is not None:
            return
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:
            family = []
        for each in (self._process, *family):
            with suppress(psutil.Error, OSError):
                each.kill()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            if line.startswith(MARK):
                self._lines.put(line[len(MARK) :])
            else:
                self.printed.append(line.rstrip())
                print(line, end="", file=sys.stderr, flush=True)
        if stream is self._process.stdout:
            self._lines.put(None)
