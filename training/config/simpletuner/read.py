"""SimpleTuner's ``config.json``, read into our settings, with a report of what was understood."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import SettingError
from ..adapter import AdapterSettings, FullSettings, LoRASettings
from ..checks import one_of
from ..json_text import read_json_text
from ..paths import find_path
from ..settings import TrainSettings, check_run_name
from ..values import filled, is_absent, typed
from .adapters import lora_targets, lycoris, prefix, with_own
from .imported import Imported, Places, beside_defaults, own_kinds
from .table import (
    BY_HAND,
    CLIP_THEMSELVES,
    FLAVOURS,
    OLD_NAMES,
    OPTIMIZER_SUFFIXES,
    OPTIONS,
    OWN_BLOCK,
    PRECISIONS,
    SAME_PRECISION,
    UNSUPPORTED,
    known_names,
    without_effect,
)


def read_config(
    path: Path,
    adopt_our_defaults: bool = False,
    overrides: Mapping[str, Any] | None = None,
    base: Path = Path(),
) -> Imported:
    """Reads a file; comments and trailing commas are allowed.

    Args:
        adopt_our_defaults: what the file leaves out is as we have it, not as SimpleTuner has it.
        overrides: options that win over the file's.
        base: the folder that relative paths are looked for in first; then the file's own and its parents.

    Raises:
        SettingError: the file cannot be read, or as ``parse_config``.
    """
    values = read_json_text(path, "does not exist; name a config.json of SimpleTuner's kind.")
    folders = (base, *path.absolute().parents)
    return parse_config(values, str(path), adopt_our_defaults, overrides, folders)


def parse_config(
    values: Any,
    place: str = "config.json",
    adopt_our_defaults: bool = False,
    overrides: Mapping[str, Any] | None = None,
    folders: Sequence[Path] = (Path(),),
) -> Imported:
    """Our settings from the options of a ``config.json``.

    Args:
        values: the options, with or without ``--`` before their names.
        place: where they were found, for sentences.
        folders: where files that they name are looked for.

    Raises:
        SettingError: an option is unknown, of another type or out of range, or two contradict each other; the
            sentence names the file, the option and the remedy.
    """
    reading = _Reading(place, adopt_our_defaults, tuple(folders))
    try:
        imported = reading.read(values, overrides or {})
        imported.check()
        return imported
    except SettingError as error:
        raise SettingError(reading.named(str(error))) from None


def understood(values: Mapping[str, Any]) -> Imported:
    """``parse_config`` of what was just written, although some of it may only be possible with what is still left."""
    return _Reading("config.json", False, (Path(),)).read(values, {})


class _Reading:
    """One reading of one file."""

    def __init__(self, place: str, adopt: bool, folders: tuple[Path, ...]) -> None:
        self.place, self.adopt, self.folders = place, adopt, folders
        self.given: dict[str, Any] = {}  # SimpleTuner's options that are there, typed
        self.own: dict[str, Any] = {}  # settings of ours that are there, typed
        self.report: list[str] = []
        self._silent: dict[str, list[str]] = {}  # names without effect, by the reason

    def read(self, values: Any, overrides: Mapping[str, Any]) -> Imported:
        if not isinstance(values, dict):
            raise SettingError(f"{self.place} has to hold one block {{…}} of options.")
        if isinstance(values.get("config"), dict):  # as SimpleTuner's web page keeps it
            values = values["config"]
        raw = self._plain_names(values) | self._plain_names(overrides)
        for name, value in raw.items():
            # What a webhook's address holds stays out of all files: it is filled in where it is used.
            self._take(name, value if name == "webhook_config" else filled(value, self.place))
        self.report += [f"No effect on Lumina2 ({why}): {', '.join(names)}." for why, names in self._silent.items()]
        return self._imported()

    # What is there

    def _plain_names(self, values: Mapping[str, Any]) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for written, value in values.items():
            short = str(written).strip().lstrip("-").replace("-", "_")
            name = OLD_NAMES.get(short, short)
            if name in plain and plain[name] != value:
                raise SettingError(f"{self.place}: {name} is there twice, as {plain[name]!r} and {value!r}; keep one.")
            if name != short:
                self.report.append(f"{short} is called {name} now.")
            plain[name] = value
        return plain

    def _take(self, name: str, value: Any) -> None:
        ours = own_kinds()
        if name == OWN_BLOCK:
            if not isinstance(value, dict):
                raise SettingError(f"{self.place}: {OWN_BLOCK} is {value!r}; a block {{…}} of settings is wanted.")
            for key, each in value.items():
                if key not in ours:
                    raise SettingError(self._unknown(key, set(ours)))
                self.own[key] = None if each is None else typed(key, ours[key], each, self.place)
        elif name in OPTIONS:
            if not is_absent(value):
                self.given[name] = typed(name, OPTIONS[name].kind, value, self.place)
        elif reason := without_effect(name):
            self._silent.setdefault(reason, []).append(name)
        elif name in ours:
            if not is_absent(value):
                self.own[name] = typed(name, ours[name], value, self.place)
        elif name in UNSUPPORTED:
            default = UNSUPPORTED[name].default
            if not is_absent(value) and str(value).lower() not in (str(default).lower(), "false"):
                self.report.append(f"{name} is not available here and left out: {UNSUPPORTED[name].remedy}.")
        else:
            raise SettingError(self._unknown(name, known_names() | set(ours)))

    def _unknown(self, name: str, known: set[str]) -> str:
        near = difflib.get_close_matches(name, sorted(known), 1, cutoff=0.6)
        remedy = f'did you mean "{near[0]}"?' if near else "take it out."
        return f'{self.place}: there is no option "{name}"; {remedy}'

    def option(self, name: str) -> Any:
        """The option as it is given, else SimpleTuner's default."""
        return self.given.get(name, OPTIONS[name].default)

    def _wanted(self, name: str) -> bool:
        """Whether the file decides it: by naming it, or by leaving it at SimpleTuner's default."""
        return name in self.given or not self.adopt

    # What it means

    def _imported(self) -> Imported:
        values: dict[str, Any] = {}
        for name, option in OPTIONS.items():
            direct = option.ours != BY_HAND and option.section not in ("run", "model", "data", "adapter")
            if (direct or option.ours in _SETTINGS_ELSEWHERE) and self._wanted(name):
                values[option.ours] = self.option(name)
        if values.get("flow_schedule_shift") == 0:
            values["flow_schedule_shift"] = None
        if "flow_timesteps_mode" in values:
            values["flow_timesteps_mode"] = values["flow_timesteps_mode"].replace("_", "-")
        values |= self._optimisation() | self._memory() | self._length() | self._validation()
        adapter = self._adapter()
        places = self._places()
        own_places = {name: self.own[name] for name in ("system_prompt",) if name in self.own}
        values |= {name: value for name, value in self.own.items() if name not in own_places}
        kind = prefix(adapter)
        written = TrainSettings(adapter=adapter).written()
        for name in [name for name in values if name.startswith(("lora_", "lycoris_", "full_"))]:
            del values[name]
        values |= {name: value for name, value in written.items() if name.startswith(kind)}
        epochs = 0 if "steps" in values else self.option("num_train_epochs")
        if places.run_name:
            values["tracker_run_name"] = places.run_name
        for name in ("user_prompt_library", "webhook_config"):
            if isinstance(values.get(name), str):
                values[name] = find_path(values[name], self.folders)
        self._compare(values, adapter)
        return Imported(
            values=values,
            adapter=adapter,
            epochs=epochs,
            places=Places(**{**vars(places), **own_places}),
            datasets={name: value for name, value in self.given.items() if name in _OF_DATASETS},
            report=tuple(self.report),
            folders=self.folders,
        )

    def _length(self) -> dict[str, Any]:
        steps, epochs = self.option("max_train_steps"), self.option("num_train_epochs")
        if steps <= 0 and epochs <= 0 and "steps" not in self.own:
            raise SettingError("max_train_steps and num_train_epochs are both 0; set one of them.")
        found = {"steps": steps} if steps > 0 else {}
        if not found and "steps" not in self.own:
            self.report.append(f"It trains for {epochs} epoch{'s' * (epochs > 1)}: the dataset tells how many steps.")
        if (seed := self.given.get("seed")) is not None:
            if seed == -1:
                self.report.append("seed -1 draws another one each time in SimpleTuner; here the seed is 42.")
            else:
                found["seed"] = seed
        return found

    def _optimisation(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._wanted("optimizer"):
            name = str(self.option("optimizer"))
            for suffix in OPTIMIZER_SUFFIXES:
                if name.endswith(suffix):
                    name = name.removesuffix(suffix)
                    self.report.append(f'optimizer is {name} here, without "{suffix}".')
            found["optimizer"] = name
        if self._wanted("learning_rate"):
            found["learning_rate"] = self.option("learning_rate")
        if self.option("lr_scale") and "learning_rate" in found:
            factor = self.option("train_batch_size") * self.option("gradient_accumulation_steps")
            factor = factor**0.5 if self.option("lr_scale_sqrt") else factor
            found["learning_rate"] *= factor
            self.report.append(f"lr_scale: learning_rate is {found['learning_rate']:g}, {factor:g} times as written.")
        if self._wanted("max_grad_norm"):
            found["max_grad_norm"] = self.option("max_grad_norm")
            if self.option("optimizer") in CLIP_THEMSELVES and "max_grad_norm" not in self.own:
                found["max_grad_norm"] = 0.0
                self.report.append(f"max_grad_norm is off: SimpleTuner clips nothing for {self.option('optimizer')}.")
        scheduler = str(self.given.get("lr_scheduler", ""))
        if scheduler == "cosine_with_warmup":
            found["lr_scheduler"] = scheduler = "cosine"
        if scheduler in ("cosine", "cosine_with_restarts", "sine") and self.option("lr_warmup_steps"):
            self.report.append(
                f"lr_scheduler {scheduler}: lr_warmup_steps warm up and the schedule goes over the whole run; "
                "SimpleTuner takes them as the schedule's period."
            )
        if self._wanted("scheduled_sampling_prob_start"):
            # SimpleTuner takes 0 as unset there.
            found["scheduled_sampling_prob_start"] = self.option("scheduled_sampling_prob_start")
            if self.option("scheduled_sampling_ramp_steps") and "scheduled_sampling_prob_start" not in self.given:
                found["scheduled_sampling_prob_start"] = self.option("scheduled_sampling_probability")
        return found

    def _memory(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._wanted("base_model_precision"):
            written = str(self.option("base_model_precision"))
            found["base_model_precision"] = ours = PRECISIONS.get(written, written)
            if ours != written and written not in SAME_PRECISION:
                self.report.append(f"base_model_precision {written} is {ours} here, which is as small.")
        backend = str(self.option("dynamo_backend")).lower()
        if self._wanted("dynamo_backend"):
            found["torch_compile"] = backend not in ("no", "none", "")
        if found.get("torch_compile") and backend != "inductor":
            self.report.append(f"dynamo_backend is inductor here, not {backend}.")
        return found

    def _validation(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if not self.adopt:
            found["cfg_normalization"] = True  # diffusers' default, which SimpleTuner draws with
        if self._wanted("validation_guidance"):
            found["validation_guidance"] = max(1.0, self.option("validation_guidance"))
        if self._wanted("validation_step_interval"):
            found["validation_step_interval"] = self.option("validation_step_interval")
        if self._wanted("eval_steps_interval"):
            found["eval_steps_interval"] = self.option("eval_steps_interval") or 0
        if self.option("eval_loss_disable"):
            found["eval_steps_interval"] = 0
        if self.option("validation_disable"):
            found |= {"validation_step_interval": 0, "disable_benchmark": True}
        seed = self.given.get("validation_seed") or self.given.get("seed")
        if seed is not None and seed >= 0:
            found["validation_seed"] = seed
        return found

    def _adapter(self) -> AdapterSettings:
        kind, lora_type = self.option("model_type"), self.option("lora_type")
        if self.adopt and "model_type" not in self.given:
            kind = "lora"
        one_of("model_type", kind, ("lora", "full"))
        if kind == "full":
            unused = [name for name in self.given if OPTIONS[name].section == "adapter"]
            if unused:
                self.report.append(f"model_type is full, so these have no effect: {', '.join(unused)}.")
            return with_own(FullSettings(), self._own_of("full_"))
        one_of("lora_type", lora_type, ("standard", "lycoris"))
        if lora_type == "lycoris":
            settings = lycoris(self.option("lycoris_config"), self.option("init_lokr_norm"), self.place, self.folders)
            if start := self.option("init_lora"):
                settings = replace(settings, init_lora=find_path(start, self.folders))
            return with_own(settings, self._own_of("lycoris_"))
        chosen: dict[str, Any] = {}
        for name, option in OPTIONS.items():
            if option.section == "adapter" and option.ours != BY_HAND and self._wanted(name):
                chosen[option.ours.removeprefix("lora_")] = self.option(name)
        chosen["alpha"] = chosen.get("alpha") or 0.0
        if chosen.get("init_lora"):
            chosen["init_lora"] = find_path(chosen["init_lora"], self.folders)
        if self._wanted("peft_lora_target_modules"):
            modules = self.option("peft_lora_target_modules")
            chosen |= lora_targets(modules, self.place)
            some = {"to_q", "to_k", "to_v"} & {name.removeprefix("attn.") for name in modules}
            if some and len(some) < 3:
                self.report.append("peft_lora_target_modules: query, key and value are trained together here.")
        if self._wanted("fuse_qkv_projections"):
            chosen["qkv"] = "fused" if self.option("fuse_qkv_projections") else "split"
        return LoRASettings(**{**chosen, **self._own_of("lora_")})

    def _own_of(self, start: str) -> dict[str, Any]:
        return {name.removeprefix(start): value for name, value in self.own.items() if name.startswith(start)}

    def _places(self) -> Places:
        family = self.option("model_family")
        if family != "lumina2":
            raise SettingError(
                f"model_family is {family!r}, and only lumina2 is trained here; correct it, or train this with "
                "SimpleTuner."
            )
        told = {name: self.option(name) for name in vars(Places()) if name in OPTIONS}
        flavour = self.option("model_flavour")
        one_of("model_flavour", flavour, tuple(FLAVOURS))
        told["pretrained_model_name_or_path"] = told["pretrained_model_name_or_path"] or FLAVOURS[flavour]
        key = next((key for key in ("tracker_run_name", "hub_model_id") if self.option(key)), "")
        named = self.option(key).rstrip("/").rsplit("/", 1)[-1] if key else ""
        if not named and len(self.folders) > 1:
            named = self.folders[1].name
        try:
            return Places(run_name=check_run_name(named) if named else "", **told)
        except SettingError as error:
            raise SettingError(f"{key or 'tracker_run_name'}: {error}") from None

    def _compare(self, values: Mapping[str, Any], adapter: AdapterSettings) -> None:
        """Says where the file left something out that is otherwise by default here."""
        ours = TrainSettings(adapter=type(adapter)()).written() | beside_defaults()
        differing = []
        for name, option in OPTIONS.items():
            setting = option.ours if option.ours != BY_HAND else name
            if name in self.given or setting in self.own or setting not in ours or setting not in values:
                continue
            switch = next((switch for start, switch in _ONLY_WITH.items() if name.startswith(start)), "")
            if option.section == "report" or (switch and not values[switch]):
                continue
            if values[setting] != ours[setting]:
                differing.append(f"{name} {_shown(values[setting])} (ours {_shown(ours[setting])})")
        if isinstance(adapter, LoRASettings) and not self.adopt and "peft_lora_target_modules" not in self.given:
            differing.append("LoRA on all attention, the context refiner's too, query, key and value apart")
        if differing:
            self.report.append(
                f"Not in the file, so as SimpleTuner has it: {'; '.join(differing)}. Switch adopt_our_defaults on to "
                "have ours."
            )

    def named(self, message: str) -> str:
        """A sentence that begins with a setting of ours, under the name that the file has for it."""
        if message.startswith(self.place):
            return message
        first, _, rest = message.partition(" ")
        for option in OPTIONS.values():
            if option.ours != BY_HAND and first in (option.ours, option.ours.removeprefix("lora_")):
                return f"{self.place}: {option.name} {rest}"
        renamed = {"steps": "max_train_steps", "targets": "lora_targets", "blocks": "lora_blocks"}
        return f"{self.place}: {renamed.get(first, first)} {rest}"


# Options that mean nothing while another is off.
_ONLY_WITH = {
    "ema_": "use_ema",
    "eval_": "eval_steps_interval",
    "num_eval": "eval_steps_interval",
    "pretrained_eval": "eval_steps_interval",
    "validation_": "validation_prompt",
}
_SETTINGS_ELSEWHERE = {
    "batch_size",
    "gradient_accumulation_steps",
    "checkpoint_step_interval",
    "checkpoints_total_limit",
    "data_backend_sampling",
    "disable_bucket_pruning",
}
_OF_DATASETS = {
    name for name, option in OPTIONS.items() if option.section == "data" and option.ours not in _SETTINGS_ELSEWHERE
} - {"cache_dir_text", "cache_dir_vae"}


def _shown(value: Any) -> str:
    return "off" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
