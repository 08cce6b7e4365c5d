"""Which samples make up which batch: a pure function of the seed and the batch's number.

Batches are numbered from 0 over the whole run. A process takes the numbers that fall to it, so the batches are the
same ones for any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import DataError

WEIGHTINGS = ("auto-weighting", "uniform")


class Draw(NamedTuple):
    """What a batch is made of."""

    part: int  # the dataset
    rows: np.ndarray  # (B,) rows of that dataset
    round: int  # how often that dataset was gone through before: its own epochs, from 0


@dataclass(frozen=True)
class Pool:
    """What is drawn from one dataset."""

    buckets: np.ndarray  # (N,) whole numbers; samples of a bucket have latents of one shape
    repeats: np.ndarray  # (N,) extra passes in an epoch
    probability: float = 1.0
    start_epoch: int = 1
    end_epoch: int = 0  # the last one; 0: never ends
    start_step: int = 0
    end_step: int = 0  # the first batch without it; 0: never ends

    def is_open(self, epoch: int, number: int) -> bool:
        """Whether it is drawn from in that epoch and at that batch."""
        in_epoch = self.start_epoch <= epoch and (not self.end_epoch or epoch <= self.end_epoch)
        in_step = self.start_step <= number and (not self.end_step or number < self.end_step)
        return in_epoch and in_step and self.probability > 0


class _Stretch(NamedTuple):
    """Batches of one epoch between which no dataset opens or closes."""

    first: int  # number of its first batch
    length: int
    epoch: int  # from 1
    ordinal: int  # the how-manieth of its epoch
    taken: list[int]  # batches of each dataset before it, since the run began
    left: list[int]  # batches of each dataset for the rest of the epoch


class Sampler:
    """Batches of one bucket of one dataset, without replacement; an epoch sees each sample ``repeats + 1`` times.

    In an epoch each dataset gives all its batches; which comes next is drawn by the datasets' weights among those
    that have some left. Within a dataset the buckets take turns at random, each going through its samples in one random
    order: where there is one bucket, a batch of four is two batches of two. The last batch of a bucket is filled from
    the bucket's own beginning.

    Args:
        weighting: ``auto-weighting`` multiplies each probability with the dataset's size, ``uniform`` does not.
        prune: leave out buckets that have fewer samples, repeats counted, than a batch.

    Raises:
        DataError: there is nothing to draw.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        batch_size: int,
        seed: int,
        weighting: str = "auto-weighting",
        prune: bool = False,
    ) -> None:
        self.batch_size, self.seed = batch_size, seed
        self._pools = tuple(pools)
        self._groups = [_groups(pool) for pool in pools]
        self.pruned = 0  # samples left out
        if prune:
            short = [g for groups in self._groups for g in groups if len(g) < batch_size]
            self.pruned = sum(len(np.unique(group)) for group in short)
            self._groups = [[g for g in groups if len(g) >= batch_size] for groups in self._groups]
        self._sizes = [sum(-(-len(group) // batch_size) for group in groups) for groups in self._groups]
        if not sum(self._sizes):
            pruned = (
                f"every bucket has fewer than {batch_size} pictures. Lower the batch size, or set "
                "disable_bucket_pruning."
            )
            raise DataError("There is nothing to train on: " + (pruned if self.pruned else "the dataset is empty."))
        counts = [len(pool.buckets) if weighting == "auto-weighting" else 1 for pool in pools]
        self._weights = [pool.probability * count for pool, count in zip(pools, counts, strict=True)]
        self.steps_per_epoch = sum(self._sizes)
        self._step_gates = sorted({g for p in pools for g in (p.start_step, p.end_step) if g})
        self._epoch_gates = sorted({g for p in pools for g in (p.start_epoch, p.end_epoch + 1) if g > 1})
        self._stretch: _Stretch | None = None
        self._order: tuple[np.ndarray, np.ndarray] = (np.empty(0), np.empty(0))
        self._rounds: dict[int, tuple[int, np.ndarray]] = {}

    def batch(self, number: int) -> Draw:
        """What batch ``number`` is made of; any number at any time, and quickest in order.

        Raises:
            DataError: no dataset is drawn from at that time.
        """
        stretch = self._at(number)
        part = int(self._order[0][number - stretch.first])
        taken = stretch.taken[part] + int(self._order[1][number - stretch.first])
        round_, place = divmod(taken, self._sizes[part])
        if self._rounds.get(part, (-1,))[0] != round_:
            self._rounds[part] = (round_, self._draw_round(part, round_))
        return Draw(part, self._rounds[part][1][place], round_)

    def epoch(self, number: int) -> int:
        """The epoch of a batch, from 1."""
        return self._at(number).epoch

    def _at(self, number: int) -> _Stretch:
        stretch = self._stretch
        if stretch is None or not 0 <= number - stretch.first < stretch.length:
            stretch = self._stretch = self._find(number)
            self._order = self._draw_order(stretch.epoch, stretch.ordinal, stretch.left)
        return stretch

    def _find(self, number: int) -> _Stretch:
        """The stretch of a batch, from the run's beginning on; whole epochs that are alike are skipped at once."""
        first, epoch, ordinal = 0, 1, 0
        taken, used = [0] * len(self._pools), [0] * len(self._pools)  # batches since the run, and the epoch, began
        while True:
            gate = next((g for g in self._step_gates if g > first), None)
            left = [
                size - gone if pool.is_open(epoch, first) else 0
                for pool, size, gone in zip(self._pools, self._sizes, used, strict=True)
            ]
            length = sum(left)
            if not length and not any(used):
                epoch = self._next_epoch(epoch, first)
                continue
            cut = min(length, gate - first) if gate else length
            if number < first + cut:
                return _Stretch(first, cut, epoch, ordinal, taken, left)
            alike = 0
            if cut == length and not any(used):
                ends = [number - first, gate - first if gate else number]
                later = next((e - epoch for e in self._epoch_gates if e > epoch), number)
                alike = min(later, *(end // length for end in ends))
            if alike > 1:
                first, epoch = first + alike * length, epoch + alike
                taken = [a + alike * b for a, b in zip(taken, left, strict=True)]
                continue
            drawn = left
            if cut < length:
                parts = self._draw_order(epoch, ordinal, left)[0][:cut]
                drawn = np.bincount(parts, minlength=len(left)).tolist()
            first, ordinal = first + cut, ordinal + 1
            taken = [a + b for a, b in zip(taken, drawn, strict=True)]
            used = [a + b for a, b in zip(used, drawn, strict=True)]
            if cut == length:
                epoch, ordinal, used = epoch + 1, 0, [0] * len(self._pools)

    def _next_epoch(self, epoch: int, number: int) -> int:
        """The next epoch in which a dataset opens, where none is open: an epoch without batches takes no time."""
        for later in self._epoch_gates:
            if later > epoch and any(pool.is_open(later, number) for pool in self._pools):
                return later
        raise DataError(
            f"No dataset is drawn from at step {number} (epoch {epoch}): each has probability 0, has ended or has not "
            "begun. Change start_step, end_step, start_epoch, end_epoch or probability of one."
        )

    def _draw_order(self, epoch: int, ordinal: int, left: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Which dataset each batch of a stretch is of, and the how-manieth of that dataset in the stretch.

        The batches of a dataset come at the times of a Poisson process of its weight: between several datasets that
        is one weighted draw after the other among those that have batches left.
        """
        random = np.random.default_rng([self.seed, epoch, ordinal])
        parts = np.repeat(np.arange(len(left)), left)
        places = np.concatenate([np.arange(count) for count in left])
        if sum(count > 0 for count in left) == 1:
            return parts, places
        times = [
            random.exponential(size=count).cumsum() / weight if count else np.empty(0)
            for count, weight in zip(left, self._weights, strict=True)
        ]
        order = np.argsort(np.concatenate(times), kind="stable")
        return parts[order], places[order]

    def _draw_round(self, part: int, round_: int) -> np.ndarray:
        """(batches, B): all batches of one round through a dataset, in the order they are given out."""
        batches = []
        for number, group in enumerate(self._groups[part]):
            order = np.random.default_rng([self.seed, part, round_, number + 1]).permutation(group)
            batches.append(np.resize(order, (-(-len(group) // self.batch_size), self.batch_size)))
        buckets = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
        turns = np.random.default_rng([self.seed, part, round_, 0]).permutation(buckets)
        drawn = np.empty((len(turns), self.batch_size), np.int32)
        drawn[np.argsort(turns, kind="stable")] = np.concatenate(batches)
        return drawn


def _groups(pool: Pool) -> list[np.ndarray]:
    """The rows of each bucket, each as often as it is passed in an epoch."""
    rows = np.repeat(np.arange(len(pool.buckets), dtype=np.int32), pool.repeats + 1)
    buckets = pool.buckets[rows]
    order = np.argsort(buckets, kind="stable")
    ends = np.flatnonzero(np.diff(buckets[order])) + 1
    return [group for group in np.split(rows[order], ends) if len(group)]
