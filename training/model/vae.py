"""The VAE's names: ComfyUI's (those of the original latent diffusion code) under diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

_INSIDE = {
    "nin_shortcut": "conv_shortcut",
    "attn_1.norm": "attentions.0.group_norm",
    "attn_1.q": "attentions.0.to_q",
    "attn_1.k": "attentions.0.to_k",
    "attn_1.v": "attentions.0.to_v",
    "attn_1.proj_out": "attentions.0.to_out.0",
    "block_1": "resnets.0",
    "block_2": "resnets.1",
}


def diffusers_vae(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A VAE's weights under diffusers' ``AutoencoderKL`` names; those that are already so stay as they are.

    Attention is a 1 × 1 convolution in one and linear in the other; up blocks are counted from the other end.
    """
    named = dict(weights)
    levels = {int(found[1]) for name in named if (found := re.match(r"decoder\.up\.(\d+)\.", name))}
    return {_diffusers_name(n, max(levels, default=0)): _linear(n, w) for n, w in named.items()}


def _diffusers_name(name: str, last_level: int) -> str:
    name = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
    name = re.sub(r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets.", name)
    name = re.sub(r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0.", name)
    name = re.sub(r"\.up\.(\d+)\.block\.", lambda m: f".up_blocks.{last_level - int(m[1])}.resnets.", name)
    name = re.sub(r"\.up\.(\d+)\.upsample\.", lambda m: f".up_blocks.{last_level - int(m[1])}.upsamplers.0.", name)
    name = name.replace(".mid.", ".mid_block.")
    for ours, theirs in _INSIDE.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _linear(name: str, weight: Tensor) -> Tensor:
    return weight[:, :, 0, 0] if ".attn_1." in name and weight.ndim == 4 else weight
