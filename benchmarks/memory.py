"""Peak memory at the size of Lumina-Image-2.0, from the start of a process to the end of one step.

    python -m benchmarks.memory [--json] [--case lora_bf16 …] [--layers 26]

Counted are anonymous and shared pages, and pages of files that hold model weights, so that every resident weight
counts, mapped or not: read from /proc/PID by another process, a hundred times a second, in decimal GB. Cases:

* ``lora_bf16``, ``lora_int8``: LoRA of rank 16 with gradient checkpointing, base in bf16 or int8.
* ``full``: full fine-tune with 8-bit states, each weight updated as its gradient arrives.
* ``startup``: the text encoder (Gemma2-2B) encodes a caption and goes, the VAE a picture and goes, the transformer is
  loaded.
* ``process``: the imports of a LoRA training alone; only where it is asked for.

26+2+2 layers of random weights in bf16 (2.6 B parameters) from a safetensors file that is made once and kept in
~/.cache/lumina2-trainer; batch 1, 64 caption tokens, 512 px. The forecast of ``training.run.forecast`` stands beside.
With ``--json`` the last line of stdout is JSON and all else goes to stderr. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path.home() / ".cache" / "lumina2-trainer" / "memory"
CASES = ("lora_bf16", "lora_int8", "full", "startup")
TOKENS, SIDE, RANK = 64, 64, 16  # caption tokens; latent cells of 512 px
EVERY_S, MAPPED_EVERY_S = 0.01, 0.5
GEMMA = {  # Gemma2-2B
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout, all else on stderr")
    parser.add_argument("--case", action="append", choices=(*CASES, "process"))
    parser.add_argument("--layers", type=int, default=26, help="main blocks; fewer only try the benchmark out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.layers)
        return
    out = sys.stderr if options.json else sys.stdout
    results = []
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        for case in options.case or CASES:
            prepare(case, options.layers)
            began = time.perf_counter()
            peak, peak_rss = watch(case, options.layers)
            seconds = time.perf_counter() - began
            expected = forecast_bytes(case, options.layers)
            results.append(
                {
                    "case": case,
                    "peak_gb": round(peak / 1e9, 3),
                    "peak_rss_gb": round(peak_rss / 1e9, 3),
                    "forecast_gb": round(expected / 1e9, 3),
                }
            )
            print(
                f"{case:10} peak {peak / 1e9:6.2f} GB   resident {peak_rss / 1e9:6.2f} GB   "
                f"forecast {expected / 1e9:6.2f} GB ({expected / peak - 1:+.1%})   {seconds:4.0f} s",
                file=out,
                flush=True,
            )
    if options.json:
        print(json.dumps(results))


# Watching


def watch(case: str, layers: int) -> tuple[int, int]:
    """The peaks of a process that does the case: what is counted, and all that was resident."""
    command = [sys.executable, "-m", "benchmarks.memory", "--worker", case, "--layers", str(layers)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    peak = peak_rss = mapped = 0
    look = 0.0
    while child.poll() is None:
        with contextlib.suppress(OSError, TypeError):  # it may end between two reads
            now = time.perf_counter()
            if now >= look:  # reading smaps of gigabytes would hold up the process at every turn
                mapped, look = mapped_weights(child.pid), now + MAPPED_EVERY_S
            own, high = own_pages(child.pid)
            peak, peak_rss = max(peak, own + mapped), max(peak_rss, high)
        time.sleep(EVERY_S)
    if child.returncode:
        raise SystemExit(f"{case} ended with {child.returncode}.")
    return peak, peak_rss


def own_pages(pid: int) -> tuple[int, int]:
    """Bytes of anonymous and shared pages; and the high-water mark of everything."""
    status = Path(f"/proc/{pid}/status").read_text()
    anonymous, shared, high = (
        1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])  # type: ignore[index]
        for name in ("RssAnon", "RssShmem", "VmHWM")
    )
    return anonymous + shared, high


def mapped_weights(pid: int) -> int:
    """Resident bytes of mapped files that hold weights."""
    counted = 0
    weights = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if not line.split(None, 1)[0].endswith(":"):
            weights = line.endswith((".safetensors", ".gguf", ".bin"))
        elif weights and line.startswith("Rss:"):
            counted += int(line.split()[1]) * 1024
    return counted


# The cases


def work(case: str, layers: int) -> None:
    """What a run does, in this process."""
    from training.model.loading import return_freed_memory

    return_freed_memory()
    if case == "startup":
        encode_text()
        encode_picture()
    import torch

    from training.adapter.lora import add_lora
    from training.config.optim import OptimizerSettings
    from training.config.precision import PrecisionSettings
    from training.config.settings import LoRASettings
    from training.model.loading import load_transformer
    from training.objective.loss import add_noise, velocity

    if case == "process":
        return
    torch.manual_seed(0)
    mode = "int8-torchao" if case == "lora_int8" else "no_change"
    transformer = load_transformer(_transformer_file(layers), PrecisionSettings(base_model_precision=mode))
    if case == "startup":
        return
    transformer.checkpoint_every = 1
    if case == "full":
        from training.optim.backward import OptimizerInBackward

        settings = OptimizerSettings("ao-adamw8bit", 1e-5, grad_clip_method="update", fused_backward=True)
        transformer.requires_grad_(True)
        names, weights = zip(*transformer.named_parameters(), strict=True)
        OptimizerInBackward([{"params": list(weights), "names": list(names), "lr": 1e-5}], settings, 0)
    else:
        from training.optim.build import build_optimizer

        adapter = add_lora(transformer, LoRASettings(RANK), 0)
        group = {"params": list(adapter.values()), "names": list(adapter), "lr": 1e-4}
        optimizer = build_optimizer([group], OptimizerSettings(), 0)
    latents, noise = torch.randn(2, 1, 16, SIDE, SIDE)
    captions, sigmas = torch.randn(1, TOKENS, transformer.config.caption_dim), torch.tensor([0.5])
    seen = add_noise(latents, noise, sigmas), 1 - sigmas, captions, (TOKENS,)
    loss = (transformer(*seen).float() - velocity(latents, noise)).square().mean()
    loss.backward()
    if case != "full":
        torch.nn.utils.clip_grad_norm_(list(adapter.values()), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
    print(f"{case}: loss {loss.item():.3f}", file=sys.stderr)


def encode_text() -> None:
    import torch
    from transformers import Gemma2Model

    from training.model.loading import TensorFiles, fill

    config = _gemma_config()
    with torch.device("meta"):
        gemma = Gemma2Model(config)
    with TensorFiles(FOLDER / "text_encoder.safetensors") as files:
        fill(gemma, files)
    gemma.rotary_emb = type(gemma.rotary_emb)(config)
    ids = torch.arange(TOKENS)[None] + 5
    with torch.no_grad():
        embedded = torch.nn.functional.embedding(ids, gemma.embed_tokens.weight).float()
        states = gemma(inputs_embeds=embedded * GEMMA["hidden_size"] ** 0.5, output_hidden_states=True).hidden_states
    print(f"caption: {tuple(states[-2].shape)} {states[-2].abs().mean():.4f}", file=sys.stderr)


def encode_picture() -> None:
    import torch
    from diffusers import AutoencoderKL

    from training.model.loading import TensorFiles, fill

    with torch.device("meta"):
        vae = AutoencoderKL(**_vae_config())
    with TensorFiles(FOLDER / "vae.safetensors") as files:
        fill(vae, files, torch.float32)
    with torch.no_grad():
        mean = vae.encode(torch.rand(1, 3, 8 * SIDE, 8 * SIDE)).latent_dist.mean
    print(f"picture: {tuple(mean.shape)}", file=sys.stderr)


def forecast_bytes(case: str, layers: int) -> int:
    import torch

    from training.adapter.lora import add_lora
    from training.config.precision import PrecisionSettings
    from training.config.settings import LoRASettings
    from training.model.linear import computed_in
    from training.run.forecast import PROCESS, Shape, forecast, measure, startup_peak

    if case == "process":
        return PROCESS
    if case == "startup":
        files = (FOLDER / "text_encoder.safetensors", FOLDER / "vae.safetensors", _transformer_file(layers))
        text, vae, transformer = (path.stat().st_size for path in files)
        return startup_peak(text, 2 * vae, transformer)

    def adapt(transformer: Any) -> None:
        if case == "full":
            transformer.requires_grad_(True)
        else:
            add_lora(transformer, LoRASettings(RANK), 0)

    computed = computed_in(torch.bfloat16, torch.device("cpu"))
    measured = measure(_config(layers), Shape(1, SIDE, SIDE, TOKENS), adapt, computed=computed)
    settings = PrecisionSettings(
        base_model_precision="int8-torchao" if case == "lora_int8" else "no_change", gradient_checkpointing=True
    )
    optimizer = "ao-adamw8bit" if case == "full" else "torch-adamw"
    return forecast(measured, settings, optimizer, fused_backward=case == "full").total


# The files


def prepare(case: str, layers: int) -> None:
    """Make the files that a case reads, once."""
    import torch

    from training.model.transformer import Lumina2Transformer

    made: list[tuple[Path, Any]] = []
    with torch.device("meta"):
        if case != "process":
            made.append((_transformer_file(layers), Lumina2Transformer(_config(layers))))
        if case == "startup":
            from diffusers import AutoencoderKL
            from transformers import Gemma2Model

            made.append((FOLDER / "text_encoder.safetensors", Gemma2Model(_gemma_config())))
            made.append((FOLDER / "vae.safetensors", AutoencoderKL(**_vae_config())))
    for path, module in made:
        if not path.exists():
            print(f"making {path}", file=sys.stderr)
            _write_random(path, {name: tuple(weight.shape) for name, weight in module.state_dict().items()})


def _write_random(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Random bf16 weights, written in pieces: normal with a deviation of 0.02, norms all ones."""
    import torch

    from training.files import atomic_path

    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    pool = (torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for shape in shapes.values():
            for piece in _pieces(torch.Size(shape).numel(), len(pool)):
                values = torch.ones(piece).bfloat16() if len(shape) == 1 else pool[:piece]
                file.write(values.view(torch.int16).numpy().tobytes())


def _pieces(count: int, largest: int) -> Iterator[int]:
    while count > 0:
        yield min(count, largest)
        count -= largest


def _transformer_file(layers: int) -> Path:
    return FOLDER / f"transformer-{layers}.safetensors"


def _config(layers: int) -> Any:
    from training.model.config import TransformerConfig

    return replace(TransformerConfig(), layers=layers)


def _gemma_config() -> Any:
    from transformers import Gemma2Config

    return Gemma2Config(**GEMMA)


def _vae_config() -> dict[str, Any]:
    """The Flux VAE, 84 M parameters."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


if __name__ == "__main__":
    main()
