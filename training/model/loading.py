"""A transformer from its files, tensor by tensor, so that the peak is what is kept and one tensor.

Files are read, not mapped: pages of a mapped file count as this process's memory for as long as they are mapped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ..config.precision import PrecisionSettings
from ..errors import ModelError, SettingError
from ..files import read_json
from .config import TransformerConfig
from .keys import diffusers_modules
from .linear import Linear
from .precision import lacking
from .quantise import STORED, is_quantised
from .transformer import Lumina2Transformer

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_HEAD_DIM, _AXES = 96, (32, 32, 32)  # of Lumina-Image-2.0 and its fine-tunes: a single file does not tell them
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class _Entry:
    file: BinaryIO
    start: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """Tensors of one or more safetensors files by name, each read from disk when it is asked for.

    Raises:
        ModelError: a file is missing, damaged, or no safetensors.
    """

    def __init__(self, *paths: Path) -> None:
        self._open = ExitStack()
        self._entries: dict[str, _Entry] = {}
        with ExitStack() as opening:
            for path in paths:
                self._add(path, opening)
            self._open = opening.pop_all()

    def _add(self, path: Path, opening: ExitStack) -> None:
        try:
            file = opening.enter_context(path.open("rb", buffering=0))
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise ValueError("its header is not one of safetensors")
            described = json.loads(file.read(length))
            described.pop("__metadata__", None)
            for name, about in described.items():
                start, end = about["data_offsets"]
                if end > size - 8 - length:
                    raise ValueError("it ends too early")
                if about["dtype"] in _DTYPES:
                    dtype, shape = _DTYPES[about["dtype"]], tuple(about["shape"])
                    self._entries[name] = _Entry(file, 8 + length + start, end - start, dtype, shape)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} cannot be read as safetensors ({error}). Download it again.") from error

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def read(self, *names: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, or several below each other; straight into their place where the dtype is the file's."""
        entries = [self._entries[name] for name in names]
        shape = (sum(e.shape[0] for e in entries), *entries[0].shape[1:]) if len(entries) > 1 else entries[0].shape
        out = torch.empty(shape, dtype=dtype or entries[0].dtype)
        start = 0
        for name, entry in zip(names, entries, strict=True):
            rows = out[start : start + entry.shape[0]] if len(entries) > 1 else out
            start += entry.shape[0] if len(entries) > 1 else 0
            if entry.dtype == out.dtype:
                _fill(rows, entry, name)
            else:
                stored = torch.empty(entry.shape, dtype=entry.dtype)
                _fill(stored, entry, name)
                rows.copy_(stored)
        return out


def _fill(out: Tensor, entry: _Entry, name: str) -> None:
    if out.nbytes != entry.bytes:
        raise ModelError(f"The weight {name!r} has {entry.bytes} bytes in its file and needs {out.nbytes}.")
    if not entry.bytes:
        return
    place = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    entry.file.seek(entry.start)
    while place:
        read = entry.file.readinto(place)  # type: ignore[attr-defined]
        if not read:
            raise ModelError(f"The file of the weight {name!r} ends too early. Download it again.")
        place = place[read:]


def load_transformer(
    path: Path,
    precision: PrecisionSettings | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    seen: Callable[[str, Tensor], None] | None = None,
) -> Lumina2Transformer:
    """A frozen transformer, quantised as it comes.

    Args:
        path: a folder in diffusers' layout (the transformer's own, or the whole model's), or a ComfyUI file.
        device: where the weights are put; the CPU by default.
        dtype: what weights are stored in that are not quantised; None: as in the file.
        seen: called with each weight under our names before it is quantised.

    Raises:
        ModelError: something is missing, damaged, or of another family.
        SettingError: the device lacks what ``base_model_precision`` needs.
    """
    precision, device = precision or PrecisionSettings(), device or torch.device("cpu")
    missing = lacking(precision.base_model_precision, device)
    if missing:
        raise SettingError(missing)
    cpu = torch.device("cpu")
    via = device if precision.quantize_via == "accelerator" else cpu
    config, files, sources = _open(path)
    with files:
        with torch.device("meta"):
            transformer = Lumina2Transformer(config)
        modules = dict(transformer.named_modules())
        for name, expected in transformer.state_dict().items():
            weight = files.read(*sources(name), dtype=dtype)
            if weight.shape != expected.shape:
                raise ModelError(
                    f"The weight {name!r} is {tuple(weight.shape)}; this Lumina2 needs {tuple(expected.shape)}."
                )
            if seen:
                seen(name, weight)
            module, _, kind = name.rpartition(".")
            layer = modules[module]
            if (
                precision.quantised
                and kind == "weight"
                and isinstance(layer, Linear)
                and is_quantised(module, *weight.shape)
            ):
                replaced = STORED[precision.base_model_precision](weight.to(via), None).to(device)
                replaced.bias = layer.bias  # comes next
                _set_module(transformer, module, replaced)
                modules[module] = replaced
            else:
                setattr(layer, kind, nn.Parameter(weight.to(device), requires_grad=False))
            del weight
    return transformer.requires_grad_(False)


def return_freed_memory() -> bool:
    """Let glibc give every block above 1 MB back to the system when it is freed, in this whole process.

    By default it learns to keep blocks of up to 32 MB and cuts its heap into holes: a step at the real width held
    0.3 GB of them. Training on a CPU calls this first; elsewhere nothing is known to do.

    Returns:
        Whether the C library knows the setting.
    """
    import ctypes

    threshold_of_mmap = -3  # M_MMAP_THRESHOLD of malloc.h
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(threshold_of_mmap, 2**20))
    except (OSError, AttributeError):
        return False


