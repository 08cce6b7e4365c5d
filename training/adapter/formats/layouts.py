"""What stands beside the weights in diffusers' layout, worked out from their shapes; and the VAE's original names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...model.config import TransformerConfig

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "Lumina2Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "GemmaTokenizer"],
    "transformer": ["diffusers", "Lumina2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 6.0,
    "use_dynamic_shifting": False,
}
TOKENIZER: dict[str, Any] = {
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "padding_side": "right",
}
_GEMMA_HEAD_DIM = 256  # of every Gemma2 that ComfyUI loads
Shapes = Mapping[str, tuple[int, ...]]


def transformer_json(config: TransformerConfig) -> dict[str, Any]:
    """``config.json`` of diffusers' ``Lumina2Transformer2DModel``; the inverse of ``from_diffusers``."""
    usual = config.ffn_dim == 4 * config.dim and config.ffn_dim % 256 == 0
    return {
        "_class_name": "Lumina2Transformer2DModel",
        "axes_dim_rope": list(config.axes_dim),
        "axes_lens": list(config.axes_len),
        "cap_feat_dim": config.caption_dim,
        # rounded down by them, so half a row more
        "ffn_dim_multiplier": None if usual else (config.ffn_dim + 0.5) / (4 * config.dim),
        "hidden_size": config.dim,
        "in_channels": config.channels,
        "multiple_of": 256 if usual else 1,
        "norm_eps": config.norm_eps,
        "num_attention_heads": config.heads,
        "num_kv_heads": config.kv_heads,
        "num_layers": config.layers,
        "num_refiner_layers": config.refiner_layers,
        "patch_size": config.patch,
        "sample_size": 128,
    }


def gemma_config(shapes: Shapes) -> dict[str, Any]:
    """``config.json`` of transformers' ``Gemma2Model``: sizes from the weights, all else as in Gemma-2-2B."""
    layers = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"layers\.(\d+)\.", name)))
    return {
        "architectures": ["Gemma2Model"],
        "model_type": "gemma2",
        "vocab_size": shapes["embed_tokens.weight"][0],
        "hidden_size": shapes["embed_tokens.weight"][1],
        "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": layers,
        "num_attention_heads": shapes["layers.0.self_attn.q_proj.weight"][0] // _GEMMA_HEAD_DIM,
        "num_key_value_heads": shapes["layers.0.self_attn.k_proj.weight"][0] // _GEMMA_HEAD_DIM,
        "head_dim": _GEMMA_HEAD_DIM,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """``config.json`` of diffusers' ``AutoencoderKL`` from its weights' shapes; scale and shift are Flux's."""
    down = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")
    found = {(int(m[1]), int(m[2])): shape for name, shape in shapes.items() if (m := down.fullmatch(name))}
    widths = [shape[0] for (_, number), shape in sorted(found.items()) if number == 0]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "force_upcast": True,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": 1 + max(number for _, number in found),
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
    }


_MIDDLE = {"resnets.0": "block_1", "resnets.1": "block_2", "attentions.0": "attn_1"}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_LEVEL = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|(down|up)samplers\.0)\.(.+)")
_MID = re.compile(r"(encoder|decoder)\.mid_block\.(resnets\.[01]|attentions\.0)\.(.+)\.(weight|bias)")


def original_vae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE under the names of the original latent diffusion code, from diffusers'; see ``model.vae.diffusers_vae``.

    Attention is a 1 × 1 convolution there; up blocks are counted from the other end.
    """
    levels = 1 + max(int(found[3]) for name in weights if (found := _LEVEL.fullmatch(name)))
    named = {}
    for name, weight in weights.items():
        level, middle = _LEVEL.fullmatch(name), _MID.fullmatch(name)
        if level:
            side, way, number, block, sampler, rest = level.groups()
            number = number if way == "down" else str(levels - 1 - int(number))
            inside = f"{sampler}sample" if sampler else f"block.{block}"
            new = f"{side}.{way}.{number}.{inside}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
        elif middle:
            side, block, part, kind = middle.groups()
            new = f"{side}.mid.{_MIDDLE[block]}.{_ATTENTION.get(part, part)}.{kind}"
            if part.startswith("to_") and kind == "weight":
                weight = weight.reshape(*weight.shape[:2], 1, 1)
        else:
            new = name.replace("conv_norm_out", "norm_out")
        named[new] = weight.contiguous()
    return named
