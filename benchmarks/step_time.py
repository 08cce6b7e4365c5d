"""How long a LoRA step takes, beside its peers and beside what it cannot be faster than.

    python -m benchmarks.step_time [--models nano,wide] [--dtypes fp32,bf16] [--rounds 15] [--repeats 3] [--json]
        [--without comfyui]

One step is forward, loss, backward and AdamW, with a LoRA of rank 16 on attention and no checkpointing, of

- ours: the engine's transformer, with captions refined before as in training (the context refiner is not trained, and
  what it makes of a caption is kept with the embedding); with ``torch_compile``, which compiles each block, where there
  is a C++ compiler, and ``ours_eager`` without;
- diffusers' ``Lumina2Transformer2DModel`` with PEFT, the captions trimmed to the longest, and padded to 256 as its
  example script has them;
- ComfyUI's own ``TrainLoraNode``, which has no choice of targets and trains every weight;
- the floor: the frozen weights' products in both directions as far as gradients are needed, attention forward and
  backward, the LoRA's products and AdamW, on the step's true tokens, into buffers that are used again.

``nano``: the bundled model. ``wide``: two layers of each kind at Lumina-Image-2.0's width, 514 M parameters.
``equal``: one picture of 256 px with 64 caption tokens; ``mixed``: four with 8, 40, 120 and 200. All have the same
weights and the same batch and take turns within one run, in an order drawn for each round; a figure is the median of
the rounds, of the repeat with the fastest floor.
A dtype that this CPU has no instructions for is listed and not run.

With ``--json`` the last line of stdout is a list of ``{model, dtype, native, captions, ours_s, ours_eager_s,
diffusers_peft_s, diffusers_padded_s, comfyui_s, floor_s}``, all else goes to stderr. $COMFYUI_PATH names the ComfyUI
(default: .comfyui).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from training.adapter.lora import add_lora
from training.config.settings import LoRASettings
from training.model.config import TransformerConfig
from training.model.keys import diffusers_weights
from training.model.linear import computed_in
from training.model.transformer import Lumina2Transformer

ROOT = Path(__file__).resolve().parent.parent
RANK, PADDED_TOKENS, LATENT_SIDE = 16, 256, 32
NANO = TransformerConfig(dim=256, layers=6, heads=8, kv_heads=4, caption_dim=192, ffn_dim=1024, axes_dim=(8, 12, 12))
MODELS = {"nano": NANO, "wide": replace(TransformerConfig(), layers=2)}
CAPTIONS = {"equal": (64,), "mixed": (8, 40, 120, 200)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTENDERS = ("ours", "ours_eager", "diffusers_peft", "diffusers_padded", "comfyui", "floor")

Step = Callable[[], None]


@dataclass(frozen=True)
class Batch:
    latents: torch.Tensor
    t: torch.Tensor
    captions: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def mask(self) -> torch.Tensor:
        return torch.arange(self.captions.shape[1])[None] < torch.tensor(self.lengths)[:, None]

    def padded_to(self, tokens: int) -> Batch:
        return replace(self, captions=F.pad(self.captions, (0, 0, 0, tokens - self.captions.shape[1])))


def make_batch(config: TransformerConfig, lengths: tuple[int, ...], dtype: torch.dtype) -> Batch:
    latents = torch.randn(len(lengths), config.channels, LATENT_SIDE, LATENT_SIDE, dtype=dtype)
    captions = torch.randn(len(lengths), max(lengths), config.caption_dim, dtype=dtype)
    batch = Batch(latents, torch.rand(len(lengths)), captions, lengths)
    return replace(batch, captions=captions * batch.mask[..., None])


def random_transformer(config: TransformerConfig, dtype: torch.dtype) -> Lumina2Transformer:
    torch.manual_seed(0)
    return Lumina2Transformer(config).to(dtype).requires_grad_(False)


def trained(parameters: list[torch.nn.Parameter], predict: Callable[[], torch.Tensor], target: torch.Tensor) -> Step:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        (predict().float() - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(model: Lumina2Transformer, batch: Batch, compiled: bool = False) -> Step:
    shared = Lumina2Transformer.from_weights(model.config, model.state_dict())  # an adapter of its own on the weights
    weights = add_lora(shared, LoRASettings(RANK), 0)
    if compiled:
        shared.compile_blocks()
    target = torch.randn(batch.latents.shape)
    with torch.no_grad():
        text = shared.refine(batch.captions, batch.lengths)
    return trained(list(weights.values()), lambda: shared.predict(batch.latents, batch.t, text, batch.lengths), target)


def has_compiler() -> bool:
    from torch._inductor import cpp_builder, exc

    try:
        return bool(cpp_builder.get_cpp_compiler())
    except exc.InvalidCxxCompiler:
        return False


def diffusers_model(model: Lumina2Transformer) -> torch.nn.Module:
    from diffusers import Lumina2Transformer2DModel

    config = model.config
    with torch.device("meta"):
        theirs = Lumina2Transformer2DModel(
            in_channels=config.channels,
            hidden_size=config.dim,
            num_layers=config.layers,
            num_refiner_layers=config.refiner_layers,
            num_attention_heads=config.heads,
            num_kv_heads=config.kv_heads,
            multiple_of=32,
            cap_feat_dim=config.caption_dim,
            axes_dim_rope=config.axes_dim,
        )
    theirs.rope_embedder.freqs_cis = theirs.rope_embedder._precompute_freqs_cis(  # not a weight: made anew
        list(config.axes_dim), list(config.axes_len), 10000
    )
    weights: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        weights |= diffusers_weights(name, weight, config)
    theirs.load_state_dict(weights, assign=True)
    return theirs.requires_grad_(False)


def diffusers_peft(theirs: torch.nn.Module, batch: Batch, name: str) -> Step:
    from peft import LoraConfig

    targets = r"(layers|noise_refiner)\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)"  # what ours trains
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), adapter_name=name)
    parameters = [p for n, p in theirs.named_parameters() if f".{name}." in n]
    target, mask = torch.randn(batch.latents.shape), batch.mask
    step = trained(
        parameters,
        lambda: theirs(batch.latents, batch.t, batch.captions, mask, return_dict=False)[0],
        target,
    )

    def run() -> None:
        theirs.set_adapter(name)
        step()

    return run


class ComfyUI:
    """``TrainLoraNode`` in a thread, held between its steps."""

    def __init__(self, model: Lumina2Transformer, batch: Batch, dtype: str, steps: int) -> None:
        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._train, args=(model, batch, dtype, steps), daemon=True)
        self._thread.start()
        self._wait()  # until it stands before its first step

    def step(self) -> None:
        self._turn.release()
        self._wait()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error:
            raise RuntimeError("ComfyUI's TrainLoraNode failed") from self._error

    def _held(self, count: int, **_: object) -> Any:
        outer = self

        class Steps:
            def __iter__(self) -> Iterator[int]:
                for number in range(count):
                    outer._done.release()
                    outer._turn.acquire()
                    yield number
                outer._done.release()

            def set_postfix(self, _: object) -> None:
                pass

        return Steps()

    def _train(self, model: Lumina2Transformer, batch: Batch, dtype: str, steps: int) -> None:
        import comfy_extras.nodes_train as nodes_train

        try:
            nodes_train.trange = self._held
            patcher = comfyui_model(model)
            latents = [{"samples": sample[None].float()} for sample in batch.latents]
            conditions = [
                [[caption[None, :tokens], {"num_tokens": tokens, "attention_mask": torch.ones(1, tokens)}]]
                for caption, tokens in zip(batch.captions, batch.lengths, strict=True)
            ]
            if len(latents) == 1:  # a single one raises UnboundLocalError in 0.3.75
                latents, conditions = latents * 2, conditions * 2
            with torch.inference_mode():
                nodes_train.TrainLoraNode.execute(
                    [patcher], latents, conditions, [len(batch.latents)], [steps], [1], [1e-4], [RANK], ["AdamW"],
                    ["MSE"], [0], [dtype], [dtype], ["LoRA"], [False], ["[None]"],
                )  # fmt: skip
        except BaseException as error:
            self._error = error
            self._done.release()


def import_comfyui() -> None:
    comfyui = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui").resolve()
    if not (comfyui / "main.py").exists():
        raise SystemExit("There is no ComfyUI. Run scripts/setup, or set COMFYUI_PATH.")
    for name in [name for name in sys.modules if name.split(".")[0] in ("nodes", "comfy_extras")]:
        del sys.modules[name]
    sys.path.insert(0, str(comfyui))  # before the project, whose package is also called nodes
    arguments, sys.argv = sys.argv, ["main.py", "--cpu", "--use-pytorch-cross-attention"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.model_management
    finally:
        sys.argv = arguments


def comfyui_model(model: Lumina2Transformer) -> Any:
    import comfy.model_patcher
    import comfy.supported_models

    config, weight = model.config, model.x_embedder.weight
    described = comfy.supported_models.Lumina2(
        {
            "image_model": "lumina2", "patch_size": config.patch, "in_channels": config.channels, "dim": config.dim,
            "cap_feat_dim": config.caption_dim, "n_layers": config.layers, "n_refiner_layers": config.refiner_layers,
            "qk_norm": True, "n_heads": config.heads, "n_kv_heads": config.kv_heads,
            "axes_dims": list(config.axes_dim), "axes_lens": list(config.axes_len), "rope_theta": config.rope_theta,
            "norm_eps": config.norm_eps, "ffn_dim_multiplier": (config.ffn_dim + 0.5) / config.dim, "multiple_of": 1,
        }
    )  # fmt: skip
    described.set_inference_dtype(weight.dtype, None)
    network = described.get_model({})
    network.diffusion_model.load_state_dict(
        model.state_dict() | {"norm_final.weight": torch.ones(config.dim, dtype=weight.dtype)}
    )
    return comfy.model_patcher.ModelPatcher(network, load_device=weight.device, offload_device=weight.device)


def floor(model: Lumina2Transformer, batch: Batch) -> Step:
    """What every LoRA step has to compute; see the module's docstring."""
    config, dtype, count = model.config, batch.latents.dtype, len(batch.lengths)
    image = (LATENT_SIDE // config.patch) ** 2
    joint = tuple(tokens + image for tokens in batch.lengths)

    @cache
    def source(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, dtype=dtype)

    @cache
    def result(rows: int, width: int) -> torch.Tensor:
        return torch.empty(rows, width, dtype=dtype)

    layers = products(model, batch)
    loras = [
        (torch.randn(RANK, weight.shape[1], dtype=dtype), torch.randn(weight.shape[0], RANK, dtype=dtype), rows, passes)
        for weight, rows, passes, adapted in layers
        if adapted
    ]
    parameters = [torch.nn.Parameter(torch.randn(w.shape)) for a, b, *_ in loras for w in (a, b)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-9, fused=True)
    heads = []
    for blocks, lengths in ((model.noise_refiner, (image,) * count), (model.layers, joint)):
        for _ in blocks:
            for tokens in sorted(set(lengths)):
                q, k, v = (
                    torch.randn(lengths.count(tokens), n, tokens, config.head_dim, dtype=dtype, requires_grad=True)
                    for n in (config.heads, config.kv_heads, config.kv_heads)
                )
                heads.append((q, k, v, torch.randn_like(q)))

    def step() -> None:
        with torch.no_grad():
            for weight, rows, passes, _ in layers:
                out, inner = weight.shape
                torch.mm(source(rows, inner), weight.T, out=result(rows, out))
                if passes:
                    torch.mm(source(rows, out), weight, out=result(rows, inner))
            for a, b, rows, passes in loras:
                x, grad, h = source(rows, a.shape[1]), source(rows, b.shape[0]), source(rows, RANK)
                torch.mm(x, a.T, out=result(rows, RANK))
                torch.mm(h, b.T, out=result(rows, b.shape[0]))
                torch.mm(grad, b, out=result(rows, RANK))
                torch.mm(grad.T, h, out=result(b.shape[0], RANK))
                torch.mm(h.T, x, out=result(RANK, a.shape[1]))
                if passes:
                    torch.mm(h, a, out=result(rows, a.shape[1]))
        for q, k, v, grad in heads:
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, enable_gqa=True), (q, k, v), grad)
        optimizer.step()

    return step


