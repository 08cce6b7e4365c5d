"""The nano model outside of ComfyUI: its parts, its little datasets as latents and embeddings, short trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.cache.latents import LatentCache, cache_latents
from training.cache.store import Store
from training.cache.texts import TextCache, cache_texts
from training.config.dataset import DatasetSettings, GeometrySettings, MixSettings, SourceSettings
from training.data.dataset import Dataset, append, load_dataset
from training.data.prompts import SYSTEM_PROMPTS, with_system_prompt
from training.files import read_json
from training.model.loading import load_transformer
from training.model.transformer import Lumina2Transformer

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "nano"


@dataclass(frozen=True)
class Examples:
    """Pictures as latents (C, h, w) in the VAE's units, and what is said of each as embeddings (tokens, width)."""

    latents: list[Tensor]
    embeddings: list[Tensor]


def mixed(
    datasets: Mapping[str, Mapping[str, Any]], folder: Path, others: Sequence[str] = ()
) -> tuple[LatentCache, TextCache]:
    """Bundled datasets, each with what mixes it, and further prompts, cached together as the cache nodes do."""
    dataset: Dataset | None = None
    for name, mix in datasets.items():
        settings = DatasetSettings(
            name,
            SourceSettings(instance_data_dir=str(ASSETS / name)),
            GeometrySettings(64, crop_aspect="square"),
            mix=MixSettings(**mix),
        )
        one = load_dataset(settings, folder)
        dataset = append(dataset, one) if dataset else one
    assert dataset
    vae = _vae()

    @torch.no_grad()
    def encode(pictures: Tensor) -> Tensor:
        return vae.encode(pictures.movedim(-1, 1) * 2 - 1).latent_dist.mean  # type: ignore[no-any-return]

    latents = cache_latents(dataset, encode, "nano", Store(str(folder / "latents")), 4)
    texts = cache_texts(
        dataset,
        lambda text: (embed(text, "none"), False),
        "nano",
        SYSTEM_PROMPTS["superior"],
        256,
        Store(str(folder / "text")),
        others=others,
    )
    return latents, texts


def transformer(dtype: torch.dtype = torch.float32) -> Lumina2Transformer:
    return load_transformer(ASSETS / "transformer").to(dtype)


def scale_latents(latents: Tensor) -> Tensor:
    """From the VAE's units to the transformer's."""
    config = read_json(ASSETS / "vae" / "config.json")
    return (latents - config["shift_factor"]) * config["scaling_factor"]


@torch.no_grad()
def picture_of(latents: Tensor) -> np.ndarray:
    """The picture (height, width, 3) in [0, 1] of one latent (1, C, h, w) in the transformer's units."""
    config = read_json(ASSETS / "vae" / "config.json")
    decoded = _vae().decode(latents / config["scaling_factor"] + config["shift_factor"]).sample[0]
    return ((decoded + 1) / 2).clamp(0, 1).movedim(0, -1).numpy()  # type: ignore[no-any-return]


@cache
def examples(name: str, prefix: str = "") -> Examples:
    """One of the bundled datasets: style, style_heldout or concept.

    Args:
        prefix: stands before each caption.
    """
    vae = _vae()
    latents, embeddings = [], []
    for path in sorted((ASSETS / name).glob("*.png")):
        pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 127.5 - 1)
        with torch.no_grad():
            latents.append(vae.encode(pixels.movedim(-1, 0)[None]).latent_dist.mean[0])
        embeddings.append(embed(prefix + path.with_suffix(".txt").read_text(encoding="utf-8").strip()))
    return Examples(latents, embeddings)


def embed(text: str, system_prompt: str = "superior") -> Tensor:
    """(tokens, width), as the cache node embeds it."""
    tokenizer, encoder = _text_encoder()
    ids = torch.tensor([tokenizer(with_system_prompt(text, SYSTEM_PROMPTS[system_prompt])).input_ids])
    with torch.no_grad():
        hidden: Tensor = encoder(ids, output_hidden_states=True).hidden_states[-2][0]
    return hidden


@cache
def _vae():  # type: ignore[no-untyped-def]
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(ASSETS / "vae", torch_dtype=torch.float32).eval()


@cache
def _text_encoder():  # type: ignore[no-untyped-def]
    from transformers import Gemma2Model, GemmaTokenizer

    tokenizer = GemmaTokenizer.from_pretrained(ASSETS / "tokenizer", add_bos_token=True)
    return tokenizer, Gemma2Model.from_pretrained(ASSETS / "text_encoder", torch_dtype=torch.float32).eval()
