"""LoRA on the transformer, through PEFT: frozen weights, and beside each target a product of two small ones.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..config.settings import LoRASettings
from ..errors import ModelError
from ..model.transformer import Lumina2Transformer

_ATTENTION = r"(layers|noise_refiner)\.\d+\.attention\.(qkv|out)"
_FEED_FORWARD = r"(layers|noise_refiner)\.\d+\.feed_forward\.w[123]"
_MODULATION = r"(layers|noise_refiner)\.\d+\.adaLN_modulation\.1"
_PATTERNS = {
    "attention": (_ATTENTION,),
    "attention+ff": (_ATTENTION, _FEED_FORWARD),
    "blocks": (_ATTENTION, _FEED_FORWARD, _MODULATION),
    "all": (r".+",),
}
_NAME = "default"  # PEFT's name for the one adapter


def target_modules(transformer: nn.Module, targets: str) -> list[str]:
    """Names of the linear layers of a target set, in the network's order."""
    linear = (name for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    return [name for name in linear if any(re.fullmatch(pattern, name) for pattern in _PATTERNS[targets])]


def add_lora(transformer: Lumina2Transformer, settings: LoRASettings, seed: int) -> dict[str, nn.Parameter]:
    """Put a fresh adapter into the transformer, in place, and give its weights by name, in fp32.

    The frozen weights stay where they are. A is uniform as in ``nn.Linear`` and drawn from ``seed`` on the CPU, so
    that every device starts from the same numbers; B is zero, so that training begins at the base model.

    Returns:
        ``<module>.lora_A.weight`` (rank, in) and ``<module>.lora_B.weight`` (out, rank).
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,
        lora_dropout=settings.dropout,
        target_modules=target_modules(transformer, settings.targets),
        init_lora_weights=False,
    )
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, transformer, adapter_name=_NAME)
    generator = torch.Generator().manual_seed(seed % 2**63)
    weights: dict[str, nn.Parameter] = {}
    for name, parameter in transformer.named_parameters():
        part = re.fullmatch(rf"(.+)\.lora_([AB])\.{_NAME}\.weight", name)
        if not part:
            continue
        parameter.data = parameter.data.float().contiguous()
        with torch.no_grad():
            if part[2] == "A":
                bound = 1 / math.sqrt(parameter.shape[1])  # kaiming_uniform with a = √5
                drawn = torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound
                parameter.copy_(drawn)
            else:
                parameter.zero_()
        weights[f"{part[1]}.lora_{part[2]}.weight"] = parameter
    return weights


@contextmanager
def without_lora(transformer: nn.Module) -> Iterator[None]:
    """The base model's own predictions, within the block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True  # not enable_adapters(False), which also freezes the adapter
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def load_lora(weights: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor], source: str) -> None:
    """Copy saved weights into an adapter's.

    Raises:
        ModelError: the saved adapter has other layers or another rank.
    """
    for name in {*weights, *saved}:
        here, there = weights.get(name), saved.get(name)
        if here is None or there is None or here.shape != there.shape:
            raise ModelError(
                f"{source} holds another adapter: {name} is {None if there is None else tuple(there.shape)} there and "
                f"{None if here is None else tuple(here.shape)} here. Use the same model, rank and targets."
            )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
