"""In what precision is computed and stored, and what is done to need less memory, under SimpleTuner's names."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SettingError
from .checks import one_of, require

MIXED_PRECISION = ("auto", "bf16", "fp16", "no")
BASE_PRECISION = ("no_change", "int8-torchao", "int8wo", "int4-torchao", "fp8-torchao", "nf4")
QUANTIZE_VIA = ("cpu", "accelerator")
CHECKPOINTING_BACKENDS = ("torch", "unsloth")
LARGE_MODEL = 1_000_000_000  # parameters; the activations of smaller models fit without checkpointing


@dataclass(frozen=True)
class PrecisionSettings:
    """None of these but ``mixed_precision`` and ``base_model_precision`` changes what is learned.

    Raises:
        SettingError: a value is unknown or contradicts another.
    """

    mixed_precision: str = "auto"  # what is computed in; auto: bf16 where the device is fast at it, else fp32
    base_model_precision: str = "no_change"  # what frozen weights are stored in
    quantize_via: str = "cpu"  # where weights are made small: accelerator is quicker and needs one layer there
    gradient_checkpointing: bool | None = None  # None: for models above a thousand million parameters
    gradient_checkpointing_interval: int = 1  # every n-th block is computed again in the backward pass
    gradient_checkpointing_selective: bool = False  # matrix products are kept, only the rest is computed again
    gradient_checkpointing_backend: str = (
        "torch"  # unsloth: what is kept for the backward pass waits in the CPU's memory
    )
    musubi_blocks_to_swap: int = 0  # main blocks whose frozen weights stay in the CPU's memory
    torch_compile: bool = False  # each block is compiled

    def __post_init__(self) -> None:
        if self.base_model_precision == "nf4-bnb":
            object.__setattr__(self, "base_model_precision", "nf4")
        for name, choices in (
            ("mixed_precision", MIXED_PRECISION),
            ("base_model_precision", BASE_PRECISION),
            ("quantize_via", QUANTIZE_VIA),
            ("gradient_checkpointing_backend", CHECKPOINTING_BACKENDS),
        ):
            value = getattr(self, name)
            one_of(name, value, choices)
        interval, swapped = self.gradient_checkpointing_interval, self.musubi_blocks_to_swap
        require(interval >= 1, "gradient_checkpointing_interval", interval, "choose 1 for every block, or more")
        require(swapped >= 0, "musubi_blocks_to_swap", swapped, "choose 0 for none, or more")
        if self.gradient_checkpointing is False:
            remedy = "it needs gradient_checkpointing: switch that on, or this off"
            require(interval == 1, "gradient_checkpointing_interval", interval, remedy)
            require(not self.gradient_checkpointing_selective, "gradient_checkpointing_selective", True, remedy)
        require(
            not (self.torch_compile and swapped),
            "musubi_blocks_to_swap",
            swapped,
            "a compiled block cannot fetch its weights: switch torch_compile off, or set this to 0",
        )

    @property
    def quantised(self) -> bool:
        return self.base_model_precision != "no_change"

    def checkpoint_every(self, parameters: int) -> int:
        """Of a model of so many parameters every n-th block is checkpointed; 0: none."""
        on = parameters > LARGE_MODEL if self.gradient_checkpointing is None else self.gradient_checkpointing
        return self.gradient_checkpointing_interval if on else 0

    def check_full_fine_tune(self) -> None:
        """Where the model's own weights are trained, some of this cannot be.

        Raises:
            SettingError: weights that are trained would be quantised, swapped or computed with in fp16.
        """
        for holds, name, value, why in (
            (not self.quantised, "base_model_precision", self.base_model_precision, "steps are lost in so few bits"),
            (self.mixed_precision != "fp16", "mixed_precision", "fp16", "small gradients vanish in it"),
            (not self.musubi_blocks_to_swap, "musubi_blocks_to_swap", self.musubi_blocks_to_swap, "all are trained"),
        ):
            if not holds:
                default = getattr(PrecisionSettings, name)
                raise SettingError(
                    f"{name} is {value} in a full fine-tune, which is not possible: {why}. "
                    f"Set it to {default}, or train a LoRA."
                )
