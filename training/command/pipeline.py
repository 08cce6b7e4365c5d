"""The parts of a Lumina2 without ComfyUI: where they lie, and VAE and text encoder through diffusers and transformers.

What they give, and their fingerprints, are what ComfyUI's own give: caches are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.paths import find_path
from ..config.simpletuner.imported import Places
from ..errors import ModelError
from ..files import read_json
from ..model.config import MAX_CAPTION_TOKENS, TransformerConfig
from ..model.fingerprint import fingerprint
from ..model.loading import load_transformer
from ..model.precision import fast_bf16
from ..model.transformer import Lumina2Transformer
from .plan import PLUGIN

NANO = "lumina2-nano"  # the model that comes with the plugin
PARTS = ("transformer", "text_encoder", "tokenizer", "vae")
DOWNLOADED = ["*.json", "*/*.json", "*/*.safetensors", "tokenizer/*"]
SHIFT = 6.0  # Lumina-Image-2.0's in inference


@dataclass(frozen=True)
class Model:
    """Where the parts of a model lie."""

    folder: Path
    transformer: Path  # a folder or a file
    vae: Path
    hub_id: str = ""

    @property
    def latent_scale(self) -> tuple[float, float]:
        """From the VAE's units to the transformer's: (z − shift) · scale."""
        config = read_json(self.vae / "config.json")
        return config.get("shift_factor") or 0.0, config["scaling_factor"]

    @property
    def shift(self) -> float:
        path = self.folder / "scheduler" / "scheduler_config.json"
        return float(read_json(path).get("shift", SHIFT)) if path.exists() else SHIFT

    def measures(self) -> TransformerConfig:
        """Raises ModelError where it is of another family; a single file is taken for Lumina-Image-2.0."""
        path = self.transformer / "config.json"
        return TransformerConfig.from_diffusers(read_json(path)) if path.exists() else TransformerConfig()

    def scale_latents(self, latents: Tensor) -> Tensor:
        shift, scale = self.latent_scale
        return (latents - shift) * scale


def find_model(places: Places, folders: Sequence[Path], download: bool = False) -> Model:
    """The model that a configuration names.

    Args:
        download: fetch it from the hub where it is not on this machine.

    Raises:
        ModelError: it is not there, or lacks a part.
    """
    name = places.pretrained_model_name_or_path
    hub_id = ""
    if name == NANO:
        folder = PLUGIN / "assets" / "nano"
    else:
        folder = Path(find_path(name, folders))
        if not folder.is_dir():
            folder, hub_id = _from_hub(name, places, download), name
    for part in PARTS:
        if not (folder / part).is_dir():
            raise ModelError(
                f"pretrained_model_name_or_path is {name!r}, and {folder} has no folder {part!r}; name a folder in "
                "diffusers' layout. A single file of the transformer goes into "
                "pretrained_transformer_model_name_or_path."
            )
    transformer, vae = folder / "transformer", folder / "vae"
    if named := places.pretrained_transformer_model_name_or_path:
        transformer = _existing("pretrained_transformer_model_name_or_path", named, folders)
        transformer = transformer / "transformer" if (transformer / "transformer").is_dir() else transformer
    if named := places.pretrained_vae_model_name_or_path:
        vae = _existing("pretrained_vae_model_name_or_path", named, folders)
        vae = vae / "vae" if (vae / "vae").is_dir() else vae
    return Model(folder, transformer, vae, hub_id)


def _existing(option: str, named: str, folders: Sequence[Path]) -> Path:
    path = Path(find_path(named, folders))
    if not path.exists():
        raise ModelError(f"{option} is {named!r}, which is not on this machine; download it, and name its folder.")
    return path


def _from_hub(name: str, places: Places, download: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name,
            revision=places.revision or None,
            allow_patterns=DOWNLOADED,
            local_files_only=not download,
        )
    except Exception as error:  # the hub's client raises some ten kinds of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"pretrained_model_name_or_path is {name!r}, which is no folder here and not in the hub's cache "
            f"({reason}). Download it (hf download {name}), or name the folder that holds it."
        ) from None
    return Path(found)


def choose_device(named: str = "") -> torch.device:
    """The device that was named, else the best there is."""
    if named:
        return torch.device(named)
    for kind, there in (
        ("cuda", torch.cuda.is_available()),
        ("xpu", hasattr(torch, "xpu") and torch.xpu.is_available()),
        ("mps", torch.backends.mps.is_available()),
    ):
        if there:
            return torch.device(kind)
    return torch.device("cpu")


def stored_in(device: torch.device) -> torch.dtype:
    """What weights are kept in, as ComfyUI chooses by itself."""
    return torch.bfloat16 if fast_bf16(device) else torch.float32


def open_transformer(model: Model, device: torch.device) -> Lumina2Transformer:
    return load_transformer(model.transformer, device=device, dtype=stored_in(device))


@dataclass
class VAE:
    """Pictures to latents and back; on the device only while it is used."""

    model: Model
    device: torch.device
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint(self._network.state_dict().items())

    @cached_property
    def _network(self) -> Any:
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ModelError(
                f"Without ComfyUI the VAE needs the package diffusers ({error}). Install it with the transformers that "
                f"is there: pip install diffusers transformers=={metadata.version('transformers')}"
            ) from None
        dtype = torch.float32 if self.device.type in ("cpu", "mps") else stored_in(self.device)
        network = AutoencoderKL.from_pretrained(self.model.vae, torch_dtype=dtype, use_safetensors=True)
        return network.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """(B, height, width, 3) in [0, 1] to latents (B, C, h, w), fp32, in the VAE's units, on the CPU."""
        pixels = pictures.movedim(-1, 1).to(self.device, self._network.dtype) * 2 - 1
        return self._at_work().encode(pixels).latent_dist.mean.float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) in the transformer's units to pictures (B, height, width, 3) in [0, 1]."""
        shift, scale = self.model.latent_scale
        decoded = self._at_work().decode((latents / scale + shift).to(self.device, self._network.dtype)).sample
        self.rest()
        return ((decoded.float() + 1) / 2).clamp(0, 1).movedim(1, -1).cpu()

    def rest(self) -> None:
        """Leave the device."""
        self._network.to("cpu")

    def _at_work(self) -> Any:
        return self._network.to(self.device)


class TextEncoder:
    """Texts to embeddings."""

    def __init__(self, model: Model, device: torch.device) -> None:
        from transformers import AutoTokenizer, Gemma2Model
        from transformers.utils import logging

        logging.disable_progress_bar()
        config = read_json(model.folder / "text_encoder" / "config.json")
        if config.get("model_type") != "gemma2":
            raise ModelError(
                f"The text encoder in {model.folder} is a {config.get('model_type')}; Lumina2 needs a Gemma2."
            )
        self.device = device
        self._tokenizer = AutoTokenizer.from_pretrained(model.folder / "tokenizer", add_bos_token=True)
        encoder = Gemma2Model.from_pretrained(
            model.folder / "text_encoder", torch_dtype=stored_in(device), use_safetensors=True
        )
        self.fingerprint = fingerprint(encoder.state_dict().items())
        self._encoder = encoder.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def embed(self, text: str, max_tokens: int) -> tuple[Tensor, bool]:
        """(tokens, width), and whether the text was cut."""
        ids = self._tokenizer(text).input_ids
        limit = min(max_tokens, MAX_CAPTION_TOKENS)
        inputs = torch.tensor([ids[:limit]], device=self.device)
        hidden = self._encoder(inputs, output_hidden_states=True).hidden_states[-2][0]
        return hidden.float().cpu(), len(ids) > limit
