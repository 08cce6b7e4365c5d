"""Whole models from one layout to another: a folder as diffusers has it, and single files as ComfyUI has them.

Tensors pass one by one from file to file, so that the peak is one tensor.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ...config.checks import one_of
from ...errors import ModelError
from ...files import atomic_path, read_json, write_json
from ...model.config import TransformerConfig
from ...model.keys import diffusers_modules
from ...model.loading import TensorFiles, load_transformer
from ...model.tokenizer import sentencepiece_model
from ...model.transformer import Lumina2Transformer
from ...model.vae import diffusers_vae
from .layouts import (
    MODEL_INDEX,
    SCHEDULER,
    TOKENIZER,
    gemma_config,
    original_vae,
    transformer_json,
    vae_config,
)

LAYOUTS = ("comfyui", "all-in-one", "diffusers")
STORED = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_MODEL, _TEXT, _PIECES, _VAE = (
    "model.diffusion_model.",
    "text_encoders.gemma2_2b.transformer.model.",
    "text_encoders.spiece_model",
    "vae.",
)
_REAL_WIDTH, _REAL_VAE = 2304, (128, 256, 512, 512)


@dataclass(frozen=True)
class Entry:
    """A tensor that is read when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def to(self, dtype: torch.dtype | None) -> Entry:
        return self if dtype is None else replace(self, dtype=dtype)


@dataclass(frozen=True)
class Model:
    """A whole Lumina2, or its transformer alone.

    Attributes:
        transformer: under our names.
        text: the text encoder under transformers' names, without ``model.``; empty: there is none.
        pieces: the tokenizer as SentencePiece's own file.
        vae: under diffusers' names.
        folder: where its other settings are, in diffusers' layout.
    """

    config: TransformerConfig
    transformer: Mapping[str, Entry]
    text: Mapping[str, Entry]
    pieces: bytes
    vae: Mapping[str, Entry]
    folder: Path | None

    @property
    def whole(self) -> bool:
        return bool(self.text and self.pieces and self.vae)


def export_model(
    source: Path, target: Path, layout: str, base: Path | None = None, stored: str = "keep"
) -> dict[str, object]:
    """Write a model in another layout.

    Args:
        source: a folder in diffusers' layout, or a single file: a transformer, alone or with all else.
        target: a ``.safetensors`` file, or a folder for ``diffusers``; it must not be there yet.
        layout: ``comfyui`` (the transformer alone, for models/diffusion_models), ``all-in-one`` (for
            models/checkpoints) or ``diffusers``.
        base: a folder in diffusers' layout that gives what the source lacks: text encoder, tokenizer, VAE, and the
            sizes of a model whose heads are not Lumina-Image-2.0's.
        stored: the dtype of what is written; ``keep``: as it is.

    Returns:
        What was written: the path, the layout, its parts, tensors and bytes.

    Raises:
        SettingError: layout or dtype are unknown.
        ModelError: a part is missing, damaged or of another family, or the target is there already.
    """
    one_of("layout", layout, LAYOUTS)
    one_of("dtype", stored, list(STORED))
    if target.exists():
        raise ModelError(f"{target} is there already. Name another target, or remove it first.")
    if layout != "diffusers" and target.suffix != ".safetensors":
        raise ModelError(f"{target} should end in .safetensors: {layout} is a single file.")
    with ExitStack() as opened:
        model = _read(source, base, opened)
        dtype = STORED[stored]
        if layout == "diffusers":
            tensors, parts = _write_folder(model, target, dtype)
        else:
            entries = _transformer_entries(model, dtype) if layout == "comfyui" else _everything(model, source, dtype)
            write_entries(target, entries, {"modelspec.architecture": "lumina-2"})
            tensors, parts = len(entries), ["transformer"] if layout == "comfyui" else ["transformer", "clip", "vae"]
    files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return {"written": str(target), "layout": layout, "parts": parts, "tensors": tensors, "bytes": size}


