"""``convert``: a LoRA in another format, or several as one."""

from __future__ import annotations

import argparse

from ..adapter.formats.command import add_convert_arguments as add_arguments
from ..adapter.formats.command import convert
from .answer import Answer, table

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> Answer:
    found = convert(options)
    return Answer(found, table(found))