def products(model: Lumina2Transformer, batch: Batch) -> list[tuple[torch.Tensor, int, bool, bool]]:
    """Each product of a step: the frozen weight, its rows, whether a gradient goes through it, whether it has a LoRA.

    The captions are refined before. Nothing is trained below the first LoRA, so no gradient goes through that layer;
    modulation and the embedders take one row a picture, and none passes them.
    """
    count = len(batch.lengths)
    image = count * (LATENT_SIDE // model.config.patch) ** 2
    rows = {"noise_refiner": image, "layers": image + sum(batch.lengths), "x_embedder": image, "final_layer": image,
            "t_embedder": count}  # fmt: skip
    found, first = [], True
    for kind in ("t_embedder", "x_embedder", "noise_refiner", "layers", "final_layer"):
        for name, module in getattr(model, kind).named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            modulation = "adaLN" in name
            adapted = "attention" in name
            passes = kind in ("noise_refiner", "layers", "final_layer") and not modulation and not (adapted and first)
            first = first and not adapted
            found.append((module.weight, count if modulation else rows[kind], passes, adapted))
    return found


def floor_flops(model: Lumina2Transformer, batch: Batch) -> int:
    """Multiplications and additions of ``floor``, attention left out, by arithmetic."""
    total = 0
    for weight, rows, passes, adapted in products(model, batch):
        total += 2 * rows * weight.numel() * (1 + passes)
        if adapted:
            a, b = RANK * weight.shape[1], weight.shape[0] * RANK
            total += 2 * rows * ((a + b) + (a + 2 * b) + (a if passes else 0))
    return total


def measure(
    name: str, dtype_name: str, captions: str, rounds: int, repeats: int, without: Sequence[str] = ()
) -> dict[str, float]:
    """Median seconds of each contender, of the repeat whose floor was the fastest."""
    config, dtype, lengths = MODELS[name], DTYPES[dtype_name], CAPTIONS[captions]
    model = random_transformer(config, dtype)
    torch.manual_seed(1)
    batch = make_batch(config, lengths, dtype)
    theirs = diffusers_model(model)
    made: dict[str, Callable[[], Step]] = {
        "ours": lambda: ours(model, batch, compiled=has_compiler()),
        "ours_eager": lambda: ours(model, batch),
        "diffusers_peft": lambda: diffusers_peft(theirs, batch, "trimmed"),
        "diffusers_padded": lambda: diffusers_peft(theirs, batch.padded_to(PADDED_TOKENS), "padded"),
        "comfyui": lambda: ComfyUI(model, batch, dtype_name, (rounds + 1) * repeats).step,
        "floor": lambda: floor(model, batch),
    }
    steps = {contender: make() for contender, make in made.items() if contender not in without}
    best: dict[str, float] = {}
    order = random.Random(0)
    for _ in range(repeats):
        times: dict[str, list[float]] = {contender: [] for contender in steps}
        for turn in range(rounds + 1):  # the first round warms up
            for contender in order.sample(list(steps), len(steps)):  # whoever comes after a heavy one pays for it
                begun = time.perf_counter()
                steps[contender]()
                if turn:
                    times[contender].append(time.perf_counter() - begun)
        medians = {contender: statistics.median(seconds) for contender, seconds in times.items()}
        if not best or medians["floor"] < best["floor"]:
            best = medians
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--captions", default=",".join(CAPTIONS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without", default="", help="contenders to leave out: ComfyUI's takes most of the memory")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout, all else on stderr")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        for name in options.models.split(","):
            for dtype in options.dtypes.split(","):
                native = computed_in(DTYPES[dtype], torch.device("cpu")) is DTYPES[dtype]
                for captions in options.captions.split(","):
                    seconds: dict[str, float] = {}
                    if native:
                        with ProcessPoolExecutor(1, get_context("spawn"), import_comfyui) as alone:
                            how = (options.rounds, options.repeats, options.without.split(","))
                            begun = alone.submit(measure, name, dtype, captions, *how)
                            seconds = begun.result()
                    row = {"model": name, "dtype": dtype, "native": native, "captions": captions}
                    row |= {f"{contender}_s": seconds.get(contender) for contender in CONTENDERS}
                    rows.append(row)
                    print(describe(row), flush=True)
    if options.json:
        print(json.dumps(rows))


def describe(row: dict[str, Any]) -> str:
    head = f"{row['model']:5} {row['dtype']:4} {row['captions']:6}"
    if not row["native"]:
        return f"{head} not run: this CPU has no instructions for it"
    mine = row["ours_s"]
    there = [contender for contender in CONTENDERS[1:-1] if row[f"{contender}_s"] is not None]
    others = "  ".join(f"{c} {row[c + '_s']:.3f} s ({row[c + '_s'] / mine:.2f} ×)" for c in there)
    return f"{head} ours {mine:.3f} s = {mine / row['floor_s']:.3f} × the floor of {row['floor_s']:.3f} s;  {others}"


if __name__ == "__main__":
    with torch.enable_grad():
        main()
