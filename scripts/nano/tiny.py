"""A transformer of a few thousand random weights, and a few random pictures: trainings in a fraction of a second."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.cache.latents import LatentCache, cache_latents
from training.cache.store import Store
from training.cache.texts import TextCache, cache_texts
from training.config.dataset import CaptionSettings, DatasetSettings, GeometrySettings, MixSettings, SourceSettings
from training.config.settings import TrainSettings
from training.data.dataset import Dataset, append, load_dataset
from training.model.config import TransformerConfig
from training.model.transformer import Lumina2Transformer
from training.run.control import Control
from training.run.events import Between, Event, Said
from training.run.folder import RunStore
from training.run.session import Outcome, Request, train_lora
from training.run.validation import Validator

CONFIG = TransformerConfig(
    dim=64, layers=2, refiner_layers=1, heads=4, kv_heads=2, caption_dim=8, ffn_dim=96, channels=4, axes_dim=(4, 4, 8)
)
PICTURES = {"warm": 4, "cold": 3}  # by dataset; every second one is wide


def transformer(dtype: torch.dtype = torch.float32, seed: int = 0) -> Lumina2Transformer:
    """With grouped-query attention, and weights that let something be learned."""
    generator = torch.Generator().manual_seed(seed)
    made = Lumina2Transformer(CONFIG).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(1 if weight.ndim == 1 else 0, 0.2, generator=generator)
    return made.to(dtype)


def caches(folder: Path, names: tuple[str, ...] = tuple(PICTURES), **mix: Any) -> tuple[LatentCache, TextCache]:
    """The datasets' pictures as latents and their captions as embeddings, under ``folder``."""
    dataset: Dataset | None = None
    for name in names:
        _draw(folder / "pictures" / name, PICTURES[name])
        settings = DatasetSettings(
            name,
            SourceSettings(instance_data_dir=str(folder / "pictures" / name)),
            GeometrySettings(64, aspect_bucket_alignment=16),
            CaptionSettings("textfile"),
            mix=MixSettings(**mix),
        )
        one = load_dataset(settings, folder / "index")
        dataset = append(dataset, one) if dataset else one
    assert dataset
    return (
        cache_latents(dataset, _encode, "tiny", Store(str(folder / "latents")), 2),
        cache_texts(dataset, _embed, "tiny", "", 64, Store(str(folder / "text"))),
    )


def _draw(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        chance = np.random.default_rng([len(folder.name), ord(folder.name[0]), number])
        size = (48, 80, 3) if number % 2 else (64, 64, 3)
        Image.fromarray(chance.integers(0, 256, size, np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a " + folder.name * (number + 1))


def _encode(pictures: Tensor) -> Tensor:
    """(N, height, width, 3) in [0, 1] to (N, 4, height / 8, width / 8), about standard normal."""
    cells = torch.nn.functional.avg_pool2d(pictures.movedim(-1, 1), 8)
    return torch.cat([cells, cells.mean(1, keepdim=True)], 1) * 24 - 12


def _embed(text: str) -> tuple[Tensor, bool]:
    """As many tokens as the text has letters, up to 12."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return torch.randn(min(len(text), 12) + 1, 8, generator=torch.Generator().manual_seed(seed)), False


@dataclass
class Train:
    """``train_lora`` on the tiny transformer; after each call ``steps`` is how many were really taken.

    Args:
        on: called with every event, before anything else is done with it.
    """

    caches: tuple[LatentCache, TextCache]
    store: RunStore
    settings: TrainSettings
    steps: int = 0
    said: list[str] = field(default_factory=list)
    heard: list[Event] = field(default_factory=list)

    def __call__(
        self,
        on: Callable[[Event], None] = lambda event: None,
        *,
        control: Control | None = None,
        validator: Validator | None = None,
        model: Lumina2Transformer | None = None,
        name: str = "cats",
        request: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Outcome:
        settings = replace(self.settings, **changes)
        self.steps, self.heard = 0, []
        reached: set[int] = set()

        def tell(event: Event) -> None:
            self.heard.append(event)
            if isinstance(event, Said):
                self.said.append(event.text)
            on(event)
            if isinstance(event, Between) and event.doing == "training" and event.step < settings.steps:
                reached.add(event.step)
                self.steps = len(reached)

        return train_lora(
            model or transformer(),
            *self.caches,
            settings,
            Request(name, **(request or {})),
            self.store,
            lambda latents: latents * 0.5,
            tell,
            control=control,
            validator=validator,
        )


def store(folder: Path) -> RunStore:
    """Runs under a folder."""
    return RunStore(folder / "runs", folder / "loras", folder / "models")
