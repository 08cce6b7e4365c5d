"""The nano VAE: 16 channels, factor 8, in a shape that ComfyUI's native VAE loads."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .pictures import Emoji

SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159  # what ComfyUI's Flux latent format expects
WIDTHS = (32, 64, 64, 64)


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=32,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
        use_quant_conv=True,
        use_post_quant_conv=True,
        mid_block_add_attention=True,
    )


def loss_of(pictures: Tensor, restored: Tensor, kl: Tensor) -> Tensor:
    """Detail, edges and, at an eighth of the size, colours (without that last term colours fade)."""
    error = restored - pictures
    gradient = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    half, eighth = F.avg_pool2d(error, 2).abs().mean(), F.avg_pool2d(error, 8).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * half + eighth + 0.5 * gradient + 1e-6 * kl


def draw(emoji: Emoji, rows: Tensor, generator: torch.Generator) -> Tensor:
    """A batch, mirrored half of the time, and recoloured one time in twenty so that styles survive too."""
    colour, alpha = emoji.colour[rows], emoji.alpha[rows]
    if torch.rand((), generator=generator) < 0.5:
        colour, alpha = colour.flip(3), alpha.flip(3)
    changed = (torch.rand(len(rows), 1, 1, 1, generator=generator) < 1 / 20).float()
    background = 1 - changed * torch.rand(len(rows), 3, 1, 1, generator=generator)
    pictures = (colour + (1 - alpha) * background) * 2 - 1
    order = torch.randperm(3, generator=generator)
    return torch.where(changed.bool(), pictures[:, order], pictures)


@torch.no_grad()
def restore(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    batches = pictures.split(16)
    return torch.cat([vae.decode(vae.encode(b).latent_dist.mean).sample for b in batches]).clamp(-1, 1)


def psnr_db(pictures: Tensor, restored: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures in [-1, 1]."""
    return 10 * math.log10(4 / (pictures - restored).square().mean().item())


def train_vae(
    emoji: Emoji,
    minutes: float,
    out: Path,
    start: Path | None = None,
    decoder_only: bool = False,
    rate: float = 3e-3,
    batch: int = 8,
) -> None:
    """Train for ``minutes`` of wall time and write ``out``; ``decoder_only`` keeps the latents as they are."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae = AutoencoderKL.from_pretrained(start, torch_dtype=torch.float32) if start else new_vae()
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    weights = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=1e-3)
    training = (~emoji.held_out).nonzero().squeeze(1)
    held_out = emoji.on()[emoji.held_out]

    begin, step, reported = time.monotonic(), 0, 0.0
    while (elapsed := time.monotonic() - begin) < minutes * 60:
        decay = 0.5 + 0.5 * math.cos(math.pi * elapsed / (minutes * 60))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * decay
        pictures = draw(emoji, training[torch.randint(len(training), (batch,), generator=generator)], generator)
        with torch.set_grad_enabled(not decoder_only):
            mean, log_variance = vae.quant_conv(vae.encoder(pictures)).chunk(2, 1)
            log_variance = log_variance.clamp(-30, 20)
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape, generator=generator)
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
        loss = loss_of(pictures, vae.decoder(vae.post_quant_conv(latents)), kl)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        if elapsed > reported:
            quality = psnr_db(held_out, restore(vae, held_out))
            print(f"vae {step} steps {elapsed:.0f} s loss {loss.item():.4f} held out {quality:.2f} dB", file=sys.stderr)
            reported += 120
            vae.save_pretrained(out)
    vae.save_pretrained(out)
    print(f"vae {step} steps held out {psnr_db(held_out, restore(vae, held_out)):.2f} dB", file=sys.stderr)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold mean and deviation of the latents into the quant convolutions.

    Afterwards ``(z - 0.1159) * 0.3611`` of the training pictures has mean 0 in every channel and deviation 1.
    """
    batches = pictures.split(16)
    latents = torch.cat([vae.encode(b).latent_dist.mean for b in batches])
    mean = latents.mean((0, 2, 3))
    deviation = (latents - mean.view(1, -1, 1, 1)).std()
    factor = 1 / (deviation * SCALING_FACTOR)
    encoder, decoder, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    encoder.weight[:channels] *= factor
    encoder.bias[:channels] = (encoder.bias[:channels] - mean) * factor + SHIFT_FACTOR
    encoder.bias[channels:] += 2 * factor.log()
    decoder.bias += decoder.weight[:, :, 0, 0] @ (mean - SHIFT_FACTOR / factor)
    decoder.weight /= factor


def write_vae(vae: AutoencoderKL, folder: Path) -> None:
    """Write the VAE in bf16, contiguous, with diffusers' config."""
    vae.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
