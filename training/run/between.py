"""What happens between two steps: checkpoints, samples, and what was asked for. The one place that knows when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from ..config.settings import TrainSettings
from ..errors import SettingError
from ..model.transformer import Lumina2Transformer
from .control import Command, Control, Interrupt, SampleNow, SaveNow, SetLearningRate, Stop
from .events import Between, Evaluated, Event, LearningRateSet, Listener, Paused, Resumed, Said
from .keeping import Keeper
from .ledger import Ledger
from .loop import TrainState
from .processes import ALONE, Processes
from .validation import Moment, Validator
from .wire import from_line, to_line

LISTEN_EVERY_S = 0.25  # while paused
PAUSED = "paused"  # what a process says as long as it is
ENDING = "ending"


class _CutOffError(Exception):
    """Ends what is drawn or worked out, since the run was asked to end."""


class BetweenSteps:
    """``go_on`` of the loop. ``status`` and ``note`` say how the run ended.

    Of several processes each does all of it, at the same steps: the leader tells, and draws with an adapter that all
    have alike; with weights that lie in all of them, all draw.
    """

    def __init__(
        self,
        transformer: Lumina2Transformer,
        state: TrainState,
        settings: TrainSettings,
        keeper: Keeper,
        ledger: Ledger,
        tell: Listener,
        control: Control,
        validator: Validator | None,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.transformer, self.state, self.settings, self.keeper = transformer, state, settings, keeper
        self.ledger, self.tell, self.control, self.validator = ledger, tell, control, validator
        self.first = state.step
        self.status, self.note = "finished", ""
        self._ending = self._paused = False

    def __call__(self) -> bool:
        step, steps = self.state.step, self.settings.steps
        if self.first < step < steps and step % self.settings.checkpoint_step_interval == 0:
            self.save()
        self.judge(self.validate)
        self.tick("training")
        self.obey()
        return step < steps and not self._ending

    def save(self) -> None:
        self.ledger.read()  # so that no step before a checkpoint is missing from the log
        self.keeper.checkpoint(self.state)

    def moment(self, doing: str) -> Moment:
        return Moment(self.transformer, self.state, self.keeper.folder, self.state.step, lambda: self.look_up(doing))

    def look_up(self, doing: str) -> None:
        """Before each network call of what may take long: what ends or pauses the run acts here, the rest behind it.

        What is drawn while the run is paused was asked for meanwhile, and waits for nothing.
        """
        together = self.state.shards is not None
        tick = self.tick if together else self._tick
        tick(doing)
        while heard := self._asked(together):
            if ENDING in heard:
                raise _CutOffError
            if self._paused:
                break
            tick(PAUSED)
            time.sleep(LISTEN_EVERY_S)

    def _asked(self, together: bool) -> list[str]:
        said = [ENDING] if self.control.ending else [PAUSED] if self.control.paused else []
        return self.processes.share(said) if together else said

    def tick(self, doing: str) -> None:
        """Where all processes learn of a listener that raises."""
        self.processes.lead(lambda: self._tick(doing))

    def _tick(self, doing: str) -> None:
        self.processes.check_alive()
        self.tell(Between(self.state.step, self.ledger.recent(), doing))

    def validate(self) -> Iterable[Event]:
        if self.validator and self.validator.due(self.state.step):
            self.ledger.read()
            yield from self.validator.run(self.moment("validating"))

    def judge(self, judging: Callable[[], Iterable[Event]]) -> None:
        """Tell what is drawn and worked out, and act on held-out losses; no more of it where the run is to end."""

        def judged() -> Iterator[Event]:
            with suppress(_CutOffError):
                yield from judging()

        drawn_by_all = list(judged()) if self.state.shards else None
        found: list[Evaluated] = []

        def tell() -> None:
            for event in judged() if drawn_by_all is None else drawn_by_all:
                self.tell(event)
                if isinstance(event, Evaluated):
                    found.append(event)

        self.processes.lead(tell)
        for line in self.processes.share([to_line(event) for event in found]):
            event = from_line(line)
            if event.best:
                self.keeper.write_beside(self.state, "best")
            if event.stop:
                self.end("stopped", f"early stopping at step {event.step}: the held-out loss falls no more")

    def end(self, status: str, note: str = "") -> None:
        if self.state.step < self.settings.steps:
            self.status, self.note, self._ending = status, note, True

    def obey(self) -> None:
        """Do what was asked; while the run is paused, wait for more."""
        paused = False
        while True:
            said = [to_line(command) for command in self.control.take()]
            said += [to_line(PAUSED)] if self.control.paused else []
            heard = [from_line(line) for line in self.processes.share(said)]
            self._paused = PAUSED in heard
            for command in heard:
                if command != PAUSED:
                    self.do(command)
            if self._ending or not self._paused:
                break
            if not paused:
                paused = True
                self.ledger.read()
                self.tell(Paused(self.state.step))
            self.tick("paused")
            self.control.wait(LISTEN_EVERY_S)
        if paused:
            self.tell(Resumed(self.state.step))

    def do(self, command: Command) -> None:
        match command:
            case Stop():
                self.end("stopped")
            case Interrupt():
                self.end("interrupted")
            case SaveNow():
                self.save()
                self.keeper.write_beside(self.state, str(self.state.step))
            case SetLearningRate(rate):
                self.state.rate_factor = rate / self.settings.optimizer.learning_rate
                self.keeper.set_learning_rate(rate)
                self.tell(LearningRateSet(self.state.step, rate))
            case SampleNow(prompt):
                self.judge(lambda: self.sampled(prompt))

    def sampled(self, prompt: str) -> list[Event]:
        if self.validator is None:
            return [Said("Nothing can be sampled: wire a VAE into the train node.")]
        self.ledger.read()
        try:
            return list(self.validator.sample(self.moment("validating"), prompt))
        except SettingError as error:  # asked in mid-run: no reason to end it
            return [Said(str(error))]
