"""Between ComfyUI's objects and the engine's: native objects from a diffusers folder, and the weights' way back.

Nothing of ComfyUI is patched, and nothing it shares is changed: sizes, latent scale and sampling shift are set on
a model config *instance*, and the engine's transformer stands on the memory of ComfyUI's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.lumina2
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..training.errors import ModelError
from ..training.files import read_json
from ..training.model.config import MAX_CAPTION_TOKENS, TransformerConfig
from ..training.model.fingerprint import fingerprint
from ..training.model.keys import from_diffusers
from ..training.model.tokenizer import sentencepiece_model
from ..training.model.transformer import Lumina2Transformer
from ..training.model.vae import diffusers_vae

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_FLOAT_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
_GEMMA = "gemma2_2b"  # ComfyUI's name for Lumina2's text encoder, whatever its size
_GEMMA_HEAD_DIM = 256  # fixed in ComfyUI


def load_pipeline(folder: Path, dtype: str = "auto") -> tuple[Any, comfy.sd.CLIP, comfy.sd.VAE]:
    """ComfyUI's MODEL, CLIP and VAE from a Lumina2 folder in diffusers' layout.

    Raises:
        ModelError: the folder lacks a part, or holds a model of another family.
    """
    for part in ("transformer", "text_encoder", "vae", "tokenizer"):
        if not (folder / part).is_dir():
            raise ModelError(f"{folder} has no folder {part!r}. Choose a folder in diffusers' layout.")
    return load_model(folder, dtype), load_clip(folder), load_vae(folder)


def load_model(folder: Path, dtype: str = "auto") -> comfy.model_patcher.ModelPatcher:
    config = TransformerConfig.from_diffusers(read_json(folder / "transformer" / "config.json"))
    with torch.device("meta"):
        names = list(Lumina2Transformer(config).state_dict())
    weights = from_diffusers(_read_weights(folder / "transformer"), names)

    described = comfy.supported_models.Lumina2(_comfy_config(config))
    device = comfy.model_management.get_torch_device()
    parameters = sum(w.numel() for w in weights.values())
    chosen = _DTYPES.get(dtype) or comfy.model_management.unet_dtype(
        device=device, model_params=parameters, supported_dtypes=described.supported_inference_dtypes
    )
    cast = comfy.model_management.unet_manual_cast(chosen, device, described.supported_inference_dtypes)
    described.set_inference_dtype(chosen, cast)
    scheduler, vae = folder / "scheduler" / "scheduler_config.json", read_json(folder / "vae" / "config.json")
    if scheduler.exists():
        described.sampling_settings["shift"] = read_json(scheduler).get("shift", 6.0)
    described.latent_format.scale_factor = vae["scaling_factor"]
    described.latent_format.shift_factor = vae.get("shift_factor") or 0.0

    model = described.get_model({})
    if hasattr(model.diffusion_model, "norm_final"):  # older cores have it, and no forward uses it; diffusers has not
        weights["norm_final.weight"] = torch.ones(config.dim)
    model.diffusion_model.load_state_dict(weights)
    offload = comfy.model_management.unet_offload_device()
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)
    # Newer cores make a patcher of their own kind anew from this, where a node asks for one.
    patcher.cached_patcher_init = (_load_again, (folder, dtype))
    return patcher


def _load_again(folder: Path, dtype: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """``load_model`` as newer cores call it; ours is never a dynamic patcher."""
    return load_model(folder, dtype)


def _comfy_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "image_model": "lumina2",
        "patch_size": config.patch,
        "in_channels": config.channels,
        "dim": config.dim,
        "cap_feat_dim": config.caption_dim,
        "n_layers": config.layers,
        "n_refiner_layers": config.refiner_layers,
        "qk_norm": True,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "axes_dims": list(config.axes_dim),
        "axes_lens": list(config.axes_len),
        "rope_theta": config.rope_theta,
        "norm_eps": config.norm_eps,
        "ffn_dim_multiplier": (config.ffn_dim + 0.5) / config.dim,  # ComfyUI rounds the product down
        "multiple_of": 1,
    }


def load_clip(folder: Path) -> comfy.sd.CLIP:
    config = read_json(folder / "text_encoder" / "config.json")
    if config.get("model_type") != "gemma2":
        raise ModelError(f"The text encoder in {folder} is a {config.get('model_type')}; Lumina2 needs a Gemma2.")
    if config["head_dim"] != _GEMMA_HEAD_DIM or config["num_hidden_layers"] < 3:
        raise ModelError(f"ComfyUI loads a Gemma2 of head_dim 256 and at least 3 layers; {folder} has another.")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    options: dict[str, Any] = {
        f"{_GEMMA}_model_config": {key: config[key] for key in (*sizes, "num_key_value_heads")},
    }
    if comfy.model_management.is_device_cpu(comfy.model_management.text_encoder_device()):
        options["dtype"] = torch.float32
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(
            comfy.text_encoders.lumina2.LuminaTokenizer, comfy.text_encoders.lumina2.te()
        ),
        tokenizer_data={"spiece_model": torch.frombuffer(bytearray(_tokenizer(folder)), dtype=torch.uint8)},
        model_options=options,
    )
    weights = _read_weights(folder / "text_encoder")
    named = {f"{_GEMMA}.transformer.model.{name.removeprefix('model.')}": w for name, w in weights.items()}
    missing, unexpected = clip.cond_stage_model.load_state_dict(named, strict=False)
    missing = [name for name in missing if name.startswith(f"{_GEMMA}.transformer.")]
    if missing or unexpected:
        raise ModelError(f"The text encoder in {folder} is incomplete or of another kind: {(missing + unexpected)[0]}.")
    return clip


def _tokenizer(folder: Path) -> bytes:
    """SentencePiece's model: the file itself where there is one, else made from ``tokenizer.json``."""
    own, described = folder / "tokenizer" / "tokenizer.model", folder / "tokenizer" / "tokenizer.json"
    if own.exists():
        return own.read_bytes()
    if described.exists():
        return sentencepiece_model(described)
    raise ModelError(f"{own.parent} has neither tokenizer.model nor tokenizer.json. Download the model again.")


