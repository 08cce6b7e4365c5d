"""The nano transformer, pre-trained with this project's own network and objective."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from training.data.prompts import SYSTEM_PROMPTS, with_system_prompt
from training.model.config import TransformerConfig
from training.model.keys import diffusers_weights, from_diffusers
from training.model.transformer import Lumina2Transformer
from training.objective.loss import add_noise, velocity
from training.objective.sigmas import logit_normal_sigmas

from .pictures import Emoji
from .text import WIDTH, embed

SHIFT = 2.0  # of the noise schedule at inference: small pictures need less than Lumina2's 6
CONFIG = {
    "sample_size": 8,
    "in_channels": 16,
    "hidden_size": 256,
    "num_layers": 6,
    "num_refiner_layers": 2,
    "num_attention_heads": 8,
    "num_kv_heads": 4,
    "multiple_of": 32,
    "cap_feat_dim": WIDTH,
    "axes_dim_rope": (8, 12, 12),
}


def new_transformer() -> Lumina2Transformer:
    """Fresh weights: every residual branch closed and the output zero, as in DiT's adaLN-Zero."""
    transformer = Lumina2Transformer(TransformerConfig.from_diffusers(CONFIG))
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if name.endswith("adaLN_modulation.1") or name == "final_layer.linear":
            nn.init.zeros_(module.weight)
    return transformer


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents of pictures in [-1, 1], in the transformer's units."""
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in pictures.split(32)])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def batches(texts: list[list[Tensor]], size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Rows and their texts for ever: three batches of four with system prompt, one of ten with the empty text.

    Captions of like length share a batch, so that hardly a token is padding.
    """
    count = len(texts)
    while True:
        order = torch.randperm(count, generator=generator)
        chunks = []
        for part in order.split(8 * size):
            by_length = sorted(part.tolist(), key=lambda row: len(texts[row][0]))
            chunks += [by_length[i : i + size] for i in range(0, len(by_length), size)]
        for index in torch.randperm(len(chunks), generator=generator).tolist():
            draw = torch.rand((), generator=generator)
            kind = 2 if draw < 0.1 else (0 if draw < 0.85 else 1)
            yield torch.tensor(chunks[index]), [texts[row][kind] for row in chunks[index]]


def pad(texts: list[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    return nn.utils.rnn.pad_sequence(texts, batch_first=True), tuple(len(text) for text in texts)


def train_dit(
    emoji: Emoji,
    folder: Path,
    minutes: float,
    state: Path,
    start: Path | None = None,
    rate: float = 1.2e-3,
    batch: int = 128,
) -> None:
    """Train for ``minutes`` and write ``folder/transformer``; ``state`` keeps the averaged weights on the way.

    ``start`` is a transformer's folder to go on from, with other draws than the first time.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1 if start else 0)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    latents = encode(vae, emoji.on()[~emoji.held_out])
    names = [name for name, out in zip(emoji.names, emoji.held_out.tolist(), strict=True) if not out]
    with_prompt = embed([with_system_prompt(name, SYSTEM_PROMPTS["superior"]) for name in names], folder)
    bare, empty = embed(names, folder), embed([""], folder)[0]
    texts = [[a, b, empty] for a, b in zip(with_prompt, bare, strict=True)]

    transformer = read_transformer(start) if start else new_transformer()
    average = copy.deepcopy(transformer).requires_grad_(False)
    decayed = [p for p in transformer.parameters() if p.ndim > 1]
    plain = [p for p in transformer.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)

    begin, step, smooth, saved = time.monotonic(), 0, 1.0, 0.0
    for rows, drawn in batches(texts, batch, generator):
        elapsed = time.monotonic() - begin
        done = elapsed / (minutes * 60)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 200) * min(1, max(0.02, (1 - done) / 0.4))
        sigmas = logit_normal_sigmas(torch.randn(len(rows), generator=generator))
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        prediction = transformer(add_noise(clean, noise, sigmas), 1 - sigmas, *pad(drawn))
        loss = (prediction.float() - velocity(clean, noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        step += 1
        keep = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(transformer.parameters()), 1 - keep)
        smooth += 0.02 * (loss.item() - smooth)
        if step % 50 == 0:
            print(f"dit {step} steps {elapsed:.0f} s loss {smooth:.4f}", file=sys.stderr, flush=True)
        if elapsed > saved + 300:
            write_transformer(average, state)
            saved = elapsed
    print(f"dit {step} steps loss {smooth:.4f}", file=sys.stderr)
    write_transformer(average, folder / "transformer")
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT).save_pretrained(folder / "scheduler")


def read_transformer(folder: Path) -> Lumina2Transformer:
    transformer = new_transformer()
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    transformer.load_state_dict(from_diffusers(weights, list(transformer.state_dict())))
    return transformer


def write_transformer(transformer: Lumina2Transformer, folder: Path) -> None:
    """Write the transformer in bf16 in diffusers' layout."""
    weights: dict[str, Tensor] = {}
    for name, weight in transformer.state_dict().items():
        weights.update(diffusers_weights(name, weight, transformer.config))
    with torch.device("meta"):
        model = Lumina2Transformer2DModel(**CONFIG)
    model.load_state_dict({n: w.to(torch.bfloat16).contiguous() for n, w in weights.items()}, assign=True)
    model.save_pretrained(folder)


def write_index(folder: Path) -> None:
    index = {
        "_class_name": "Lumina2Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizer"],
        "transformer": ["diffusers", "Lumina2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
