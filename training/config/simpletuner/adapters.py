"""What SimpleTuner's options say of what is trained, as our settings, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ...errors import SettingError
from ..adapter import REGEX, AdapterSettings, FullSettings, LoRASettings, LyCORISSettings, lycoris_from_json
from ..json_text import plain_json
from ..paths import find_path

EVERY_STACK = "layers,noise_refiner,context_refiner"  # SimpleTuner adapts all of them
LYCORIS_FILE = "config/lycoris_config.json"  # where SimpleTuner looks for it by default
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("linear_1", "linear_2", "linear_3")
_SUFFIXES = {
    "attention": _ATTENTION,
    "attention+ff": (*_ATTENTION, *_FEED_FORWARD),
    "blocks": (*_ATTENTION, *_FEED_FORWARD, "norm1.linear"),
}
# The ends of diffusers' module names -> of ours.
_OURS = {
    "to_q": "attention.qkv",
    "to_k": "attention.qkv",
    "to_v": "attention.qkv",
    "to_qkv": "attention.qkv",
    "to_out.0": "attention.out",
    "linear_1": "feed_forward.w1",
    "linear_2": "feed_forward.w2",
    "linear_3": "feed_forward.w3",
    "norm1.linear": "adaLN_modulation.1",
    "caption_embedder.1": "cap_embedder.1",
    "x_embedder": "x_embedder",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
_PARENTS = r"^(attn|feed_forward|time_caption_embed)\."


def lora_targets(modules: Sequence[str], place: str) -> dict[str, Any]:
    """``lora_targets`` and ``lora_blocks`` for ``peft_lora_target_modules``; empty: SimpleTuner's own choice.

    Raises:
        SettingError: a name ends in none of this model's modules.
    """
    if not modules:
        return {"targets": "attention", "blocks": EVERY_STACK}
    if "all-linear" in modules:
        return {"targets": "all"}
    wanted = [re.sub(_PARENTS, "", name) for name in modules]
    named = next((name for name, suffixes in _SUFFIXES.items() if {*wanted} - {"to_qkv"} == {*suffixes}), None)
    if named:
        return {"targets": named, "blocks": EVERY_STACK}
    unknown = [name for name, short in zip(modules, wanted, strict=True) if short not in _OURS]
    if unknown:
        raise SettingError(
            f"{place}: peft_lora_target_modules has {unknown[0]!r}, which no Lumina2 module is called; choose of "
            f"{', '.join(_OURS)}."
        )
    ends = "|".join(re.escape(end) for end in dict.fromkeys(_OURS[short] for short in wanted))
    return {"targets": rf"{REGEX}(.+\.)?({ends})"}


def peft_modules(targets: str) -> list[str] | None:
    """``peft_lora_target_modules`` for a target set; None where that is SimpleTuner's own choice, or cannot be said."""
    if targets == "all":
        return ["all-linear"]
    return list(_SUFFIXES[targets]) if targets in _SUFFIXES and targets != "attention" else None


def lycoris(config: Any, norm: float | None, place: str, folders: Sequence[Path]) -> LyCORISSettings:
    """From ``lycoris_config`` (a block, or the path of a file) and ``init_lokr_norm``.

    Raises:
        SettingError: the file is missing or damaged, or an option is unknown or out of range.
    """
    where = f"{place}, lycoris_config"
    if not isinstance(config, Mapping):
        written = str(config or LYCORIS_FILE)
        path = Path(find_path(written, folders))
        where = str(path)
        try:
            config = json.loads(plain_json(path.read_text(encoding="utf-8-sig")))
        except FileNotFoundError:
            raise SettingError(
                f"{place}: lycoris_config is {written!r}, which does not exist; correct the path, or set lora_type to "
                "standard."
            ) from None
        except (OSError, ValueError) as error:
            raise SettingError(f"{where} cannot be read as JSON ({error}); correct it there.") from None
        if not isinstance(config, Mapping):
            raise SettingError(f"{where} has to hold one block {{…}} of LyCORIS options.")
    try:
        settings = lycoris_from_json(config)
        return replace(settings, init_lokr_norm=norm) if norm else settings
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from None


def lycoris_file(settings: LyCORISSettings) -> dict[str, Any]:
    """A ``lycoris_config`` for both; ``init_lokr_norm`` stands in ``config.json``, ``qkv`` among our own options."""
    always = {name: getattr(settings, name) for name in ("algo", "multiplier", "linear_dim", "linear_alpha")}
    written = always | settings.as_json()
    return {name: value for name, value in written.items() if name not in ("init_lokr_norm", "qkv")}


def with_own(adapter: AdapterSettings, own: Mapping[str, Any]) -> AdapterSettings:
    """The adapter with settings of ours, by their names without the kind before them."""
    names = {f.name for f in fields(adapter)}
    return replace(adapter, **{name: value for name, value in own.items() if name in names})


def prefix(adapter: AdapterSettings) -> str:
    """What its settings begin with among the others."""
    return {LoRASettings: "lora_", LyCORISSettings: "lycoris_", FullSettings: "full_"}[type(adapter)]
