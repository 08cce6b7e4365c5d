"""``cache``: encode the pictures and captions of a configuration, without training."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cache.latents import LatentCache, cache_latents
from ..cache.store import Store
from ..cache.texts import TextCache, cache_texts
from ..config.checks import one_of
from ..data.dataset import Dataset, append, load_dataset
from ..data.prompts import SYSTEM_PROMPTS
from ..errors import DataError
from .answer import Answer
from .machine import of_datasets
from .pipeline import VAE, Model, TextEncoder, choose_device, find_model
from .plan import Plan, add_arguments, open_plan
from .terminal import InterruptedEarlyError, Terminal, obeying_signals

__all__ = ["INTERRUPTED", "Cached", "add_arguments", "fill", "read_datasets", "run"]


INTERRUPTED = Answer({"status": "interrupted"}, "Interrupted while encoding; the same command goes on from there.")


@dataclass(frozen=True)
class Cached:
    """The caches of a plan, and the VAE that filled one of them."""

    latents: LatentCache
    texts: TextCache
    vae: VAE


def run(options: argparse.Namespace) -> Answer:
    """Fill both caches; a signal ends that with what is encoded kept.

    Raises:
        Lumina2Error: the configuration, the model or the pictures cannot be used.
    """
    plan, terminal = open_plan(options), Terminal()
    for line in plan.report:
        terminal.say(line)
    if missing := [finding.text for finding in of_datasets(plan) if finding.fatal]:
        raise DataError(" ".join(missing))
    model = find_model(plan.config.places, plan.config.folders, download=True)
    try:
        with obeying_signals(terminal.control, terminal.say):
            cached = fill(plan, model, choose_device(options.device), terminal)
    except InterruptedEarlyError:
        return INTERRUPTED
    found = {
        "latents": cached.latents.count,
        "captions": cached.texts.count,
        "skipped": list(dict.fromkeys((*cached.latents.skipped, *cached.texts.skipped))),
        "cut": list(cached.texts.cut),
        "folders": sorted({str(part.store.folder) for part in cached.latents.parts} | {cached.texts.store.folder}),
    }
    return Answer(found, f"{found['latents']} latents and {found['captions']} captions are cached.")


def read_datasets(plan: Plan, terminal: Terminal) -> Dataset:
    """The pictures of all datasets together.

    Raises:
        DataError: a source cannot be read, or no picture is left.
    """
    found: Dataset | None = None
    for settings in plan.datasets:
        loaded = load_dataset(settings, plan.caches, terminal.counting(f"{settings.id}: reading picture"))
        for report in loaded.reports:
            for line in report.lines():
                terminal.say(line)
        found = append(found, loaded) if found else loaded
    assert found, "a plan has at least one dataset"
    return found


def fill(plan: Plan, model: Model, device: torch.device, terminal: Terminal) -> Cached:
    """Both caches, each part of the model let go before the next is loaded.

    Raises:
        InterruptedEarlyError: the terminal's control was asked to end.
    """
    dataset = read_datasets(plan, terminal)
    places, validation = plan.config.places, plan.config.config.validation
    one_of("system_prompt", places.system_prompt, tuple(SYSTEM_PROMPTS))
    vae = VAE(model, device)
    latents = cache_latents(
        dataset,
        vae.encode,
        vae.fingerprint,
        Store(str(plan.caches / "latents")),
        on_batch=terminal.counting("encoding picture"),
        shares_cores=device.type == "cpu",
    )
    vae.rest()
    encoder = TextEncoder(model, device)
    texts = cache_texts(
        dataset,
        lambda text: encoder.embed(text, places.tokenizer_max_length),
        encoder.fingerprint,
        SYSTEM_PROMPTS[places.system_prompt],
        places.tokenizer_max_length,
        Store(str(Path(plan.text_folder))),
        terminal.counting("encoding caption"),
        plan.text_cache.write_batch_size,
        validation,
        plan.config.config.slider,
    )
    for sentence in dict.fromkeys((*latents.skipped, *texts.skipped)):
        terminal.say(f"skipped: {sentence}")
    for caption in texts.cut[:3]:
        terminal.say(f"cut to {places.tokenizer_max_length} tokens: …{caption[-60:]}")
    terminal.say(f"{latents.count} latents, captions of {texts.count} pictures")
    return Cached(latents, texts, vae)
