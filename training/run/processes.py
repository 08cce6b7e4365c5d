"""The processes that train one run together; one by itself is the usual case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this one writes files, draws samples and takes commands."""
        return self.rank == 0

    def batch_numbers(self, step: int, accumulated: int) -> range:
        """The batches of an optimiser step that fall to this process: each ``count``-th of them.

        All of them together are ``count · accumulated`` batches, so the step is the same one for any number of
        processes as long as that product is.
        """
        first = step * accumulated * self.count
        return range(first + self.rank, first + accumulated * self.count, self.count)

    def average(self, weights: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Make every process's gradients their mean, in place.

        Returns:
            The mean of the losses, 0-dimensional.
        """
        return loss


ALONE = Processes()
