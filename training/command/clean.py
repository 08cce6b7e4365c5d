"""``clean``: remove what no dataset refers to from a cache folder."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ..cache.garbage import GRACE_HOURS, collect_garbage
from .answer import Answer, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="output/lumina2/.cache/latents or …/text")
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be removed")
    parser.add_argument("--grace-hours", type=float, default=GRACE_HOURS, help="what is newer stays")


def run(options: argparse.Namespace) -> Answer:
    found = asdict(collect_garbage(options.folder, options.grace_hours, options.dry_run))
    return Answer(found, table(found))
