"""What people see on the terminal while something goes on, and the signals that end it."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ..run.control import Control
from ..run.events import Between, CheckpointSaved, Ended, Evaluated, Event, LoRASaved, Said, Started, Validated

QUICK_S, SLOW_S = 0.25, 10.0  # between two lines that replace each other; and where lines are kept, in a file


class InterruptedEarlyError(Exception):
    """It was asked to end while nothing is trained yet; what is done is kept, and not done again."""


class Terminal:
    """Sentences, and one line that shows how far something is. All of it goes to ``stream``; answers go to stdout.

    Args:
        control: ends what is counted, where it is asked to.
    """

    def __init__(self, stream: TextIO | None = None, control: Control | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.control = control or Control()
        self._live = self.stream.isatty()
        self._shown_at, self._width = -math.inf, 0

    def say(self, text: str) -> None:
        self._clear()
        print(text, file=self.stream, flush=True)

    def show(self, text: str) -> None:
        """A line that the next one replaces; on a file, one every few seconds."""
        now = time.monotonic()
        if now - self._shown_at < (QUICK_S if self._live else SLOW_S):
            return
        self._shown_at = now
        if self._live:
            self._clear()
            print(text, end="", file=self.stream, flush=True)
            self._width = len(text)
        else:
            print(text, file=self.stream, flush=True)

    def _clear(self) -> None:
        if self._width:
            print("\r" + " " * self._width + "\r", end="", file=self.stream)
            self._width = 0

    def counting(self, what: str) -> Callable[[int, int], None]:
        """Shows ``<what> 3 of 20`` and the time left; raises ``InterruptedEarlyError`` where it shall go on no more."""
        began = time.monotonic()

        def show(done: int, total: int) -> None:
            if self.control.ending:
                raise InterruptedEarlyError
            if 0 < done < total:
                left = duration((time.monotonic() - began) / done * (total - done))
                self.show(f"{what} {done} of {total}, {left} left")

        return show


class RunLines:
    """A listener that shows a run."""

    def __init__(self, terminal: Terminal, target: int) -> None:
        self.terminal, self.target = terminal, target
        self._began: tuple[float, int] | None = None
        self._epoch_steps = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case Said(text):
                self.terminal.say(text)
            case Started(run, step, epoch_steps):
                self._epoch_steps = epoch_steps
                self.terminal.say(f"run {run.folder}: step {step} of {self.target}")
            case Between(step, loss, doing):
                self._between(step, loss, doing)
            case CheckpointSaved(step, path):
                self.terminal.say(f"step {step}: saved {path}")
            case LoRASaved(step, path):
                self.terminal.say(f"step {step}: wrote {path}")
            case Validated(step, samples, scores):
                score = "".join(f", {name} {value:.2f}" for name, value in scores.items())
                self.terminal.say(f"step {step}: {len(samples)} samples{score}")
            case Evaluated(step, loss):
                self.terminal.say(f"step {step}: held-out loss {loss:.4f}")
            case Ended(status, step, _, seconds):
                self.terminal.say(f"{status} at step {step}, after {duration(seconds)}")

    def _between(self, step: int, loss: float, doing: str) -> None:
        now = time.monotonic()
        if doing != "training":
            self._began = None
        elif self._began is None:
            self._began = (now, step)
        known = f", loss {loss:.4f}" if math.isfinite(loss) else ""
        epoch = f", epoch {step / self._epoch_steps:.2f}" if self._epoch_steps else ""
        rate = ""
        if self._began and step > self._began[1]:
            each = (now - self._began[0]) / (step - self._began[1])
            rate = f", {each:.2g} s a step, {duration(each * (self.target - step))} left"
        what = "" if doing == "training" else f"{doing} at "
        self.terminal.show(f"{what}step {step} of {self.target}{epoch}{known}{rate}")


@contextmanager
def obeying_signals(control: Control, say: Callable[[str], None]) -> Iterator[None]:
    """SIGINT and SIGTERM end it after the step or batch, with everything saved; a second SIGINT ends it at once.

    Under a launcher one Ctrl+C comes twice, from the terminal and from the launcher.
    """
    asked_at = math.inf
    one_and_the_same_s = 2.0 if "WORLD_SIZE" in os.environ else 0.0

    def end(number: int, frame: Any) -> None:
        nonlocal asked_at
        if asked_at < math.inf and number == signal.SIGINT:
            if time.monotonic() - asked_at < one_and_the_same_s:
                return
            raise KeyboardInterrupt
        asked_at = min(asked_at, time.monotonic())
        control.interrupt()
        say("stopping after this step or batch; everything is saved (interrupt again to end at once)")

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
