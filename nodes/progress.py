"""A node's progress bar and line of text; every call is also where the user's Cancel takes effect."""

from __future__ import annotations

import math
import time
from typing import Any

import comfy.model_management
import comfy.utils

from ..training.run.events import Between, Ended, Event, Said, Started

TEXT_EVERY_S = 0.3
MESSAGE_EVERY_S = 0.25
MESSAGE = "lumina2.run"  # to the page; the panel reads it


class Counting:
    """Shows ``<what> 3 of 20``, how many a second and the time left, for work that tells (done, total)."""

    def __init__(self, progress: Progress, what: str) -> None:
        self.progress, self.what, self.worked = progress, what, False
        self._began = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self.worked, taken = self.worked or total > 0, time.monotonic() - self._began
        speed = ""
        if 0 < done < total and taken:
            speed = f", {done / taken:.2g} a second, {duration(taken / done * (total - done))} left"
        self.progress.step(done, f"{self.what} {done} of {total}{speed}", total)


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Progress:
    """Progress of one execution of one node; a ``quiet`` one shows no line of text, since the node has a panel."""

    def __init__(self, node_id: str | None, total: int = 1, quiet: bool = False) -> None:
        self.node_id, self.total, self.quiet = node_id, max(total, 1), quiet
        self._bar = comfy.utils.ProgressBar(self.total, node_id)
        self._said_at = self._moved_at = 0.0

    def say(self, text: str) -> None:
        """Show a line on the node.

        Raises:
            InterruptProcessingException: the user pressed Cancel.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._said_at = time.monotonic()
        if self.node_id is None or self.quiet:
            return
        from server import PromptServer

        if getattr(PromptServer, "instance", None):
            PromptServer.instance.send_progress_text(text, self.node_id)

    def step(self, done: int, text: str, total: int | None = None) -> None:
        """Move the bar, and show the text, each if the last time is long enough ago. Raises like ``say``."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        total = self._bar.total if total is None else max(total, 1)
        if done >= total or time.monotonic() - self._moved_at >= MESSAGE_EVERY_S:  # ComfyUI sends every move
            self._moved_at = time.monotonic()
            self._bar.update_absolute(done, total)
        if time.monotonic() - self._said_at >= TEXT_EVERY_S:
            self.say(text)


class RunProgress:
    """Listens to a run, and shows it on its node: bar, text and the messages that the panel lives on.

    A message holds ``run_id`` (the run's folder), ``node_id``, ``status``, ``doing``, ``step``, ``target``, ``loss``,
    ``steps_per_second``, ``seconds_left``, ``epoch`` and, of what else happened since the last one, ``events``: their
    names. Everything else is asked for by the page, from the run's folder.
    """

    def __init__(self, progress: Progress, target: int) -> None:
        self.progress, self.target = progress, target
        self.run_id = ""
        self._status, self._doing, self._loss, self._epoch_steps = "waiting", "", math.nan, 0.0
        self._began: tuple[float, int] | None = None  # when, and with how many steps done
        self._step = 0
        self._happened: list[str] = []
        self._sent_at = 0.0

    def __call__(self, event: Event) -> None:
        """Raises InterruptProcessingException where the user pressed Cancel."""
        match event:
            case Said(text):
                self.progress.say(text)
            case Started():
                self.run_id, self._status, self._step = event.run.folder, "running", event.step
                self._epoch_steps = event.epoch_steps
            case Ended():
                self._status, self._doing = event.status, ""
            case Between(step, loss, doing):
                now = time.monotonic()
                if doing != "training" or self._doing not in ("training", ""):
                    self._began = None  # a pause says nothing of the steps' speed
                elif self._began is None:
                    self._began = (now, step)
                self._step, self._loss, self._doing = step, loss, doing
                self.progress.step(step, self._line(), self.target)
        if not isinstance(event, Between):
            self._happened.append(type(event).__name__)
        at_once = isinstance(event, (Started, Ended))
        if self.run_id and (at_once or time.monotonic() - self._sent_at >= MESSAGE_EVERY_S):
            self._send()

    def speed(self) -> float | None:
        """Steps a second since the run, or its last pause or validation."""
        if not self._began or self._step == self._began[1]:
            return None
        return (self._step - self._began[1]) / (time.monotonic() - self._began[0])

    def _line(self) -> str:
        speed = self.speed()
        known = f", loss {self._loss:.4f}" if math.isfinite(self._loss) else ""
        rate = f", {1 / speed:.2g} s a step, {duration((self.target - self._step) / speed)} left" if speed else ""
        doing = "" if self._doing == "training" else f"{self._doing} at "
        return f"{doing}step {self._step} of {self.target}{known}{rate}"

    def _send(self) -> None:
        from server import PromptServer

        self._sent_at = time.monotonic()
        speed = self.speed()
        message: dict[str, Any] = {
            "run_id": self.run_id,
            "node_id": self.progress.node_id,
            "status": self._status,
            "doing": self._doing,
            "step": self._step,
            "target": self.target,
            "loss": self._loss if math.isfinite(self._loss) else None,
            "steps_per_second": speed,
            "seconds_left": (self.target - self._step) / speed if speed else None,
            "epoch": self._step / self._epoch_steps if self._epoch_steps else None,
            "events": self._happened,
        }
        self._happened = []
        if getattr(PromptServer, "instance", None):
            PromptServer.instance.send_sync(MESSAGE, message)
