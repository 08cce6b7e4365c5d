"""``export``: a whole model in another layout: ComfyUI's single files, or diffusers' folder."""

from __future__ import annotations

import argparse

from ..adapter.formats.command import add_export_arguments as add_arguments
from ..adapter.formats.command import export
from .answer import Answer, table

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> Answer:
    found = export(options)
    return Answer(found, table(found))
