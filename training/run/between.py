"""What happens between two steps: checkpoints, samples, and what was asked for. The one place that knows when."""

from __future__ import annotations

from collections.abc import Iterable

from ..config.settings import TrainSettings
from ..errors import SettingError
from ..model.transformer import Lumina2Transformer
from .control import Command, Control, Interrupt, SampleNow, SaveNow, SetLearningRate, Stop
from .events import Between, Evaluated, Event, LearningRateSet, Listener, Paused, Resumed, Said
from .keeping import Keeper
from .ledger import Ledger
from .loop import TrainState
from .validation import Moment, Validator

LISTEN_EVERY_S = 0.25  # while paused


class BetweenSteps:
    """``go_on`` of the loop. ``status`` and ``note`` say how the run ended."""

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
    ) -> None:
        self.transformer, self.state, self.settings, self.keeper = transformer, state, settings, keeper
        self.ledger, self.tell, self.control, self.validator = ledger, tell, control, validator
        self.first = state.step
        self.status, self.note = "finished", ""
        self._ending = False

    def __call__(self) -> bool:
        step, steps = self.state.step, self.settings.steps
        if self.first < step < steps and step % self.settings.checkpoint_step_interval == 0:
            self.save()
        if self.validator and self.validator.due(step):
            self.ledger.read()
            self.hear(self.validator.run(self.moment("validating")))
        self.tick("training")
        self.obey()
        return step < steps and not self._ending

    def save(self) -> None:
        self.ledger.read()  # so that no step before a checkpoint is missing from the log
        self.keeper.checkpoint(self.state)

    def moment(self, doing: str) -> Moment:
        return Moment(self.transformer, self.state, self.keeper.folder, self.state.step, lambda: self.tick(doing))

    def tick(self, doing: str) -> None:
        self.tell(Between(self.state.step, self.ledger.recent(), doing))

    def hear(self, events: Iterable[Event]) -> None:
        for event in events:
            self.tell(event)
            if isinstance(event, Evaluated) and event.best:
                self.keeper.write_beside(self.state, "best")
            if isinstance(event, Evaluated) and event.stop:
                self.end("stopped", f"early stopping at step {event.step}: the held-out loss falls no more")

    def end(self, status: str, note: str = "") -> None:
        if self.state.step < self.settings.steps:
            self.status, self.note, self._ending = status, note, True

    def obey(self) -> None:
        """Do what was asked; while the run is paused, wait for more."""
        paused = False
        while True:
            for command in self.control.take():
                self.do(command)
            if self._ending or not self.control.paused:
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
                if self.validator is None:
                    self.tell(Said("Nothing can be sampled: wire a VAE into the train node."))
                    return
                self.ledger.read()
                try:
                    self.hear(self.validator.sample(self.moment("validating"), prompt))
                except SettingError as error:  # asked in mid-run: no reason to end it
                    self.tell(Said(str(error)))
