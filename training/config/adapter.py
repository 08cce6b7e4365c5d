"""What is trained: a LoRA, a LyCORIS adapter, or the transformer itself; checked when it is made."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import SettingError
from .checks import require

TARGETS = ("attention", "attention+ff", "blocks", "all")
REGEX = "regex:"  # before a regular expression that whole module names have to match
QKV = ("fused", "split")
INITS = ("default", "gaussian", "pissa", "olora")
STACKS = ("layers", "noise_refiner", "context_refiner")
_BLOCK = re.compile(rf"(?:({'|'.join(STACKS)})(?:\.(?=\d)|$))?(?:(\d+)(?:-(\d+))?)?")


def parse_blocks(blocks: str) -> dict[str, tuple[str, range | None]]:
    """``"0-12,noise_refiner"`` by its parts: which stack of blocks, and which of them; None: each.

    Raises:
        SettingError: a part is neither a number, a range, nor the name of a stack.
    """
    parsed = {}
    for part in filter(None, (part.strip() for part in blocks.split(","))):
        match = _BLOCK.fullmatch(part)
        first, last = (match[2], match[3] or match[2]) if match else (None, None)
        if not match or (first and last and int(last) < int(first)):
            raise SettingError(
                f"blocks is {blocks!r}; {part!r} is not understood. Write numbers or ranges of main layers, or one of "
                f'{", ".join(STACKS)}, as in "0-12,20,noise_refiner,context_refiner.0".'
            )
        parsed[part] = (match[1] or "layers", range(int(first), int(last) + 1) if first and last else None)
    return parsed


def _check_targets(targets: str, blocks: str, others: tuple[str, ...] = ()) -> None:
    if targets.startswith(REGEX):
        try:
            re.compile(targets.removeprefix(REGEX))
        except re.error as error:
            raise SettingError(f"targets is {targets!r}, not a regular expression: {error}.") from None
    else:
        choices = ", ".join(filter(None, (*TARGETS, *others)))
        known = (*TARGETS, *others)
        require(targets in known, "targets", targets, f'choose one of {choices}, or "{REGEX}…" on module names')
    parse_blocks(blocks)


@dataclass(frozen=True)
class LoRASettings:
    """A low-rank product beside each target.

    Raises:
        SettingError: a value is out of range, or two contradict each other.
    """

    rank: int = 16
    alpha: float = 0.0  # 0: as large as the rank
    dropout: float = 0.0
    targets: str = "attention"  # a name of TARGETS, or "regex:…"
    blocks: str = ""  # "0-12,noise_refiner"; empty: the main layers and the noise refiner ("all": everything)
    qkv: str = "fused"  # one adapter over the rows of q, k and v, or one for each
    init: str = "default"
    use_dora: bool = False
    use_rslora: bool = False
    loraplus_lr_ratio: float = 1.0  # learning rate of B over that of A
    init_lora: str = ""  # a LoRA file to start from; its rank wins

    def __post_init__(self) -> None:
        for name in ("alpha", "dropout", "loraplus_lr_ratio"):
            object.__setattr__(self, name, float(getattr(self, name)))  # 8 and 8.0 are the same setting
        require(self.rank >= 1, "rank", self.rank, "choose at least 1")
        require(self.alpha >= 0, "alpha", self.alpha, "choose a positive number, or 0 for the rank")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "choose at least 0 and less than 1")
        _check_targets(self.targets, self.blocks)
        require(self.qkv in QKV, "lora_qkv", self.qkv, f"choose one of {', '.join(QKV)}")
        if self.init == "loftq":
            raise SettingError(
                "init is loftq, which replaces the base's quantised weights, so that the LoRA would fit no other copy "
                f"of the model. Choose one of {', '.join(INITS)}; pissa is the nearest."
            )
        require(self.init in INITS, "init", self.init, f"choose one of {', '.join(INITS)}")
        require(
            math.isfinite(self.loraplus_lr_ratio) and self.loraplus_lr_ratio > 0,
            "loraplus_lr_ratio",
            self.loraplus_lr_ratio,
            "choose a positive number; 16 is usual, 1 turns LoRA+ off",
        )
        require(
            not self.init_lora or self.init == "default",
            "init",
            self.init,
            'choose "default" where init_lora names a file to start from',
        )

    @property
    def scale(self) -> float:
        """What ``B·A`` is multiplied with."""
        return self.scale_of(self.rank)

    def scale_of(self, rank: int) -> float:
        """alpha over rank; over its root for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
        return (self.alpha or rank) / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class FullSettings:
    """The transformer's own weights are trained: all, or those of a choice of modules.

    Raises:
        SettingError: a value is out of range.
    """

    targets: str = ""  # empty: every weight, norms included; else as of LoRASettings
    blocks: str = ""

    def __post_init__(self) -> None:
        _check_targets(self.targets, self.blocks, ("",))


