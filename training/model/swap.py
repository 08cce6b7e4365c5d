"""Blocks whose frozen weights wait in the CPU's memory, and are on the device only while they are used.

Two sets of the device's memory are enough: while one block computes, the weights of the next, or of the one before in
the backward pass, are on their way into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .linear import Linear

SLOTS = 2  # blocks whose weights are on the device at a time


class Copies:
    """Copies to a device that wait for nothing but each other; ``CudaCopies`` go on while the device computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor in the CPU's memory."""
        return tensor.cpu()

    def room(self, like: Tensor) -> Tensor:
        """Memory of the device for a tensor."""
        return torch.empty_like(like, device=self.device)

    def fill(self, slot: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to copy into a slot: pairs of (room, what was kept)."""
        for room, kept in pairs:
            room.copy_(kept)

    def use(self, slot: int) -> None:
        """What the device computes from now on finds the slot filled."""

    def leave(self, slot: int) -> None:
        """Nothing uses what is in the slot any more, beyond what the device was told to compute so far."""


class CudaCopies(Copies):
    """Copies from pinned memory on a stream of their own.

    Args:
        cuda: where streams and events come from.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        super().__init__(device)
        self.cuda = cuda
        self._stream = cuda.Stream(device)
        self._filled = [cuda.Event() for _ in range(SLOTS)]
        self._left = [cuda.Event() for _ in range(SLOTS)]

    def keep(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

    def fill(self, slot: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._stream.wait_event(self._left[slot])
        with self.cuda.stream(self._stream):
            for room, kept in pairs:
                room.copy_(kept, non_blocking=True)
            self._filled[slot].record(self._stream)

    def use(self, slot: int) -> None:
        self.cuda.current_stream(self.device).wait_event(self._filled[slot])

    def leave(self, slot: int) -> None:
        self._left[slot].record(self.cuda.current_stream(self.device))


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands in a module, and what it is while it waits."""

    holder: Linear
    name: str
    kept: Tensor

    def put(self, tensor: Tensor) -> None:
        own = self.holder._parameters.get(self.name)
        if own is None:
            self.holder._buffers[self.name] = tensor
        else:
            own.data = tensor  # autograd has kept the parameter itself, and finds there what it needs


class BlockSwap:
    """Takes the frozen linear layers of some blocks off a device, and brings those of each back when its turn comes.

    Reading a weight outside of that, as for an export, brings its block, too.

    Args:
        blocks: alike, in the order in which they run.
    """

    def __init__(self, blocks: Sequence[nn.Module], copies: Copies) -> None:
        self._copies = copies
        self._number = {block: number for number, block in enumerate(blocks)}
        self._places: list[list[_Place]] = []
        self._inside: list[int | None] = [None] * SLOTS  # the block in each slot
        self._ready: int | None = None  # the one whose weights stand in their places
        self._rooms: list[list[Tensor]] = []
        for number, block in enumerate(blocks):
            self._places.append([_Place(module, name, copies.keep(tensor)) for module, name, tensor in _frozen(block)])
            if len(self._rooms) < SLOTS:
                self._rooms.append([copies.room(place.kept) for place in self._places[-1]])
            for place in self._places[-1]:
                place.put(place.kept)
                place.holder.read = partial(self._read, number, place.holder)  # type: ignore[method-assign]

    def enter(self, block: nn.Module) -> None:
        """Before a block's forward pass; blocks that are not swapped are let pass."""
        number = self._number.get(block)
        if number is not None:
            self._bring(number, number + 1)

    def leave(self, block: nn.Module, out: Tensor) -> None:
        """After it: its weights come back before its backward pass."""
        number = self._number.get(block)
        if number is not None and out.requires_grad:
            out.register_hook(lambda _: self._bring(number, number - 1))

    def _bring(self, number: int, after: int) -> None:
        """Have a block's weights on the device, and those of the one that runs after it on their way."""
        after = after if 0 <= after < len(self._places) else number
        if self._ready is not None and self._ready != number:
            for place in self._places[self._ready]:
                place.put(place.kept)
            self._ready = None
        for slot, other in enumerate(self._inside):
            if other is not None and other not in (number, after):
                self._copies.leave(slot)
                self._inside[slot] = None
        for wanted in (number, after):
            if wanted not in self._inside:
                slot = self._inside.index(None)
                self._inside[slot] = wanted
                pairs = [
                    (room, place.kept) for room, place in zip(self._rooms[slot], self._places[wanted], strict=True)
                ]
                self._copies.fill(slot, pairs)
        if self._ready != number:
            slot = self._inside.index(number)
            self._copies.use(slot)
            for room, place in zip(self._rooms[slot], self._places[number], strict=True):
                place.put(room)
            self._ready = number

    def _read(self, number: int, layer: Linear, dtype: torch.dtype) -> Tensor:
        if self._ready != number:
            self._bring(number, number + 1)
        return type(layer).read(layer, dtype)


def _frozen(block: nn.Module) -> list[tuple[Linear, str, Tensor]]:
    """What is swapped: weights, biases and scales of the linear layers that are not trained."""
    found: list[tuple[Linear, str, Tensor]] = []
    for module in block.modules():
        if isinstance(module, Linear):
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            found += [(module, name, tensor.detach()) for name, tensor in own if not tensor.requires_grad]
    return found
