"""How processes of one run reach each other: torch.distributed, and the watch that each keeps on the others.

Gradients travel where the weights are (nccl between GPUs, gloo between CPUs). All else is words, which travel by gloo
in the CPU's memory, so that no step waits for the device.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from types import TracebackType
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import Lumina2Error, RunError

PATIENCE = timedelta(days=30)  # others wait while the leader draws samples; who ends is noticed by the watch
MEETING_S = 5  # after an error: who does not come by then is not at the same place
END_S = 8  # after another process ended: this one ends by then, whatever it is at
SAVING_S = 60  # the same, once it knows and keeps what there is
NOTICED_S = 1  # between the error of a connection and the watch's word of whose it was


class Place(NamedTuple):
    """This process among those that a launcher started."""

    rank: int
    of: int
    device: torch.device


def launched(asked: int = 0) -> Place | None:
    """What a launcher told this process; None where it is alone.

    Raises:
        RunError: the launcher started fewer than were asked for, or more than there are GPUs.
    """
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    asked = asked or _asked_of_launcher()
    if count < asked:
        raise RunError(
            f"{asked} processes were asked for and the launcher started {count}. Without GPUs `accelerate launch` "
            f"starts one: use `torchrun --nproc_per_node {asked}` there, or ask for one process."
        )
    if count == 1:
        return None
    if not torch.cuda.is_available():
        return Place(int(os.environ["RANK"]), count, torch.device("cpu"))
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", count)), torch.cuda.device_count()
    if here > gpus:
        raise RunError(f"{here} processes were started on a computer with {gpus} GPUs. Start one for each GPU.")
    return Place(int(os.environ["RANK"]), count, torch.device("cuda", local))


def _asked_of_launcher() -> int:
    """The number of processes in the command line of the launcher that this process was started by; 0: it says none."""
    import psutil  # type: ignore[import-untyped]

    try:
        words = [word for parent in psutil.Process().parents()[:3] for word in parent.cmdline()]
    except psutil.Error:
        return 0
    if not any("accelerate" in word or "torchrun" in word for word in words):
        return 0
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, _, value = word.partition("=")
        if option in ("--num_processes", "--num-processes") and (value or following).isdigit():
            return int(value or following)
    return 0


class Link:
    """The connections of one process to the others, for as long as the block lasts.

    Attributes:
        parted: something went wrong and the others are elsewhere, so that nothing is done together any more.
    """

    def __init__(self, rank: int, count: int, device: torch.device) -> None:
        self.rank, self.count, self.device = rank, count, device
        self.parted = False
        self._words: Any = None
        self._after: Any = None
        self._watched: Any = None
        self._lost = -1  # the rank of a process that ended
        self._noticed = threading.Event()
        self._leaving = False

    def __enter__(self) -> Link:
        import torch.distributed as dist

        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            timeout=PATIENCE,
            device_id=self.device if self.device.type == "cuda" else None,
        )
        self._words, self._after, self._watched = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(3))
        watched = range(1, self.count) if self.rank == 0 else (0,)
        self._watches = [
            threading.Thread(target=self._watch, args=(other,), name=f"watch {other}", daemon=True) for other in watched
        ]
        for watch in self._watches:
            watch.start()
        self.exchange("")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say good-bye; where that cannot be, see to it that this process ends."""
        import torch.distributed as dist

        if kind is not None and not self.parted and not isinstance(error, SystemExit):
            self.meet(-1, error or RunError(""))
        self._leaving = True
        if self.parted:
            _end_within(END_S)
            return
        for watch in self._watches:
            dist.send(torch.ones(1, dtype=torch.uint8), int(watch.name.split()[1]), group=self._watched)
        for watch in self._watches:
            watch.join(END_S)
        dist.destroy_process_group()

    # --- together

    def total(self, values: Tensor) -> Tensor:
        """The sum of every process's ``values``, in place."""
        import torch.distributed as dist

        with self._explained():
            dist.all_reduce(values)
        return values

    def exchange(self, text: str) -> list[str]:
        """What each process says, in the order of ranks; nothing, and quickly, where nobody says anything."""
        import torch.distributed as dist

        said = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        lengths = torch.zeros(self.count, dtype=torch.int64)
        lengths[self.rank] = len(text.encode())
        with self._explained():
            dist.all_reduce(lengths, group=self._words)
            if not lengths.any():
                return []
            own = torch.zeros(int(lengths.max()), dtype=torch.uint8)
            own[: int(lengths[self.rank])] = said[: int(lengths[self.rank])]
            every = [torch.empty_like(own) for _ in range(self.count)]
            dist.all_gather(every, own, group=self._words)
        told = zip(every, lengths.tolist(), strict=True)
        return [each[:length].numpy().tobytes().decode() for each, length in told if length]

    def gather(self, part: Tensor) -> list[Tensor]:
        """Every process's ``part``, of one shape and dtype, in the leader; nothing in the others."""
        import torch.distributed as dist

        own = part.detach().cpu().contiguous().view(-1).view(torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self.count)] if self.rank == 0 else None
        with self._explained():
            dist.gather(own, parts, group=self._words)
        return [each.view(part.dtype).view(part.shape) for each in parts or []]

    # --- trouble

    def check_alive(self) -> None:
        if self._noticed.is_set():
            raise RunError(self._sentence())

    def meet(self, step: int, error: BaseException) -> RunError | None:
        """As ``Processes.meet``. Whoever waits in vain for the others parts from them, and is ended after a while."""
        import torch.distributed as dist

        if isinstance(error, RuntimeError) and not isinstance(error, Lumina2Error):
            self._noticed.wait(NOTICED_S)  # a connection's own error names nobody
        if self._noticed.is_set():
            self.parted = True
            _end_within(SAVING_S)
            return None if isinstance(error, (KeyboardInterrupt, Lumina2Error)) else RunError(self._sentence())
        if self.parted:
            return None
        steps = torch.zeros(self.count, dtype=torch.int64)
        steps[self.rank] = step
        try:
            meeting: Any = dist.all_reduce(steps, group=self._after, async_op=True)
            meeting.wait(timedelta(seconds=MEETING_S))
            self.parted = bool((steps != step).any())
            self._words = self._after  # where nobody is left waiting for an answer
        except RuntimeError:
            self.parted = True
        return None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._noticed.wait(NOTICED_S)
            raise RunError(self._sentence()) from error

    def _sentence(self) -> str:
        who = f"Process {self._lost}" if self._lost >= 0 else "A process"
        return (
            f"{who} of the {self.count} that train together has ended or cannot be reached; what it printed says why. "
            "Start the training again: it goes on from its last checkpoint."
        )

    def _watch(self, other: int) -> None:
        """Waits for the other's good-bye; a process that ends, however it does, closes its connections."""
        import torch.distributed as dist

        try:
            dist.recv(torch.zeros(1, dtype=torch.uint8), other, group=self._watched)
        except RuntimeError:
            if self._leaving or self._noticed.is_set():
                return
            self._lost = other
            _end_within(END_S)
            self._noticed.set()
            print(self._sentence(), file=sys.stderr, flush=True)


def _end_within(seconds: float) -> None:
    """End this process hard when the time is over, even where it waits inside of a library for one that is gone."""
    import faulthandler

    faulthandler.dump_traceback_later(seconds, exit=True, file=_nowhere())


@cache
def _nowhere() -> IO[str]:
    return open(os.devnull, "w")