ALGOS = ("lora", "locon", "loha", "lokr", "full", "ia3", "dylora", "glora", "diag-oft", "boft")
_LOW_RANK = ("lora", "locon", "loha", "lokr")
# Options that only some algorithms have; of all others they must stay at their defaults.
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "dropout": (*_LOW_RANK, "glora"),
    "rank_dropout": ("lora", "locon", "loha"),
    "dora_wd": _LOW_RANK,
    "use_scalar": (*_LOW_RANK, "glora"),
    "rs_lora": (*_LOW_RANK, "glora"),
    "full_matrix": ("lokr",),
    "decompose_both": ("lokr",),
    "unbalanced_factorization": ("lokr",),
    "train_on_input": ("ia3",),
    "constraint": ("diag-oft", "boft"),
    "rescaled": ("diag-oft", "boft"),
}
_PRESET_KEYS = ("target_module", "target_name", "module_algo_map", "name_algo_map", "exclude_name", "use_fnmatch")
# Of SimpleTuner's or LyCORIS's files: for convolutions and text encoders, which Lumina2's transformer has none of, or
# for a choice of code path that changes no result.
_NO_EFFECT_HERE = """
conv_dim conv_alpha use_tucker use_cp use_conv_cp disable_conv_cp bypass_mode warn_on_unmatched train_llm_adapter
enable_conv lora_prefix
"""
_NO_EFFECT = frozenset(_NO_EFFECT_HERE.split())
_ALIASES = {"dim": "linear_dim", "alpha": "linear_alpha", "constrain": "constraint", "wd_on_out": "wd_on_output"}
# What other code calls our classes.
_CLASSES = {
    "LuminaFeedForward": "FeedForward",
    "Lumina2TransformerBlock": "Block",
    "JointTransformerBlock": "Block",
    "JointAttention": "Attention",
    "Lumina2Transformer2DModel": "Lumina2Transformer",
    "NextDiT": "Lumina2Transformer",
}


@dataclass(frozen=True)
class LyCORISSettings:
    """An adapter of the LyCORIS family; names, meaning and defaults of the options are lycoris-lora's.

    ``apply_preset`` chooses layers: ``target_module`` (class names: all linear layers within such a module),
    ``target_name`` (regular expressions on module names), ``module_algo_map`` and ``name_algo_map`` (other options for
    some of them), ``exclude_name``; without it the target is ``Attention``.

    Raises:
        SettingError: a value is out of range, unknown, or has no effect with the algorithm.
    """

    algo: str = "lokr"
    multiplier: float = 1.0
    linear_dim: int = 4
    linear_alpha: float = 1.0  # 0: as large as linear_dim
    factor: int = -1
    full_matrix: bool = False
    decompose_both: bool = False
    unbalanced_factorization: bool = False
    dora_wd: bool = False
    wd_on_output: bool = True
    use_scalar: bool = False
    rs_lora: bool = False
    dropout: float = 0.0
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = False
    module_dropout: float = 0.0
    block_size: int = 4  # of dylora
    train_on_input: bool = False
    constraint: float = 0.0
    rescaled: bool = False
    init_lokr_norm: float = 0.0  # 0: off; else w1 = 1 and w2 like the base weight, times this (about 0.001)
    qkv: str = "fused"  # one adapter over the rows of q, k and v, or one for each
    apply_preset: dict[str, Any] = field(default_factory=dict)
    init_lora: str = ""  # a file to start from: with algo full any, else one of the same algo and sizes

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name not in ("algo", "qkv", "apply_preset", "init_lora"):
                object.__setattr__(self, each.name, _typed(each.name, str(each.type), getattr(self, each.name)))
        object.__setattr__(self, "algo", str(self.algo).lower())
        if self.algo not in ALGOS:
            raise SettingError(f"The LyCORIS algo is {self.algo!r}; choose one of {', '.join(ALGOS)}.")
        require(math.isfinite(self.multiplier) and self.multiplier != 0, "multiplier", self.multiplier, "1 is usual")
        require(self.linear_dim >= 1, "linear_dim", self.linear_dim, "choose at least 1")
        require(self.linear_alpha >= 0, "linear_alpha", self.linear_alpha, "choose at least 0")
        require(self.factor == -1 or self.factor >= 1, "factor", self.factor, "choose at least 1, or -1")
        for name in ("dropout", "rank_dropout", "module_dropout"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "choose at least 0 and less than 1")
        require(self.constraint >= 0, "constraint", self.constraint, "choose at least 0")
        require(self.init_lokr_norm >= 0, "init_lokr_norm", self.init_lokr_norm, "choose at least 0")
        require(self.qkv in QKV, "lycoris_qkv", self.qkv, f"choose one of {', '.join(QKV)}")
        for name, algos in _ONLY_FOR.items():
            if getattr(self, name) and self.algo not in algos:
                raise SettingError(
                    f"{name} has no effect with the LyCORIS algo {self.algo}; leave it out. It is for "
                    f"{', '.join(algos)}."
                )
        if self.algo == "dylora":
            require(
                self.block_size >= 1 and self.linear_dim % self.block_size == 0,
                "linear_dim",
                self.linear_dim,
                f"choose a multiple of dylora's block_size, {self.block_size}",
            )
        if self.init_lokr_norm and not (self.algo == "lokr" and self.full_matrix):
            raise SettingError("init_lokr_norm starts from full matrices; set algo to lokr and full_matrix to true.")
        for key in self.apply_preset:
            if key not in (*_PRESET_KEYS, *_NO_EFFECT):
                raise SettingError(f"apply_preset has no key {key!r}; it may have {', '.join(_PRESET_KEYS)}.")
        for override in (*self.classes.values(), *self.names.values()):
            self.with_options(override)

    @property
    def classes(self) -> dict[str, dict[str, Any]]:
        """The module classes that are adapted, under our names, and the options that are other for them."""
        if not self.apply_preset:
            return {"Attention": {}}
        wanted: dict[str, dict[str, Any]] = {
            _CLASSES.get(name, name): {} for name in self.apply_preset.get("target_module", ())
        }
        return wanted | {
            _CLASSES.get(name, name): dict(options)
            for name, options in self.apply_preset.get("module_algo_map", {}).items()
        }

    @property
    def names(self) -> dict[str, dict[str, Any]]:
        """The patterns of module names that are adapted, and the options that are other for them."""
        wanted: dict[str, dict[str, Any]] = {name: {} for name in self.apply_preset.get("target_name", ())}
        return wanted | {name: dict(options) for name, options in self.apply_preset.get("name_algo_map", {}).items()}

    def with_options(self, override: Mapping[str, Any]) -> LyCORISSettings:
        """These settings with other options, as a ``module_algo_map`` gives them.

        An algorithm of its own starts from that algorithm's defaults, but for the size and the way of q, k and v.
        """
        if not override:
            return self
        options = _known_options(override, "an apply_preset map")
        start = replace(self, apply_preset={})
        if options.get("algo", self.algo) != self.algo:
            kept = ("multiplier", "linear_dim", "linear_alpha", "qkv")
            start = LyCORISSettings(algo="lora", **{name: getattr(self, name) for name in kept})
        return replace(start, **options)

    def as_json(self) -> dict[str, Any]:
        """A ``lycoris_config`` that is read back as these settings, the file to start from apart."""
        defaults = LyCORISSettings()
        changed = {
            f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(defaults, f.name)
        }
        changed.pop("init_lora", None)
        return {"algo": self.algo, **changed}


