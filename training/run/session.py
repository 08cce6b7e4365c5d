"""One LoRA training from the settings to the file: looked up, started or continued, and kept whatever happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter.adapter import add_adapter
from ..adapter.files import check_lora, read_lora, write_lora
from ..cache.latents import Encode, LatentCache
from ..cache.texts import TextCache
from ..config.settings import RESUME, TrainSettings, check_run_name
from ..errors import Lumina2Error, RunError, SettingError
from ..files import write_tensors
from ..model.fingerprint import fingerprint, transformer_fingerprint
from ..model.linear import release_scratch
from ..model.precision import choose_computing
from ..model.quantise import quantise
from ..model.transformer import Lumina2Transformer
from ..optim.averages import averaged
from .batches import Batches, Refiner
from .checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from .folder import Run, RunStore
from .identity import data_identity, decide, run_identity
from .loop import Losses, TrainState, new_state, read_losses, train

CAPTION_SIDE = ("cap_embedder.", "context_refiner.")  # depends on the caption alone


@dataclass(frozen=True)
class Request:
    """Which run is meant, beside the settings that decide its weights."""

    name: str
    resume: str = "continue"
    checkpoint: str = ""  # "<run>/checkpoint-400", where resume is "from checkpoint"
    continue_token: int = 0
    attempt: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a run gave: its LoRA, or the model trained in full, under ComfyUI's names; and its losses, step by step."""

    run: Run
    lora: dict[str, Tensor]
    losses: list[float]
    message: str


@dataclass(frozen=True)
class Watcher:
    """How a training talks while it runs."""

    say: Callable[[str], None]
    before_step: Callable[[int, float], None]  # (steps done, recent loss); what it raises ends the training there


