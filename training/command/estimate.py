"""``estimate``: how much memory a training will need, part by part, and which switch would save how much."""

from __future__ import annotations

import argparse

from ..run import estimate as forecasting
from .answer import Answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    forecasting.add_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    found = forecasting.estimate(options)
    return Answer(found, forecasting.lines(found))