def lycoris_from_json(config: Mapping[str, Any]) -> LyCORISSettings:
    """SimpleTuner's ``lycoris_config``.

    Raises:
        SettingError: a key is unknown or a value out of range.
    """
    if config.get("preset", "full") != "full":
        raise SettingError(f"The LyCORIS preset {config['preset']!r} is not known here; choose layers by apply_preset.")
    if _typed("train_norm", "bool", config.get("train_norm", False)):
        raise SettingError("train_norm is true, but norms are not adapted here; leave it out, or train fully.")
    left = {key: value for key, value in config.items() if key not in ("preset", "train_norm")}
    return LyCORISSettings(**{"algo": "lora", **_known_options(left, "The LyCORIS configuration")})


def _known_options(options: Mapping[str, Any], place: str) -> dict[str, Any]:
    known = [f.name for f in fields(LyCORISSettings) if f.name != "init_lora"]
    found = {}
    for key, value in options.items():
        name = _ALIASES.get(key, key)
        if name in _NO_EFFECT:
            continue
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; it may have {', '.join(known)}."
            raise SettingError(f"{place} has no key {key!r}{hint}")
        found[name] = value
    return found


def _typed(name: str, kind: str, value: Any) -> Any:
    """A JSON value as bool, int or float; numbers and booleans may be written as strings, null is the default."""
    if value is None:
        return next(f.default for f in fields(LyCORISSettings) if f.name == name)
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        number = float(value)
        if kind == "float":
            return number
        if number == int(number):
            return int(number)
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise SettingError(f"{name} is {value!r}; it has to be {'a whole number' if kind == 'int' else f'a {kind}'}.")


AdapterSettings = LoRASettings | LyCORISSettings | FullSettings


def started_anyhow(adapter: AdapterSettings) -> AdapterSettings:
    """An adapter of the same sizes that needs no weight and no file to begin with, for a forecast."""
    if isinstance(adapter, LoRASettings):
        return replace(adapter, init="default", init_lora="")
    if isinstance(adapter, LyCORISSettings):
        return replace(adapter, init_lokr_norm=0.0, init_lora="")
    return adapter
