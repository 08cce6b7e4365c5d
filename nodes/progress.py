"""A node's progress bar and line of text; every call is also where the user's Cancel takes effect."""

from __future__ import annotations

import time
from collections.abc import Callable

import comfy.model_management
import comfy.utils

TEXT_EVERY_S = 0.3


def counting(progress: Progress, what: str) -> Callable[[int, int], None]:
    """Shows ``<what> 3 of 20`` and the time left, for work that tells (done, total)."""
    began = time.monotonic()

    def show(done: int, total: int) -> None:
        left = f", {duration((time.monotonic() - began) / done * (total - done))} left" if 0 < done < total else ""
        progress.step(done, f"{what} {done} of {total}{left}", total)

    return show


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Progress:
    """Progress of one execution of one node."""

    def __init__(self, node_id: str | None, total: int = 1) -> None:
        self.node_id, self.total = node_id, max(total, 1)
        self._bar = comfy.utils.ProgressBar(self.total, node_id)
        self._said_at = 0.0

    def say(self, text: str) -> None:
        """Show a line on the node.

        Raises:
            InterruptProcessingException: the user pressed Cancel.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._said_at = time.monotonic()
        if self.node_id is None:
            return
        from server import PromptServer

        if getattr(PromptServer, "instance", None):
            PromptServer.instance.send_progress_text(text, self.node_id)

    def step(self, done: int, text: str, total: int | None = None) -> None:
        """Move the bar, and show the text if the last one is old enough. Raises like ``say``."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(done, max(total, 1) if total is not None else None)
        if time.monotonic() - self._said_at >= TEXT_EVERY_S:
            self.say(text)
