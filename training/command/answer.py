"""What a subcommand gives, and the exit codes that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DONE = 0
FAILED = 1  # something outside of the settings: a model, pictures, a disk, a damaged file
WRONG = 2  # a configuration or the command line itself cannot be understood
WARNED = 3  # with --strict: understood, and something is missing on this machine
KILLED = 130  # interrupted twice, or while there was nothing to save yet


@dataclass(frozen=True)
class Answer:
    """``found`` is what ``--json`` prints, ``text`` is the same for people."""

    found: Mapping[str, Any]
    text: str
    code: int = DONE


def table(found: Mapping[str, Any]) -> str:
    """One line a value; lists as lines of their own."""
    width = max(map(len, found), default=0)
    lines = []
    for name, value in found.items():
        if isinstance(value, (list, tuple)) and any(isinstance(each, str) and len(each) > 30 for each in value):
            lines += [f"{name}:", *(f"  {each}" for each in value)]
        elif isinstance(value, Mapping):
            lines += [f"{name}:", *(f"  {key} = {each}" for key, each in value.items())]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            lines.append(f"{name:{width}}  {shown}")
    return "\n".join(lines)
