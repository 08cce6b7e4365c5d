"""What is known of a run while it goes on: what its card, its page and its messages are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..cache.facts import DatasetFacts, dataset_facts
from ..cache.latents import LatentCache
from ..cache.texts import TextCache
from ..files import read_json, write_json
from ..run.events import Event, StepDone, read_events, written
from ..run.folder import Run

LEFT_OUT = 50  # sentences that are kept
MEMORY = "report.json"  # in the run's folder: what reporting itself has to remember


@dataclass(frozen=True)
class About:
    """What a run's own files do not tell, for the card. It is kept in the run's folder."""

    base_model: str = ""  # a hub id; empty: not known
    licence: str = ""  # as the hub names it; empty: that of Lumina-Image-2.0 where it is the base, else none
    trigger: str = ""  # a word or sentence that calls up what was learnt
    datasets: tuple[DatasetFacts, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)  # steps, guidance, negative_prompt, … of the samples
    left_out: tuple[str, ...] = ()  # a sentence for each of the first pictures and captions that are not trained on
    cut: tuple[str, ...] = ()  # the first captions that were longer than the text encoder was let read

    @classmethod
    def read(cls, folder: Path) -> About:
        kept = remembered(folder).get("about", {})
        datasets = tuple(DatasetFacts(**{**each, "sizes": tuple(each["sizes"])}) for each in kept.pop("datasets", ()))
        left_out, cut = (tuple(kept.pop(name, ())) for name in ("left_out", "cut"))
        return cls(**kept, datasets=datasets, left_out=left_out, cut=cut)

    def keep(self, folder: Path) -> None:
        remember(folder, about=asdict(self))


def remembered(folder: Path) -> dict[str, Any]:
    try:
        found = read_json(folder / MEMORY)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remember(folder: Path, **values: Any) -> None:
    write_json(folder / MEMORY, {**remembered(folder), **values})


def about_run(latents: LatentCache, texts: TextCache, base_model: str = "") -> About:
    """What a card can be told of the data and of how samples are drawn.

    Args:
        base_model: a hub id, where it is known.
    """
    validation = texts.validation
    chosen = validation.settings if validation else None
    sampling: dict[str, Any] = {}
    if validation and chosen:
        sampling = {
            "steps": chosen.validation_num_inference_steps,
            "guidance": chosen.validation_guidance,
            "negative_prompt": chosen.validation_negative_prompt,
            "system_prompt": validation.system_prompt,
        }
    left_out = tuple(dict.fromkeys((*latents.skipped, *texts.skipped)))[:LEFT_OUT]
    return About(
        base_model,
        trigger=", ".join(texts.triggers),
        datasets=dataset_facts(latents),
        sampling=sampling,
        left_out=left_out,
        cut=texts.cut,
    )


class Story:
    """A run's events, gathered: the newest run record, the samples, the held-out losses, how it ended."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run = replace(run, settings=json.loads(json.dumps(run.settings)))  # as run.json has them
        self.folder = folder
        self.step = run.step
        self.validations: list[dict[str, Any]] = []  # as written into events.jsonl, in order
        self.evaluations: list[dict[str, Any]] = []
        self.status, self.message = run.status, ""

    @classmethod
    def read(cls, run: Run, folder: Path) -> Story:
        story = cls(run, folder)
        for event in read_events(folder / "events.jsonl"):
            story._add(event.get("event", ""), event)
        return story

    def add(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.step = event.step
        else:
            self._add(type(event).__name__, written(event))

    def _add(self, kind: str, event: Mapping[str, Any]) -> None:
        self.step = event.get("step", self.step)
        if kind == "Validated":
            self.validations.append(dict(event))
        elif kind == "Evaluated":
            self.evaluations.append(dict(event))
        elif kind == "Started":
            self.status, self.message = "running", ""
        elif kind == "Ended":
            self.status, self.message = event["status"], event.get("message", "")

    @property
    def full(self) -> bool:
        """The model itself was trained, not a LoRA beside it."""
        return any(name.startswith("full_") for name in self.run.settings)

    def newest_samples(self) -> list[dict[str, Any]]:
        """The pictures of the last validation that was not asked for out of turn, or else of the last one."""
        regular = [each for each in self.validations if not each.get("asked")] or self.validations
        return list(regular[-1]["samples"]) if regular and regular[-1].get("samples") else []

    def base_sample(self, sample: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the untrained model drew of the same prompt and seed."""
        first = (each.get("samples", ()) for each in self.validations if each["step"] == 0)
        same = (s for samples in first for s in samples if _same(s, sample) and s["path"] != sample["path"])
        return next(same, None)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("name", "prompt", "seed"))
