"""The processes that train one run together; one by itself is the usual case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import RunError
from .events import Between, Event, Listener
from .link import Link, launched

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. What it does together, every one has to do, in the same order."""

    rank: int = 0
    count: int = 1
    link: Link | None = None  # None: there is nobody else

    @property
    def leads(self) -> bool:
        """Whether this one writes files, draws samples and takes commands."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process should put the model, if it is one of several."""
        return self.link.device if self.link else torch.device("cpu")

    def batch_numbers(self, step: int, accumulated: int) -> range:
        """The batches of an optimiser step that fall to this process: each ``count``-th of them.

        All of them together are ``count · accumulated`` batches, so the step is the same one for any number of
        processes as long as that product is.
        """
        first = step * accumulated * self.count
        return range(first + self.rank, first + accumulated * self.count, self.count)

    def average(self, weights: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Make every process's gradients their mean, in place: the same bits everywhere.

        A weight that has a gradient in some processes only counts as 0 in the others; one that has none in any stays
        without.

        Returns:
            The mean of the losses, 0-dimensional.
        """
        if self.link is None:
            return loss
        own = torch.tensor([float(weight.grad is not None) for weight in weights], device=loss.device)
        gradients = [_gradient(weight).flatten().float() for weight in weights]
        flat = self.link.total(torch.cat([*gradients, own, loss.detach().reshape(1).float()])).div_(self.count)
        *means, found, mean = flat.split([*map(len, gradients), len(weights), 1])
        anywhere = (found > 0).tolist() if any(weight.grad is None for weight in weights) else None
        with torch.no_grad():
            for number, (weight, gradient) in enumerate(zip(weights, means, strict=True)):
                if anywhere is None or anywhere[number]:
                    weight.grad = _gradient(weight).copy_(gradient.view(weight.shape))
        return mean[0].to(loss.dtype)

    def lead(self, work: Callable[[], T]) -> T | None:
        """Done by the leader alone, and waited for by all.

        Returns:
            What ``work`` returned to the leader.

        Raises:
            RunError: in the other processes, where ``work`` raised in the leader, what it did.
        """
        if self.link is None or self.link.parted:
            return work() if self.leads else None
        if not self.leads:
            failed = self.link.exchange("")
            if failed:
                raise RunError(failed[0])
            return None
        try:
            value = work()
        except BaseException as error:
            self.link.exchange(str(error) or type(error).__name__)
            raise
        self.link.exchange("")
        return value

    def share(self, said: Sequence[str]) -> list[str]:
        """What any of the processes has to say, in the order of their ranks: the same everywhere."""
        if self.link is None or self.link.parted:
            return list(said)
        return [line for text in self.link.exchange("\n".join(said)) for line in text.split("\n") if line]

    def check_same(self, what: str) -> None:
        """Raises RunError where the processes are about to train different things."""
        if len(told := set(self.share([what]))) > 1:
            raise RunError(
                f"The {self.count} processes of this training were started with different settings, models or files "
                f"({'; '.join(sorted(told))}). Start them all with one command, and let them see the same folders."
            )

    def check_alive(self) -> None:
        """Raises RunError where another process has ended."""
        if self.link:
            self.link.check_alive()

    def meet(self, step: int, error: BaseException) -> RunError | None:
        """Find out, after an error, whether all are still there and as far: only then can they do things together.

        Otherwise each is by itself from now on.

        Returns:
            What to raise where the error is only a consequence of another process's end.
        """
        return self.link.meet(step, error) if self.link else None

    def heard(self, tell: Listener) -> Listener:
        """A listener of the leader alone, whose trouble is raised where it is told ``Between``: there all can learn
        of it."""
        if not self.leads:
            return lambda event: None
        return _Deferred(tell) if self.link else tell


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


class _Deferred:
    def __init__(self, tell: Listener) -> None:
        self._tell = tell
        self._trouble: BaseException | None = None

    def __call__(self, event: Event) -> None:
        try:
            self._tell(event)
        except BaseException as trouble:  # an interrupt too
            self._trouble = self._trouble or trouble
        if self._trouble is not None and isinstance(event, Between):
            raise self._trouble


ALONE = Processes()


@contextmanager
def joined(asked: int = 0) -> Iterator[Processes]:
    """The processes that a launcher (torchrun, accelerate) started with this one; this one alone without a launcher.

    Args:
        asked: how many were asked for; 0: what the launcher's own command line says.

    Raises:
        RunError: the launcher started fewer than were asked for, or more than there are GPUs.
    """
    place = launched(asked)
    if place is None:
        yield ALONE
        return
    with Link(*place) as link:
        yield Processes(link.rank, link.count, link)
