"""Which samples make up which batch: a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from ..errors import DataError


class Sampler:
    """Batches of one bucket each, drawn without replacement; an epoch sees each sample ``repeats + 1`` times.

    The last batch of a bucket is filled from the bucket's own beginning, so all batches have the same size.
    Nothing is kept between calls, so that any step can be asked for at any time.

    Args:
        buckets: the bucket of each sample; samples of a bucket have latents of one shape.
        repeats: extra passes of each sample in an epoch.

    Raises:
        DataError: there are no samples.
    """

    def __init__(self, buckets: Sequence[Hashable], repeats: Sequence[int], batch_size: int, seed: int) -> None:
        if not buckets:
            raise DataError("There is nothing to train on: the dataset is empty.")
        groups: dict[Hashable, list[int]] = {}
        for index, (bucket, extra) in enumerate(zip(buckets, repeats, strict=True)):
            groups.setdefault(bucket, []).extend([index] * (extra + 1))
        self.batch_size, self.seed = batch_size, seed
        self._groups = [np.array(group) for group in groups.values()]
        self.steps_per_epoch = sum(-(-len(group) // batch_size) for group in self._groups)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))

    def batch(self, step: int) -> list[int]:
        """Indices of the samples of step ``step`` (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._draw(epoch))
        return self._epoch[1][place].tolist()

    def _draw(self, epoch: int) -> np.ndarray:
        batches = []
        for number, group in enumerate(self._groups):
            order = np.random.default_rng([self.seed, epoch, number + 1]).permutation(group)
            rows = -(-len(group) // self.batch_size)
            batches.append(np.resize(order, (rows, self.batch_size)))
        stacked = np.concatenate(batches)
        return stacked[np.random.default_rng([self.seed, epoch, 0]).permutation(len(stacked))]
