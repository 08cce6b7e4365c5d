"""A full fine-tune: the transformer's own weights are trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..config.adapter import FullSettings
from ..errors import SettingError
from ..model.transformer import Lumina2Transformer
from .base import Adapter, put_layer
from .targets import select


class Full(Adapter):
    """Weights of the transformer itself, under their own names.

    Attributes:
        stored: gives all of the transformer's weights as they are stored, on the CPU.
    """

    def __init__(
        self, transformer: Lumina2Transformer, weights: dict[str, nn.Parameter], settings: FullSettings
    ) -> None:
        self.transformer, self.weights, self.settings = transformer, weights, settings
        self.stored: Callable[[], dict[str, Tensor]] = lambda: {
            name: weight.detach().cpu().clone().contiguous() for name, weight in transformer.state_dict().items()
        }

    def off(self) -> AbstractContextManager[None]:
        raise SettingError(
            "A full fine-tune changes the base model itself, so there is no base to ask for its own prediction. "
            "Leave out regularisation data, or train a LoRA."
        )

    @torch.no_grad()
    def export(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The whole transformer as it is stored, trained or not, under ComfyUI's names without a prefix.

        That is the format of ``models/diffusion_models``.
        """
        tensors = self.stored()
        tensors["norm_final.weight"] = torch.ones(self.transformer.config.dim)  # ComfyUI has it, and never uses it
        return tensors, {"modelspec.architecture": "lumina-2"}

    def describe(self) -> str:
        count = sum(weight.numel() for weight in self.weights.values())
        return f"full fine-tune of {len(self.weights)} tensors, {count:,} weights"


def own_weights(
    transformer: Lumina2Transformer, settings: FullSettings, dtype: torch.dtype | None
) -> dict[str, nn.Parameter]:
    """Give what is trained memory of its own, since the weights may be another's, and make it trainable.

    Raises:
        SettingError: nothing is chosen, or a chosen weight is quantised.
    """
    having = {name: module for name, module in transformer.named_modules() if list(module.parameters(False))}
    if settings.targets:
        linear = [name for name, module in having.items() if isinstance(module, nn.Linear)]
        candidates = list(having) if settings.targets.startswith("regex:") else linear
        chosen = select(candidates, settings.targets, settings.blocks)
    else:
        chosen = select(list(having), "regex:.+", settings.blocks)
    trained = {}
    for module in chosen:
        for part, weight in having[module].named_parameters(recurse=False):
            name = f"{module}.{part}"
            if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise SettingError(
                    f"{name} is quantised, and a full fine-tune needs weights that can change. Set "
                    "base_model_precision to no_change, or train a LoRA."
                )
            trained[name] = nn.Parameter(weight.detach().to(dtype or weight.dtype, copy=True))
            put_layer(transformer, name, trained[name])
    return trained
