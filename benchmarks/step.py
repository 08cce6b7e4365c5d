"""How long a LoRA step takes, beside diffusers with PEFT and beside the bare matrix products of such a step.

    python -m benchmarks.step [--json] [--size nano|wide] [--repeats 5]

``nano``: the bundled model's sizes, 8 pictures of 64 px. ``wide``: one block of each kind at Lumina-Image-2.0's width,
one picture of 256 px. Random weights in fp32, rank 16 on attention and feed-forward, captions of 40 tokens. Every
figure is the best of its repeats, taken in turns within one run. With ``--json`` the last line of stdout is JSON and
all else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.adapter.lora import add_lora, target_modules
from training.config.settings import LoRASettings
from training.model.config import TransformerConfig
from training.model.transformer import Lumina2Transformer

TOKENS, RANK = 40, 16
NANO = TransformerConfig(dim=256, layers=6, heads=8, kv_heads=4, caption_dim=192, ffn_dim=1024, axes_dim=(8, 12, 12))
SIZES = {
    "nano": (NANO, 8, 8),  # configuration, pictures, latent side
    "wide": (replace(TransformerConfig(), layers=1, refiner_layers=1), 1, 32),
}


def diffusers_config(config: TransformerConfig) -> dict[str, object]:
    return {
        "in_channels": config.channels,
        "hidden_size": config.dim,
        "num_layers": config.layers,
        "num_refiner_layers": config.refiner_layers,
        "num_attention_heads": config.heads,
        "num_kv_heads": config.kv_heads,
        "multiple_of": 32,
        "cap_feat_dim": config.caption_dim,
        "axes_dim_rope": config.axes_dim,
    }


def steps(size: str) -> dict[str, Callable[[], None]]:
    """One step of each contender: forward, loss, backward into the adapters."""
    from diffusers import Lumina2Transformer2DModel
    from peft import LoraConfig

    config, batch, side = SIZES[size]
    torch.manual_seed(0)
    latents = torch.randn(batch, config.channels, side, side)
    captions, t = torch.randn(batch, TOKENS, config.caption_dim), torch.rand(batch)
    mask = torch.ones(batch, TOKENS, dtype=torch.bool)

    ours = Lumina2Transformer(config).requires_grad_(False)
    modules = dict(ours.named_modules())
    shapes = {name: modules[name].weight.shape for name in target_modules(ours, "attention+ff")}
    add_lora(ours, LoRASettings(RANK, targets="attention+ff"), 0)
    theirs = Lumina2Transformer2DModel(**diffusers_config(config)).requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "feed_forward.linear_1", "feed_forward.linear_2"]
    theirs.add_adapter(LoraConfig(r=RANK, target_modules=[*targets, "feed_forward.linear_3"]))

    rows = batch * (side // config.patch) ** 2
    weights = [
        (torch.randn(shape), torch.randn(rows + (batch * TOKENS if name.startswith("layers") else 0), shape[1]))
        for name, shape in shapes.items()
    ]

    def engine() -> None:
        ours(latents, t, captions, (TOKENS,) * batch).square().mean().backward()

    def diffusers() -> None:
        theirs(latents, t, captions, mask, return_dict=False)[0].square().mean().backward()

    def products() -> None:
        for weight, x in weights:  # forward, and the gradient towards the input
            (x @ weight.T) @ weight

    return {"engine": engine, "diffusers+PEFT": diffusers, "bare products": products}


def best(contenders: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    found = dict.fromkeys(contenders, float("inf"))
    for _ in range(repeats + 1):  # the first round warms up and counts only if it was the fastest
        for name, step in contenders.items():
            begun = time.perf_counter()
            step()
            found[name] = min(found[name], time.perf_counter() - begun)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--size", choices=SIZES, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    out = sys.stderr if options.json else sys.stdout
    results = {}
    for size in options.size or list(SIZES):
        results[size] = best(steps(size), options.repeats)
        for name, seconds in results[size].items():
            ratio = seconds / results[size]["bare products"]
            print(f"{size:5} {name:15} {seconds:8.3f} s  {ratio:5.2f} × the bare products", file=out)
    if options.json:
        print(json.dumps({"seconds": results, "threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    with torch.enable_grad():
        main()
