"""What an input of a node can be beside what every core's constructor takes."""

from __future__ import annotations

from typing import TypeVar

AnyInput = TypeVar("AnyInput")


def advanced(widget: AnyInput) -> AnyInput:
    """A rare option: the page folds it away where it knows how; older pages show it like any other."""
    widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}  # type: ignore[attr-defined]
    return widget
