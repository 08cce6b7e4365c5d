"""Things that are sent while a training goes on: one after the other by a thread, tried again where that may help."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class RefusedError(Exception):
    """The other side will not take it, however often it is tried; the message says why."""


def try_again(action: Callable[[], R], waits: Sequence[float], wait: Callable[[float], bool]) -> R:
    """The action's result; after a failure it is done again, once for each wait.

    Args:
        waits: seconds before each further try.
        wait: sleeps, and tells whether to go on.

    Raises:
        RefusedError: at once. Any other exception of the action: after the last try.
    """
    for seconds in waits:
        try:
            return action()
        except Exception as error:  # noqa: PERF203 - each try is one
            if isinstance(error, RefusedError) or not wait(seconds):
                raise
    return action()


class Courier(Generic[T]):
    """Delivers parcels in order on a thread of its own, which ends when there is none left.

    Args:
        deliver: sends one; what it raises is a failure, ``RefusedError`` one that is not tried again.
        failed: told of each parcel that was given up and why, on the courier's thread.
        most: parcels that wait at most; the oldest are given up for newer ones.
    """

    def __init__(
        self,
        name: str,
        deliver: Callable[[T], object],
        failed: Callable[[T, Exception], None],
        waits: Sequence[float],
        most: int = 1000,
    ) -> None:
        self.name, self.deliver, self.failed, self.waits, self.most = name, deliver, failed, waits, most
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._busy, self._closing = False, False

    def add(self, parcel: T) -> None:
        with self._changed:
            self._waiting.append(parcel)
            dropped = self._waiting.popleft() if len(self._waiting) > self.most else None
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._work, name=self.name, daemon=True).start()
        if dropped is not None:
            self.failed(dropped, TimeoutError("too many wait"))

    def wait(self, seconds: float) -> bool:
        """Until everything was delivered or given up; False where that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, seconds)

    def close(self, seconds: float) -> bool:
        """As ``wait``; what is not delivered then is given up without another try."""
        done = self.wait(seconds)
        with self._changed:
            self._closing = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for parcel in left:
            self.failed(parcel, TimeoutError("the time was over"))
        return done

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._busy = False
                    self._changed.notify_all()
                    return
                parcel = self._waiting.popleft()
            try:
                try_again(lambda parcel=parcel: self.deliver(parcel), self.waits, self._pause)  # type: ignore[misc]
            except Exception as error:
                self.failed(parcel, error)

    def _pause(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        with self._changed:
            while not self._closing and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            return not self._closing
