"""What a run wants of whoever draws its samples and works out its held-out loss; ``sample`` has the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..model.transformer import Lumina2Transformer
from .events import Event

if TYPE_CHECKING:
    from .loop import TrainState


@dataclass(frozen=True)
class Moment:
    """A run between two steps. Averages (EMA, schedule-free) are put in place by the one who draws."""

    transformer: Lumina2Transformer  # with the adapter on; in training mode
    state: TrainState
    folder: Path  # the run's
    step: int
    tick: Callable[[], None]  # called before each network call; what it raises ends the run


class Validator(Protocol):
    """Draws and evaluates between two steps. Random states, modes and weights are afterwards as they were before."""

    def due(self, step: int) -> bool:
        """Whether something is to be done behind this step; asked at step 0 (or where a run goes on) too."""
        ...

    def run(self, moment: Moment) -> Iterable[Event]:
        """``Validated`` and ``Evaluated`` events of what is due at this step, as each gets ready."""
        ...

    def sample(self, moment: Moment, prompt: str) -> Iterable[Event]:
        """Sample now: a prompt that was typed in, or (empty) those of the settings.

        Raises:
            SettingError: a prompt was typed in and there is no text encoder at hand.
        """
        ...
