"""What is asked of a run while it goes on: from the page, from signals, from a launcher. Acted on between two steps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import SettingError


@dataclass(frozen=True)
class Stop:
    """Stop and keep: the graph goes on with what was trained."""


@dataclass(frozen=True)
class Interrupt:
    """End now, everything saved, so that the same training goes on from here when it is started again."""


@dataclass(frozen=True)
class SaveNow:
    """A checkpoint, and the LoRA of this step as a file of its own."""


@dataclass(frozen=True)
class SampleNow:
    prompt: str = ""  # empty: the prompts of the settings


@dataclass(frozen=True)
class SetLearningRate:
    rate: float


Command = Stop | Interrupt | SaveNow | SampleNow | SetLearningRate


class Control:
    """The mailbox of one run; every method may be called from any thread."""

    def __init__(self) -> None:
        self._commands: list[Command] = []
        self._paused = False
        self._changed = threading.Condition()

    def stop(self) -> None:
        self.send(Stop())

    def interrupt(self) -> None:
        self.send(Interrupt())

    def save(self) -> None:
        self.send(SaveNow())

    def sample(self, prompt: str = "") -> None:
        self.send(SampleNow(prompt.strip()))

    def set_learning_rate(self, rate: float) -> None:
        """Raises SettingError where the rate is no positive number below or equal 1e3."""
        if not 0 < rate <= 1e3:
            raise SettingError(f"The learning rate is {rate}; choose a number above 0, for example 0.0001.")
        self.send(SetLearningRate(rate))

    def send(self, command: Command) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify_all()

    def pause(self) -> None:
        self._set_paused(True)

    def resume(self) -> None:
        self._set_paused(False)

    def _set_paused(self, paused: bool) -> None:
        with self._changed:
            self._paused = paused
            self._changed.notify_all()

    @property
    def paused(self) -> bool:
        return self._paused

    def take(self) -> list[Command]:
        """What was asked since the last call, in order."""
        with self._changed:
            taken, self._commands = self._commands, []
        return taken

    @property
    def ending(self) -> bool:
        """Whether it was asked to end, and nobody has taken that yet."""
        with self._changed:
            return any(isinstance(command, (Stop, Interrupt)) for command in self._commands)

    def wait(self, seconds: float) -> None:
        """While paused: until something is asked, or the time is over."""
        with self._changed:
            if self._paused and not self._commands:
                self._changed.wait(seconds)


_active: dict[Path, Control] = {}


@contextmanager
def reachable(run_folder: Path, control: Control) -> Iterator[None]:
    """Within it ``active`` finds the run by its folder."""
    _active[run_folder.resolve()] = control
    try:
        yield
    finally:
        _active.pop(run_folder.resolve(), None)


def active(run_folder: Path) -> Control | None:
    """The control of a run that goes on in this process."""
    return _active.get(run_folder.resolve())