def load_vae(folder: Path) -> comfy.sd.VAE:
    weights = _read_weights(folder / "vae")
    if "post_quant_conv.weight" not in weights:  # the Flux VAE of Lumina-Image-2.0: ComfyUI knows it by itself
        return comfy.sd.VAE(sd=weights)
    config = read_json(folder / "vae" / "config.json")
    widths = config["block_out_channels"]
    layout = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config.get("sample_size", 256),
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    described = {"params": {"ddconfig": layout, "embed_dim": config["latent_channels"]}}
    vae = comfy.sd.VAE(sd=weights, config=described)
    vae.latent_channels = config["latent_channels"]
    return vae


def engine_transformer(model: comfy.model_patcher.ModelPatcher) -> Lumina2Transformer:
    """The engine's transformer on the very memory of a MODEL's weights, its patches included.

    The MODEL is loaded fully first, so that its patches and no other's stand in the weights.

    Raises:
        ModelError: MODEL is not a Lumina2, or its weights are quantised.
    """
    config = transformer_config(model)
    if getattr(model, "is_dynamic", bool)():  # newer cores page such a model's weights: they could not be shared
        model = model.clone(disable_dynamic=True)
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    network = model.model.diffusion_model
    with torch.inference_mode(False):
        shared = {name: share_memory(weight) for name, weight in network.state_dict(keep_vars=True).items()}
        for name, weight in shared.items():
            if weight.dtype not in _FLOAT_WEIGHTS:
                raise ModelError(f"MODEL is quantised ({name} is {weight.dtype}). Load it in bf16, fp16 or fp32.")
        return Lumina2Transformer.from_weights(config, shared)


def trainable_transformer(model: comfy.model_patcher.ModelPatcher) -> Lumina2Transformer:
    """``engine_transformer`` with all else released from the device."""
    transformer_config(model)
    comfy.model_management.unload_all_models()
    return engine_transformer(model)


def with_weights(model: comfy.model_patcher.ModelPatcher, weights: dict[str, Tensor]) -> Any:
    """A MODEL as wired, with other weights (under ComfyUI's names, without a prefix); the wired one stays as it is."""
    changed = model.clone()
    changed.add_patches({f"diffusion_model.{name}": ("set", (weight,)) for name, weight in weights.items()})
    return changed


