"""``train``: what the train nodes do, from a configuration: cache, train, validate, save.

Under ``accelerate launch`` or ``torchrun`` the processes that they start train one run together.
"""

from __future__ import annotations

import argparse
import math
import os
from contextlib import suppress
from pathlib import Path

import torch

from ..cache.facts import dataset_facts
from ..config.databackend.write import write_databackend
from ..config.settings import TrainSettings
from ..config.simpletuner.write import LYCORIS_NAME, write_config
from ..errors import SettingError
from ..files import write_json
from ..report.login import check_logins
from ..report.reporters import reporters
from ..report.story import About
from ..run.batches import Batches
from ..run.events import Event, Started, to_all
from ..run.folder import RunStore
from ..run.processes import Processes, joined
from ..run.session import Outcome, Request, train_lora
from ..sample.validator import SampleValidator
from .answer import Answer
from .cache import INTERRUPTED, Cached, fill
from .machine import look_around
from .pipeline import Model, choose_device, find_model, open_transformer
from .plan import Plan, add_arguments, open_plan, run_store
from .terminal import InterruptedEarlyError, RunLines, Terminal, obeying_signals

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> Answer:
    """Train, go on with a training, or tell what was trained before.

    Raises:
        Lumina2Error: it cannot start, or has ended early; what was trained is kept.
    """
    plan = open_plan(options)
    with joined() as processes, open(os.devnull, "w") as nowhere:
        return _run(plan, options.device, processes, Terminal(None if processes.leads else nowhere))


def _run(plan: Plan, device_name: str, processes: Processes, terminal: Terminal) -> Answer:
    device = processes.device if processes.link else choose_device(device_name)
    for line in plan.report:
        terminal.say(line)
    findings = look_around(plan, device, download=True)
    for finding in findings:
        terminal.say(finding.text)
    if any(finding.fatal for finding in findings):
        raise SettingError("It cannot start so: " + " ".join(each.text for each in findings if each.fatal))
    check_logins(plan.config.config.report)
    model = find_model(plan.config.places, plan.config.folders, download=True)
    store = run_store(plan.output)
    with obeying_signals(terminal.control, terminal.say):
        cached = _cached(plan, model, device, terminal, processes)
        if cached is None:
            return INTERRUPTED if processes.leads else Answer({}, "")
        outcome = _train(plan, model, cached, device, store, terminal, processes)
    if not processes.leads:
        return Answer({}, "")
    trained = outcome.run
    full = plan.config.settings().full_fine_tune
    found = {
        "run": trained.folder,
        "folder": str(store.path(trained)),
        "status": trained.status,
        "step": trained.step,
        "loss": outcome.losses[-1] if outcome.losses else None,
        "file": str(store.file(trained.folder, full)),
        "message": outcome.message,
    }
    return Answer(found, f"{trained.folder}: {trained.status} at step {trained.step}. {found['file']}")


def _cached(plan: Plan, model: Model, device: torch.device, terminal: Terminal, processes: Processes) -> Cached | None:
    """Both caches, filled by the leader and then read by the others; None, for all, where one was asked to end."""

    def filled() -> Cached | None:
        with suppress(InterruptedEarlyError):
            return fill(plan, model, device, terminal)
        return None

    def all_have(cached: object) -> bool:
        return not processes.share([] if cached else ["interrupted"])

    cached = processes.lead(filled)
    if not all_have(cached or not processes.leads):
        return None
    cached = cached or filled()
    return cached if all_have(cached) else None


def _train(
    plan: Plan,
    model: Model,
    cached: Cached,
    device: torch.device,
    store: RunStore,
    terminal: Terminal,
    processes: Processes,
) -> Outcome:
    settings = _settings(plan, model, cached, processes)
    told = plan.config.config
    validator = SampleValidator(
        cached.texts,
        cached.latents,
        model.scale_latents,
        decode=cached.vae.decode,
        shift=model.shift,
        last_step=settings.steps,
    )
    terminal.say(f"loading the transformer onto {device}")
    transformer = open_transformer(model, device)
    facts = dataset_facts(cached.latents)
    about = About(base_model=model.hub_id, trigger=", ".join(cached.texts.triggers), datasets=facts)
    return train_lora(
        transformer,
        cached.latents,
        cached.texts,
        settings,
        _request(plan, store),
        store,
        model.scale_latents,
        to_all(
            [
                RunLines(terminal, settings.steps),
                _ConfigKeeper(plan, store),
                reporters(told.report, store, terminal.say, about),
            ]
        ),
        control=terminal.control,
        encode=cached.vae.encode,
        validator=validator,
        processes=processes,
    )


def _settings(plan: Plan, model: Model, cached: Cached, processes: Processes) -> TrainSettings:
    """With the steps that so many epochs of these pictures have."""
    if not plan.config.epochs:
        return plan.config.settings()
    settings, vae = plan.config.settings(), cached.vae
    with Batches(cached.latents, cached.texts, settings, model.scale_latents, vae.encode, processes) as batches:
        steps = math.ceil(plan.config.epochs * batches.epoch_steps)
    return plan.config.settings(steps)


def _request(plan: Plan, store: RunStore) -> Request:
    """Which run is meant, and where it starts."""
    places = plan.config.places
    name = places.run_name or (plan.file.absolute().parent.name if plan.file else "lumina2")
    resume = places.resume_from_checkpoint
    if resume in ("latest", ""):
        return Request(name)
    path = Path(resume)
    if path.is_absolute() and path.is_relative_to(store.root):
        path = path.relative_to(store.root)
    return Request(name, "from checkpoint", str(Path(name) / path if len(path.parts) == 1 else path))


class _ConfigKeeper:
    """A listener that keeps the configuration in the run's folder, as SimpleTuner and this command line read it."""

    def __init__(self, plan: Plan, store: RunStore) -> None:
        self.plan, self.store = plan, store

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            folder = self.store.path(event.run)
            written = write_config(self.plan.config)
            datasets = write_databackend(self.plan.backends)
            write_json(folder / "config.json", {**written.config, "data_backend_config": "multidatabackend.json"})
            write_json(folder / "multidatabackend.json", datasets)
            if written.lycoris is not None:
                write_json(folder / LYCORIS_NAME, written.lycoris)
