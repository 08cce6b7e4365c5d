"""Our settings as SimpleTuner's ``config.json``, so that both train the same from it as far as both can.

What SimpleTuner has no option for stands in a block ``lumina2_trainer``, which it skips.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..adapter import FullSettings, LoRASettings, LyCORISSettings
from ..settings import TrainSettings
from .adapters import lycoris_file, peft_modules
from .imported import Imported, Places, beside_defaults
from .read import understood
from .table import BY_HAND, OPTIONS, OWN_BLOCK

LYCORIS_NAME = "lycoris_config.json"  # beside the config.json
_ALWAYS = (
    "train_batch_size",
    "learning_rate",
    "optimizer",
    "lr_scheduler",
    "mixed_precision",
    "caption_dropout_probability",
)
_NEAREST: dict[str, dict[Any, Any]] = {  # what SimpleTuner has in place of a value of ours
    "optimizer": {"adafactor": "adamw_bf16"},
    "mixed_precision": {"auto": "bf16"},
    "grad_clip_method": {"update": "value"},
    "base_model_precision": {"int8wo": "int8-torchao", "nf4": "nf4-bnb"},
    "flow_schedule_shift": {None: 0},
}
_HIDDEN = "webhook_config is left out, since an address gives access: name a JSON file, or variables as {env:NAME}."
_SAME_THERE = {"mixed_precision", "gradient_checkpointing", "base_model_precision"}  # their values in the block


@dataclass(frozen=True)
class Written:
    """What is to be written."""

    config: dict[str, Any]  # of config.json
    lycoris: dict[str, Any] | None  # of LYCORIS_NAME, beside it
    notes: tuple[str, ...]  # sentences on what SimpleTuner would do otherwise


def from_settings(
    settings: TrainSettings, others: Mapping[str, Any] | None = None, places: Places | None = None
) -> Imported:
    """A run's settings as they would have been imported.

    Args:
        others: values of validation and report, by their flat names.
    """
    return Imported({**(others or {}), **settings.written()}, settings.adapter, places=places or Places())


def write_config(imported: Imported) -> Written:
    """A ``config.json`` that is read back as ``imported``."""
    settings = TrainSettings(steps=imported.values.get("steps", 2**31), adapter=imported.adapter)
    start = {**settings.written(), **beside_defaults()}
    named = {"tracker_run_name": imported.places.run_name} if imported.places.run_name else {}
    values = {**start, **imported.values, **named}
    if imported.epochs:
        values.pop("steps", None)
    main = _places(imported) | _adapter(imported)
    for name, option in OPTIONS.items():
        ours = name if option.ours == BY_HAND else option.ours
        if ours in values and option.section not in ("model", "adapter"):
            value = _NEAREST.get(name, {}).get(values[ours], values[ours]) if _hashable(values[ours]) else values[ours]
            differs = value != option.default or (ours in start and value != start[ours])
            if name == "webhook_config" and not _may_be_written(value):
                continue
            if value is not None and (differs or name in _ALWAYS):
                main[name] = _plain(value)
    main |= _by_hand(imported, values)
    main |= {name: _plain(value) for name, value in imported.datasets.items() if name not in main}
    defaults = {**TrainSettings(adapter=type(imported.adapter)()).written(), **beside_defaults()}
    again = {**defaults, **understood(main).values}
    block = {name: _plain(value) for name, value in values.items() if name not in again or again[name] != value}
    hidden = not _may_be_written(block.pop("webhook_config", None))
    if imported.places.system_prompt != Places.system_prompt:
        block["system_prompt"] = imported.places.system_prompt
    lycoris = main.pop("lycoris_config", None)
    if lycoris is not None:
        main["lycoris_config"] = LYCORIS_NAME
    if block:
        main[OWN_BLOCK] = block
    return Written(main, lycoris, (*_notes(imported, block), *([_HIDDEN] if hidden else [])))


def _places(imported: Imported) -> dict[str, Any]:
    told = {name: value for name, value in vars(imported.places).items() if name in OPTIONS}
    written = {name: value for name, value in told.items() if value and value != OPTIONS[name].default}
    if imported.places.run_name:
        written["tracker_run_name"] = imported.places.run_name
    return {"model_family": "lumina2", **written}


def _adapter(imported: Imported) -> dict[str, Any]:
    adapter = imported.adapter
    if isinstance(adapter, FullSettings):
        return {"model_type": "full"}
    if isinstance(adapter, LyCORISSettings):
        norm: dict[str, Any] = {"init_lokr_norm": adapter.init_lokr_norm} if adapter.init_lokr_norm else {}
        norm |= {"init_lora": adapter.init_lora} if adapter.init_lora else {}
        return {"model_type": "lora", "lora_type": "lycoris", "lycoris_config": lycoris_file(adapter), **norm}
    written: dict[str, Any] = {"model_type": "lora", "lora_type": "standard", "lora_rank": adapter.rank}
    if adapter.alpha:
        written["lora_alpha"] = _plain(adapter.alpha)
    written["lora_dropout"] = _plain(adapter.dropout)
    for option, name in (("lora_init_type", "init"), ("use_dora", "use_dora"), ("init_lora", "init_lora")):
        if getattr(adapter, name) != getattr(LoRASettings, name):
            written[option] = getattr(adapter, name)
    modules = peft_modules(adapter.targets)
    return written | ({"peft_lora_target_modules": modules} if modules else {})


def _by_hand(imported: Imported, values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"num_train_epochs": imported.epochs}
    if imported.epochs:
        found["max_train_steps"] = 0
    else:
        found["max_train_steps"] = values["steps"]
    if values["torch_compile"]:
        found["dynamo_backend"] = "inductor"
    if values["scheduled_sampling_ramp_steps"]:
        found["scheduled_sampling_prob_start"] = values["scheduled_sampling_prob_start"]
    if values["weight_decay"] is not None:
        parts = filter(None, (values["optimizer_config"], f"weight_decay={_plain(values['weight_decay'])}"))
        found["optimizer_config"] = ",".join(parts)
    return found


def _notes(imported: Imported, block: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if imported.values.get("optimizer") == "adafactor":
        notes.append("SimpleTuner has no adafactor any more: it trains with adamw_bf16 there.")
    adapter = imported.adapter
    if isinstance(adapter, LoRASettings) and adapter.qkv == "fused":
        notes.append("SimpleTuner trains query, key and value apart, each with a LoRA of its own.")
    if isinstance(adapter, LyCORISSettings) and adapter.qkv == "fused":
        notes.append("SimpleTuner trains query, key and value apart, each with LyCORIS weights of its own.")
    known = {*_SAME_THERE, "optimizer", "lora_qkv", "lycoris_qkv"}
    others = [name for name in block if name not in known]
    if others:
        notes.append(f"SimpleTuner has no such option, and skips it: {', '.join(others)}.")
    return tuple(notes)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _may_be_written(webhooks: Any) -> bool:
    """Whoever knows a webhook's address can write to it: only a file's path, or names of variables, are written."""
    entries = webhooks if isinstance(webhooks, (list, tuple)) else [webhooks]
    secrets = ("webhook_url", "callback_url", "auth_token")
    return all(
        "{env:" in str(each[name])
        for each in entries
        if isinstance(each, Mapping)
        for name in secrets
        if each.get(name)
    )


def _hashable(value: Any) -> bool:
    return not isinstance(value, (dict, list))


def with_lycoris(written: Written) -> dict[str, Any]:
    """All in one block, as ``parse_config`` takes it too."""
    return written.config if written.lycoris is None else {**written.config, "lycoris_config": written.lycoris}