@contextmanager
def training() -> Iterator[None]:
    """Autograd on, outside of inference mode; newer cores are told, as by their own trainer."""
    told = hasattr(comfy.model_management, "in_training")
    if told:
        comfy.model_management.in_training = True
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if told:
            comfy.model_management.in_training = False


def vae_fingerprint(vae: comfy.sd.VAE) -> str:
    """One VAE has one fingerprint, whatever loader it comes from."""
    comfy.model_management.load_models_gpu([vae.patcher])
    return fingerprint(diffusers_vae(vae.first_stage_model.state_dict().items()).items())


def clip_fingerprint(clip: comfy.sd.CLIP) -> str:
    """The text encoder's weights as they are in effect, under transformers' names.

    Raises:
        ModelError: CLIP is not Lumina2's.
    """
    encoder = _gemma(clip.cond_stage_model)
    clip.load_model()
    return fingerprint((name.removeprefix("model."), w) for name, w in encoder.transformer.state_dict().items())


def transformer_config(model: comfy.model_patcher.ModelPatcher) -> TransformerConfig:
    """The measures of a MODEL; a sentence says what was wired where it is not a Lumina2."""
    lumina = isinstance(model.model, comfy.model_base.Lumina2)
    network = getattr(model.model, "diffusion_model", None)
    z_image = lumina and getattr(network, "pad_tokens_multiple", None)  # ComfyUI has one class for both
    if z_image or not lumina:
        kind = "Z-Image" if z_image else type(model.model).__name__
        raise ModelError(f"MODEL is a {kind}; a Lumina2 is needed (Lumina-Image-2.0 or a fine-tune of it).")
    block = network.layers[0]
    return TransformerConfig(
        dim=network.dim,
        layers=len(network.layers),
        refiner_layers=len(network.noise_refiner),
        heads=network.n_heads,
        kv_heads=block.attention.n_kv_heads,
        caption_dim=network.cap_embedder[1].weight.shape[1],
        ffn_dim=block.feed_forward.w1.weight.shape[0],
        patch=network.patch_size,
        channels=network.in_channels,
        axes_dim=tuple(network.axes_dims),
        axes_len=tuple(network.axes_lens),
        rope_theta=float(network.rope_embedder.theta),
    )


def share_memory(weight: Tensor) -> Tensor:
    """A normal tensor over the memory of ``weight``, which may be an inference tensor. Nothing is copied."""
    alias = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return alias.set_(weight.untyped_storage(), weight.storage_offset(), weight.size(), weight.stride())


def embed_text(clip: comfy.sd.CLIP, text: str, max_tokens: int = 256) -> tuple[Tensor, bool]:
    """The text's embedding, (tokens, width), and whether it was cut to ``max_tokens``.

    The text is literal: ids come straight from the tokenizer, so brackets and ``embedding:`` mean themselves.
    """
    ids = _gemma(clip.tokenizer).tokenizer(text)["input_ids"]
    limit = min(max_tokens, MAX_CAPTION_TOKENS)
    embedding = clip.encode_from_tokens({_GEMMA: [[(i, 1.0) for i in ids[:limit]]]})
    return embedding[0], len(ids) > limit


def token_counter(clip: comfy.sd.CLIP) -> Callable[[str], int]:
    """How many tokens the text encoder reads of a text."""
    tokenizer = _gemma(clip.tokenizer).tokenizer
    return lambda text: len(tokenizer(text)["input_ids"])


def _gemma(part: Any) -> Any:
    """Lumina2's own in a CLIP's encoder or tokenizer; a sentence where the CLIP is another model's."""
    found = getattr(part, _GEMMA, None)
    if found is None:
        raise ModelError("CLIP is not Lumina2's. Load one of type lumina2 (a Gemma2).")
    return found


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of one part, from one safetensors file or from the shards that its index names."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        files = sorted({folder / name for name in read_json(indexes[0])["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))[:1]
    if not files:
        raise ModelError(f"{folder} has no safetensors file. Other formats are not read, for safety.")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights.update(load_file(file))
    return weights