def write_entries(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """A safetensors file, atomically, of tensors that are read one after the other.

    Raises:
        ModelError: a tensor has another shape than was said.
    """
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, entry in entries.items():
        end = start + prod(entry.shape) * torch.empty(0, dtype=entry.dtype).element_size()
        described[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, entry in entries.items():
            tensor = entry.read().detach().to("cpu", entry.dtype).contiguous()
            if tuple(tensor.shape) != entry.shape:
                raise ModelError(f"The weight {name!r} is {tuple(tensor.shape)} and not {entry.shape}.")
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _read(source: Path, base: Path | None, opened: ExitStack) -> Model:
    """A model's parts, those that it lacks from the base."""
    if base is not None and not (base / "model_index.json").exists():
        raise ModelError(f"{base} is no folder in diffusers' layout: it has no model_index.json. Correct --base.")
    own = _read_folder(source, opened) if source.is_dir() else _read_file(source, base, opened)
    if own.whole or base is None:
        return own
    other = _read_folder(base, opened)
    return replace(own, text=other.text, pieces=other.pieces, vae=other.vae, folder=base)


def _read_folder(folder: Path, opened: ExitStack) -> Model:
    part = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not (part / "config.json").exists():
        raise ModelError(f"{part} has no config.json. Choose a folder in diffusers' layout, or a .safetensors file.")
    config = TransformerConfig.from_diffusers(read_json(part / "config.json"))
    files = opened.enter_context(TensorFiles(*sorted(part.glob("*.safetensors"))))

    def entry(name: str) -> Entry:
        module, _, kind = name.rpartition(".")
        return _entry(files, *(f"{there}.{kind}" for there in diffusers_modules(module)))

    with torch.device("meta"):
        names = list(Lumina2Transformer(config).state_dict())
    text, vae = _part(folder / "text_encoder", opened), _part(folder / "vae", opened)
    return Model(
        config,
        {name: entry(name) for name in names},
        {name.removeprefix("model."): e for name, e in text.items() if not name.startswith("lm_head.")},
        _pieces(folder / "tokenizer"),
        vae,
        folder if text else None,
    )


def _part(folder: Path, opened: ExitStack) -> dict[str, Entry]:
    if not folder.is_dir():
        return {}
    files = opened.enter_context(TensorFiles(*sorted(folder.glob("*.safetensors"))))
    return {name: _entry(files, name) for name in files}


def _pieces(folder: Path) -> bytes:
    own, described = folder / "tokenizer.model", folder / "tokenizer.json"
    if own.exists():
        return own.read_bytes()
    return sentencepiece_model(described) if described.exists() else b""


def _read_file(path: Path, base: Path | None, opened: ExitStack) -> Model:
    """A single file: a transformer under any prefix, with or without the other parts."""
    files = opened.enter_context(TensorFiles(path))
    if base is not None:
        config = TransformerConfig.from_diffusers(read_json(base / "transformer" / "config.json"))
        marks = [name for name in files if name.endswith("cap_embedder.1.weight")]
        prefix = marks[0].removesuffix("cap_embedder.1.weight") if marks else ""
        with torch.device("meta"):
            expected = Lumina2Transformer(config).state_dict()
        for name, weight in expected.items():
            if prefix + name not in files or files.shape(prefix + name) != weight.shape:
                raise ModelError(f"{path} does not fit the model of --base: {name!r} is missing or of another size.")
        transformer = {name: _entry(files, prefix + name) for name in expected}
    else:
        loaded = load_transformer(path, dtype=None)
        config = loaded.config
        transformer = {name: Entry.of(weight) for name, weight in loaded.state_dict().items()}
    text = {name.removeprefix(_TEXT): _entry(files, name) for name in files if name.startswith(_TEXT)}
    vae = {name.removeprefix(_VAE): _entry(files, name).read() for name in files if name.startswith(_VAE)}
    named = {name: Entry.of(weight.contiguous()) for name, weight in diffusers_vae(vae.items()).items()}
    return Model(config, transformer, text, _pieces_in(path), named, None)


def _pieces_in(path: Path) -> bytes:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return bytes(file.get_tensor(_PIECES).numpy()) if _PIECES in file.keys() else b""  # noqa: SIM118


def _entry(files: TensorFiles, *names: str) -> Entry:
    """Tensors of a file, below each other where there are several."""
    missing = [name for name in names if name not in files]
    if missing:
        raise ModelError(f"The model lacks the weight {missing[0]!r}. Download it again.")
    shapes = [files.shape(name) for name in names]
    shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
    return Entry(shape, files.dtype(names[0]), lambda: files.read(*names))


def _transformer_entries(model: Model, dtype: torch.dtype | None, prefix: str = "") -> dict[str, Entry]:
    entries = {prefix + name: entry.to(dtype) for name, entry in model.transformer.items()}
    stored = next(iter(entries.values())).dtype
    # ComfyUI has it, and never uses it
    return {**entries, f"{prefix}norm_final.weight": Entry.of(torch.ones(model.config.dim, dtype=stored))}


def _everything(model: Model, source: Path, dtype: torch.dtype | None) -> dict[str, Entry]:
    """A single file of all parts under the names that CheckpointLoaderSimple knows.

    Raises:
        ModelError: a part is missing, or a size is none that it knows.
    """
    if not model.whole:
        raise ModelError(f"{source} is a transformer alone. Name the folder of its base model with --base.")
    widths = tuple(vae_config(_shapes(model.vae))["block_out_channels"])
    if model.config.dim != _REAL_WIDTH or widths != _REAL_VAE:
        raise ModelError(
            f"ComfyUI opens single files of Lumina-Image-2.0's widths alone ({_REAL_WIDTH}, VAE {_REAL_VAE}); this "
            f"model has {model.config.dim} and {widths}. Choose diffusers: Load Lumina2 (Diffusers) opens any size."
        )
    entries = _transformer_entries(model, dtype, _MODEL)
    entries |= {_TEXT + name: entry.to(dtype) for name, entry in model.text.items()}
    entries[_PIECES] = Entry.of(torch.frombuffer(bytearray(model.pieces), dtype=torch.uint8))
    vae = original_vae({name: entry.read() for name, entry in model.vae.items()})
    entries |= {_VAE + name: Entry.of(weight).to(dtype) for name, weight in vae.items()}
    return entries


def _write_folder(model: Model, target: Path, dtype: torch.dtype | None) -> tuple[int, list[str]]:
    """A folder in diffusers' layout, whole or not at all; the transformer alone where there is nothing else."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:40]}.") as name:
        folder = Path(name) / "model"
        transformer = _diffusers_entries(model, dtype)
        _write_part(folder / "transformer", transformer, transformer_json(model.config), "diffusion_pytorch_model")
        parts = ["transformer"]
        if model.whole and model.folder:
            for part in ("text_encoder", "tokenizer", "vae", "scheduler"):
                if (model.folder / part).is_dir():
                    shutil.copytree(model.folder / part, folder / part)
                    parts.append(part)
        elif model.whole:
            vae = {name: entry.to(dtype) for name, entry in model.vae.items()}
            text = {name: entry.to(dtype) for name, entry in model.text.items()}
            _write_part(folder / "vae", vae, vae_config(_shapes(vae)), "diffusion_pytorch_model")
            _write_part(folder / "text_encoder", text, gemma_config(_shapes(text)), "model")
            write_json(folder / "tokenizer" / "tokenizer_config.json", TOKENIZER)
            (folder / "tokenizer" / "tokenizer.model").write_bytes(model.pieces)
            write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
            parts += ["text_encoder", "tokenizer", "vae", "scheduler"]
        if model.whole:
            write_json(folder / "model_index.json", MODEL_INDEX)
        os.replace(folder, target)
    return len(transformer), parts


def _write_part(folder: Path, entries: Mapping[str, Entry], config: Mapping[str, object], stem: str) -> None:
    write_json(folder / "config.json", dict(config))
    write_entries(folder / f"{stem}.safetensors", entries, {"format": "pt"})


def _diffusers_entries(model: Model, dtype: torch.dtype | None) -> dict[str, Entry]:
    """The transformer under diffusers' names; rows of q, k and v apart."""
    entries: dict[str, Entry] = {}
    for name, entry in model.transformer.items():
        module, _, kind = name.rpartition(".")
        theirs, start = diffusers_modules(module), 0
        for there, rows in zip(theirs, model.config.qkv_rows if len(theirs) == 3 else (entry.shape[0],), strict=True):
            piece = slice(start, start + rows)
            start += rows
            read = (lambda entry=entry, piece=piece: entry.read()[piece]) if len(theirs) == 3 else entry.read
            entries[f"{there}.{kind}"] = Entry((rows, *entry.shape[1:]), dtype or entry.dtype, read)
    return entries


def _shapes(entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in entries.items()}
