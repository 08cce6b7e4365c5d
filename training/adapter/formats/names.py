"""Every name that a module of Lumina2 goes by in adapter files, and the sizes that such a file tells.

Names are looked up whole, in a table made from the model's own; nothing is replaced inside of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ...errors import ModelError
from ...model.config import TransformerConfig
from ...model.keys import diffusers_modules
from .layers import FUSED, PARTS, Layer, Place, shapes

_DOTTED = ("base_model.model.", "transformer.", "diffusion_model.", "model.", "unet.")
_JOINED = ("lora_unet_", "lora_transformer_", "lycoris_")
_COMPILED = re.compile(r"_orig_mod[._]")  # torch.compile puts it before and between names
_BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)[._](\d+)[._]")


def table(config: TransformerConfig) -> dict[str, Place]:
    """Our modules and rows by every name without prefixes: ComfyUI's, diffusers', and each with underscores."""
    names: dict[str, Place] = {}
    for module in shapes(config):
        theirs = diffusers_modules(module)
        places = [(module, (module, ""))]
        places += [(n, (module, part)) for n, part in zip(theirs, PARTS if len(theirs) == 3 else ("",), strict=True)]
        if module.endswith(FUSED):
            places += [(f"{module.removesuffix('qkv')}to_{part}", (module, part)) for part in PARTS]
        elif module.endswith("attention.out"):
            places.append((f"{module.removesuffix('out')}to_out.0", (module, "")))
        for name, place in places:
            names[name] = names[name.replace(".", "_")] = place
    return names


def bare(name: str) -> str:
    """A module's name in a file without what trainers put around it."""
    name = _COMPILED.sub("", name)
    name = ".".join(part for part in name.split(".") if part not in ("default", "_orig_mod"))
    while any(name.startswith(prefix) for prefix in _DOTTED):
        name = next(name.removeprefix(prefix) for prefix in _DOTTED if name.startswith(prefix))
    return next((name.removeprefix(prefix) for prefix in _JOINED if name.startswith(prefix)), name)


def diffusers_name(place: Place) -> str:
    module, part = place
    names = diffusers_modules(module)
    return names[PARTS.index(part)] if part else names[0]


def large_enough(config: TransformerConfig, keys: Iterable[str]) -> TransformerConfig:
    """A model with at least the blocks that the keys name, so that the table has their names."""
    layers, refiners = config.layers, config.refiner_layers
    for key in keys:
        for stack, number in _BLOCK.findall(key):
            if stack == "layers":
                layers = max(layers, int(number) + 1)
            else:
                refiners = max(refiners, int(number) + 1)
    return replace(config, layers=layers, refiner_layers=refiners)


def sizes_of(layers: Mapping[Place, Layer], named: TransformerConfig) -> TransformerConfig:
    """A model of the sizes that the layers fit; what they do not tell is as in Lumina-Image-2.0.

    Only names and shapes of it matter: how the width is shared out among heads, no file tells.

    Raises:
        ModelError: the rows of k and v are needed and nothing tells them.
    """
    seen: dict[str, tuple[int | None, int | None]] = {}
    for (module, part), layer in layers.items():
        kind = re.sub(_BLOCK, "", module) + (f".{part}" if part else "")
        rows, columns = layer.extent
        known_rows, known_columns = seen.get(kind, (None, None))
        seen[kind] = (known_rows or rows, known_columns or columns)

    def told(*of: tuple[str, int]) -> int | None:
        return next((n for kind, side in of if (n := seen.get(kind, (None, None))[side])), None)

    q, k, v, inputs = f"{FUSED}.q", f"{FUSED}.k", f"{FUSED}.v", ("feed_forward.w1", "feed_forward.w3")
    inner = [(name, 1) for name in (FUSED, q, k, v, *inputs)]
    outer = [(name, 0) for name in (q, "attention.out", "feed_forward.w2", "x_embedder", "cap_embedder.1")]
    dim = told(*inner, *outer, ("attention.out", 1), ("final_layer.linear", 1))
    if dim is None and (modulation := told(("adaLN_modulation.1", 0))):
        dim = modulation // 4
    dim = dim or named.dim
    fused = told((FUSED, 0))
    kv = told((k, 0), (v, 0)) or ((fused - dim) // 2 if fused else None)
    if kv is None:
        if q in seen and dim != named.dim:
            raise ModelError(
                "The file adapts q alone, and not Lumina-Image-2.0's; nothing in it tells how many rows k and v have. "
                "Wire the MODEL that it belongs to, or name it with --base."
            )
        kv = dim // 3 if dim == named.dim else dim
    if kv <= 0 or dim % kv:
        raise ModelError(f"No Lumina2 has queries of {dim} and keys of {kv}. The file belongs to another model.")
    ffn = told(("feed_forward.w1", 0), ("feed_forward.w3", 0), ("feed_forward.w2", 1)) or 4 * dim
    patches = told(("x_embedder", 1), ("final_layer.linear", 0))
    return TransformerConfig(
        dim=dim,
        layers=named.layers,
        refiner_layers=named.refiner_layers,
        heads=dim // kv,
        kv_heads=1,
        axes_dim=(kv, 0, 0),
        ffn_dim=ffn,
        caption_dim=told(("cap_embedder.1", 1)) or named.caption_dim,
        channels=patches // 4 if patches else named.channels,
    )