def fill(module: nn.Module, files: TensorFiles, dtype: torch.dtype | None = torch.bfloat16, prefix: str = "") -> None:
    """Give a module on the meta device its frozen weights, one after the other, from files that use its own names.

    Its linear layers become ``Linear``, so that it computes in what it is given, whatever its weights are stored in.

    Raises:
        ModelError: a weight is missing or has another shape.
    """
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear:
            bias = layer.bias is not None
            _set_module(module, name, Linear(layer.in_features, layer.out_features, bias, device="meta"))
    for name, expected in module.state_dict().items():
        if prefix + name not in files:
            raise ModelError(f"The model lacks the weight {prefix + name!r}. Download it again.")
        weight = files.read(prefix + name, dtype=dtype)
        if weight.shape != expected.shape:
            raise ModelError(f"The weight {name!r} is {tuple(weight.shape)} and should be {tuple(expected.shape)}.")
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, nn.Parameter(weight, requires_grad=False))


def _set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, module)


def _open(path: Path) -> tuple[TransformerConfig, TensorFiles, Callable[[str], tuple[str, ...]]]:
    """The sizes, the files, and for each of our weights the names that it has there."""
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        described = folder / "config.json"
        if not described.exists():
            raise ModelError(f"{folder} has no config.json. Choose a folder in diffusers' layout.")
        config = TransformerConfig.from_diffusers(read_json(described))
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ModelError(f"{folder} has no .safetensors file. Download the model again.")
        return _checked(config, TensorFiles(*paths), diffusers=True)
    if path.suffix != ".safetensors":
        raise ModelError(f"{path} is neither a folder nor a .safetensors file; other kinds are not read.")
    files = TensorFiles(path)
    diffusers = any(name.startswith("time_caption_embed.") for name in files)
    return _checked(_config_of_file(files, path, diffusers), files, diffusers)


def _checked(
    config: TransformerConfig, files: TensorFiles, diffusers: bool
) -> tuple[TransformerConfig, TensorFiles, Callable[[str], tuple[str, ...]]]:
    """Every weight is there, before the first is read."""
    prefix = "" if diffusers else _prefix(files)

    def sources(name: str) -> tuple[str, ...]:
        if not diffusers:
            return (prefix + name,)
        module, _, kind = name.rpartition(".")
        return tuple(f"{there}.{kind}" for there in diffusers_modules(module))

    with torch.device("meta"):
        names = list(Lumina2Transformer(config).state_dict())
    missing = [source for name in names for source in sources(name) if source not in files]
    scaled = next((name for name in files if name.endswith((".scale_weight", ".weight_scale"))), None)
    if scaled:
        raise ModelError(
            f"The model is stored in fp8 with scales ({scaled!r}); choose the bf16 file of the same model."
        )
    if missing:
        raise ModelError(f"The transformer lacks the weight {missing[0]!r}: not a complete Lumina2 model.")
    return config, files, sources


def _prefix(files: TensorFiles) -> str:
    """What stands before our names in a single file, e.g. ``model.diffusion_model.``."""
    found = [name.removesuffix("cap_embedder.1.weight") for name in files if name.endswith("cap_embedder.1.weight")]
    return found[0] if found else ""


def _config_of_file(files: TensorFiles, path: Path, diffusers: bool) -> TransformerConfig:
    """Sizes from the shapes of a file that has no config.json beside it.

    Raises:
        ModelError: it is no Lumina2, or of another head width, whose rotary axes no shape tells.
    """
    prefix = "" if diffusers else _prefix(files)

    def shape(ours: str, theirs: str) -> tuple[int, ...]:
        name = theirs if diffusers else prefix + ours
        if name not in files:
            raise ModelError(f"{path} is no Lumina2 transformer: it has no weight {name!r}.")
        return files.shape(name)

    def count(stack: str) -> int:
        inside = re.compile(rf"{re.escape(prefix)}{stack}\.(\d+)\.")
        return 1 + max((int(found[1]) for name in files if (found := inside.match(name))), default=-1)

    dim, caption_dim = shape("cap_embedder.1.weight", "time_caption_embed.caption_embedder.1.weight")
    head_dim = shape("layers.0.attention.q_norm.weight", "layers.0.attn.norm_q.weight")[0]
    if head_dim != _HEAD_DIM:
        raise ModelError(
            f"{path} has heads of {head_dim} and only Lumina-Image-2.0's {_HEAD_DIM} are known without a config.json. "
            "Choose the model's folder in diffusers' layout."
        )
    if diffusers:
        kv_rows = files.shape("layers.0.attn.to_k.weight")[0]
    else:
        kv_rows = (shape("layers.0.attention.qkv.weight", "")[0] - dim) // 2
    return TransformerConfig(
        dim=dim,
        layers=count("layers"),
        refiner_layers=count("noise_refiner"),
        heads=dim // head_dim,
        kv_heads=kv_rows // head_dim,
        caption_dim=caption_dim,
        ffn_dim=shape("layers.0.feed_forward.w1.weight", "layers.0.feed_forward.linear_1.weight")[0],
        channels=shape("final_layer.linear.weight", "norm_out.linear_2.weight")[0] // 4,
        axes_dim=_AXES,
    )
