"""``check``: whether a configuration or a dataset file is understood, and what this machine lacks for it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config.databackend.read import read_databackend
from ..config.json_text import plain_json
from .answer import DONE, WARNED, Answer
from .machine import look_around
from .pipeline import choose_device
from .plan import add_arguments as add_plan_arguments
from .plan import open_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, nargs="?", help="a config.json or a multidatabackend.json")
    add_plan_arguments(parser)
    parser.add_argument("--strict", action="store_true", help="exit with 3 where something is missing")


def run(options: argparse.Namespace) -> Answer:
    """Read everything, look around, and start nothing.

    Raises:
        SettingError: a file is not understood.
    """
    if options.file and holds_datasets(options.file):
        return _of_datasets(options.file, options.strict)
    options.config = options.file or options.config
    plan = open_plan(options)
    findings = look_around(plan, choose_device(options.device))
    found = {
        "config": str(plan.file) if plan.file else None,
        "datasets": [each.id for each in plan.datasets],
        "report": list(plan.report),
        "missing": [each.text for each in findings],
    }
    text = [*plan.report, *(f"Missing: {each.text}" for each in findings)]
    text.append("It is understood." + ("" if findings else " Nothing is missing here."))
    return Answer(found, "\n".join(text), WARNED if options.strict and findings else DONE)


def holds_datasets(path: Path) -> bool:
    """Whether a file is a ``multidatabackend.json``: a list."""
    try:
        return plain_json(path.read_text(encoding="utf-8-sig")).lstrip().startswith("[")
    except (OSError, UnicodeDecodeError):
        return False  # said by whoever reads it as a configuration


def _of_datasets(path: Path, strict: bool) -> Answer:
    backends = read_databackend(path)
    missing = [
        f'Dataset "{each.id}": instance_data_dir {each.source.instance_data_dir} is no folder here.'
        for each in backends.datasets
        if each.source.type == "local" and not Path(each.source.instance_data_dir).is_dir()
    ]
    found = {"datasets": [each.id for each in backends.datasets], "report": list(backends.notes), "missing": missing}
    text = [*backends.notes, *(f"Missing: {each}" for each in missing), "It is understood."]
    return Answer(found, "\n".join(text), WARNED if strict and missing else DONE)
