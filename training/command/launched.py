"""``launched``: one of the processes of a training that a node handed to accelerate; nothing for people."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from ..run.control import Control
from ..run.remote import Helpers, Spec, run_spec
from ..sample.validator import SampleValidator
from .answer import Answer
from .pipeline import VAE, Model, choose_device
from .terminal import obeying_signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", type=Path, help="the file that the node wrote")


def run(options: argparse.Namespace) -> Answer:
    """Train as the file says; events go to stdout, commands come from stdin."""
    control = Control()
    with obeying_signals(control, lambda text: print(text, file=sys.stderr, flush=True)):
        code = run_spec(options.spec, sys.stdin.buffer, sys.stdout, _helpers, choose_device(), control)
    sys.stdout.flush()
    return Answer({"rank": int(os.environ.get("RANK", "0"))}, "", code)


def _helpers(spec: Spec, device: torch.device) -> Helpers:
    vae = None if spec.vae is None else VAE(Model(spec.vae.parent, spec.model, spec.vae), device)
    validator = SampleValidator(
        spec.texts,
        spec.latents,
        lambda latents: (latents - spec.latent_shift) * spec.latent_scale,
        decode=vae.decode if vae else None,
        shift=spec.shift,
        last_step=spec.settings.steps,
    )
    return (vae.encode if vae else None), validator