def train_lora(
    transformer: Lumina2Transformer,
    latents: LatentCache,
    texts: TextCache,
    settings: TrainSettings,
    request: Request,
    store: RunStore,
    scale_latents: Callable[[Tensor], Tensor],
    watcher: Watcher,
    encode: Encode | None = None,
) -> Outcome:
    """Train, go on training, or hand out what was trained before (see ``identity.decide``).

    The transformer's frozen weights stay as they are; the object itself carries the adapter afterwards.
    Whatever ends the training early leaves a checkpoint, the LoRA so far and a true ``run.json``, and is raised again.

    Args:
        encode: the VAE, for datasets that are encoded while training.

    Raises:
        SettingError, RunError, ModelError: the run cannot start; nothing was written.
    """
    name = check_run_name(request.name)
    start = _start(store, request, settings.steps)
    model = transformer_fingerprint(transformer.state_dict().items(), transformer.config)
    identity = run_identity(settings, data_identity(latents, texts), model, request.attempt, start)
    full = settings.full_fine_tune
    modules = {n: m.weight.to("meta") for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    decision = decide(store, name, identity, settings.steps, request.continue_token, full)
    file = store.file(decision.folder, full)
    notes = [decision.message, *_differences(store, start, settings)]
    watcher.say("; ".join(notes))
    events = store.root / decision.folder / "events.jsonl"
    if decision.done and decision.run:
        if full:
            lora = _trained_model(file, decision.checkpoint, transformer)
        else:
            lora = _trained_lora(file, decision.checkpoint, modules)
        return Outcome(decision.run, lora, read_losses(events, decision.run.step), decision.message)

    with Batches(latents, texts, settings, scale_latents, encode) as batches:
        caption_side = _caption_side(transformer)
        state, said = _prepare(transformer, settings)
        notes += said
        if not any(name.startswith(CAPTION_SIDE) for name in state.adapter.weights):
            batches.refine_with(_refiner(transformer, caption_side, settings))
        checkpoint = decision.checkpoint or start
        if checkpoint:
            load_checkpoint(checkpoint, state)
        run = Run(
            name=name,
            folder=decision.folder,
            identity=identity,
            status="running",
            step=state.step,
            target=settings.steps,
            continue_token=request.continue_token,
            settings=settings.written(),
            model=model,
            start=f"{start.path.parent.name}/{start.path.name}" if start else "",
            notes=tuple(notes),
        )
        store.save(run)
        losses = Losses(events, read_losses(events, state.step))
        first = state.step

        def keep(state: TrainState, status: str = "running") -> Run:
            """A checkpoint, and the run's file that says so; at the end the LoRA too."""
            ended = status != "running"
            tensors, metadata = _exported(state, run, settings) if ended or not full else (None, {})
            save_checkpoint(store.path(run), identity, state, None if full else tensors, metadata)
            remove_old_checkpoints(store.path(run), settings.checkpoints_total_limit)
            if tensors is not None and ended:
                write(file, tensors, metadata)
                if state.ema:
                    with state.ema.in_place():
                        averages, _ = state.adapter.export()
                    write(file.with_stem(f"{file.stem}-ema"), averages, metadata)
            return store.save(replace(run, status=status, step=state.step))

        def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
            if full:
                write_tensors(path, tensors, metadata)
            else:
                write_lora(path, tensors, modules, metadata)

        def before_step(done: int) -> None:
            watcher.before_step(done, losses.recent())

        try:
            train(transformer, state, batches, settings, losses, before_step, keep)
        except BaseException as error:
            status = "failed" if isinstance(error, Lumina2Error) else "interrupted"
            broken = settings.optimizer.fused_backward and isinstance(error, RunError)
            losses.save()
            if state.step > first and not broken:
                keep(state, status)
            else:
                store.save(replace(run, status=status))
            raise
        run = keep(state, "finished")
    lora, _ = _exported(state, run, settings)
    return Outcome(run, lora, losses.values, "; ".join(notes))


def _prepare(transformer: Lumina2Transformer, settings: TrainSettings) -> tuple[TrainState, list[str]]:
    """The transformer made ready to be trained, in place, and what the user is told of it."""
    precision = settings.precision
    device = transformer.final_layer.linear.weight.device
    if precision.musubi_blocks_to_swap:
        raise SettingError(
            f"musubi_blocks_to_swap is {precision.musubi_blocks_to_swap}, but blocks are not swapped yet. Set it to 0, "
            "and base_model_precision to int8-torchao, which saves as much."
        )
    computing = choose_computing(precision, device)
    adapter = add_adapter(transformer, settings.adapter, settings.seed)
    if precision.quantised:
        via = torch.device("cpu") if precision.quantize_via == "cpu" else None
        quantise(transformer, precision.base_model_precision, via)
    transformer.compute_dtype = computing.dtype
    transformer.checkpoint_every = precision.checkpoint_every(sum(p.numel() for p in transformer.parameters()))
    transformer.checkpoint_selective = precision.gradient_checkpointing_selective
    transformer.checkpoint_offload = precision.gradient_checkpointing_backend == "unsloth"
    if precision.torch_compile:
        transformer.compile_blocks()
    return new_state(adapter, settings, computing.loss_scaling), [adapter.describe(), *computing.notes]


def _caption_side(transformer: Lumina2Transformer) -> str:
    """A fingerprint of what a caption passes before it meets the picture."""
    return fingerprint((n, w) for n, w in transformer.state_dict().items() if n.startswith(CAPTION_SIDE))


def _refiner(transformer: Lumina2Transformer, weights: str, settings: TrainSettings) -> Refiner:
    """What keeps refined captions, in what the transformer computes in, so that nothing is lost by it."""

    @torch.no_grad()
    def refine(embedding: Tensor) -> Tensor:
        device = transformer.final_layer.linear.weight.device
        refined = transformer.refine(embedding[None].to(device), (len(embedding),))
        release_scratch()
        return refined

    return Refiner(f"{weights} {settings.precision.base_model_precision} {transformer.dtype}", refine)


def _exported(state: TrainState, run: Run, settings: TrainSettings) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What was trained as ComfyUI reads it, and what its file says of itself."""
    with averaged(state.optimizer):
        tensors, about = state.adapter.export()
    return tensors, _metadata(run, settings, state.step) | about


def _start(store: RunStore, request: Request, steps: int) -> Checkpoint | None:
    """The checkpoint that was named to start from."""
    if request.resume not in RESUME:
        raise SettingError(f"resume is {request.resume!r}; choose one of {', '.join(RESUME)}.")
    if request.resume == "continue":
        return None
    path = (store.root / request.checkpoint.strip()).resolve()
    inside = request.checkpoint.strip() and path.is_relative_to(store.root.resolve())
    found = (read_checkpoint(path) or newest_checkpoint(path)) if inside else None
    if not found:
        there = sorted(p.parent.relative_to(store.root).as_posix() for p in store.root.glob("*/*/checkpoint.json"))
        raise RunError(
            f"There is no checkpoint {request.checkpoint!r} under {store.root}. "
            + (f"There are: {', '.join(there)}." if there else "Train a run first, or set resume to continue.")
        )
    if found.step >= steps:
        raise SettingError(f"The checkpoint has {found.step} steps already; set steps above that, not {steps}.")
    return found


def _differences(store: RunStore, start: Checkpoint | None, settings: TrainSettings) -> list[str]:
    """What is set otherwise than in the run that a checkpoint comes from."""
    before = store.read(start.path.parent.name) if start else None
    if not before:
        return []
    now = json.loads(json.dumps(settings.written()))
    return [f"{key}: {before.settings[key]} → {v}" for key, v in now.items() if before.settings.get(key, v) != v]


def _trained_model(path: Path, checkpoint: Checkpoint | None, transformer: Lumina2Transformer) -> dict[str, Tensor]:
    """The weights of a full fine-tune, written again from its newest checkpoint where they are missing."""
    from safetensors.torch import load_file

    if not path.exists() and checkpoint:
        saved = load_file(checkpoint.path / "state.safetensors")
        trained = {key.removeprefix("adapter."): w for key, w in saved.items() if key.startswith("adapter.")}
        write_tensors(path, {**transformer.state_dict(), **trained}, {"modelspec.architecture": "lumina-2"})
    return load_file(path)


def _trained_lora(path: Path, checkpoint: Checkpoint | None, modules: dict[str, Tensor]) -> dict[str, Tensor]:
    """The run's LoRA file, written again from its newest checkpoint where it is missing."""
    if not path.exists() and checkpoint:
        from safetensors import safe_open

        with safe_open(checkpoint.lora, framework="pt") as file:
            metadata = file.metadata()
        write_lora(path, read_lora(checkpoint.lora), modules, metadata)
    lora = read_lora(path)
    check_lora(lora, modules, str(path))
    return lora


def _metadata(run: Run, settings: TrainSettings, step: int) -> dict[str, str]:
    """What a LoRA file says of itself, in the field's own keys."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "lumina-2/lora",
        "modelspec.title": run.folder,
        "modelspec.prediction_type": "flow",
        "ss_steps": str(step),
        "ss_learning_rate": str(settings.optimizer.learning_rate),
        "ss_seed": str(settings.seed),
        "lumina2_trainer.settings": json.dumps(settings.written()),
        "lumina2_trainer.identity": run.identity,
    }
