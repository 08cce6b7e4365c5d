"""One training from the settings to the file: looked up, started or continued, and kept whatever happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter.adapter import add_adapter
from ..adapter.files import check_lora, read_lora, write_lora
from ..adapter.full import Full
from ..cache.facts import file_metadata
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
from .batches import Batches, Refiner
from .between import BetweenSteps
from .checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, read_checkpoint
from .control import Control, reachable
from .events import Ended, Event, Journal, Listener, Said, Started, read_losses, to_all
from .folder import Run, RunStore
from .identity import data_identity, decide, differences, run_identity, said_of_others
from .keeping import Keeper, is_disk_full
from .ledger import Ledger, NotFiniteError
from .lock import locked
from .loop import TrainState, new_state, train
from .memory_error import is_out_of_memory, what_would_fit
from .processes import ALONE, Processes
from .shards import Shards, check_together
from .validation import Validator

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


def train_lora(
    transformer: Lumina2Transformer,
    latents: LatentCache,
    texts: TextCache,
    settings: TrainSettings,
    request: Request,
    store: RunStore,
    scale_latents: Callable[[Tensor], Tensor],
    tell: Listener = lambda event: None,
    *,
    control: Control | None = None,
    encode: Encode | None = None,
    validator: Validator | None = None,
    check: Callable[[], None] = lambda: None,
    processes: Processes = ALONE,
) -> Outcome:
    """Train, go on training, or hand out what was trained before (see ``identity.decide``).

    The transformer's frozen weights stay as they are; the object itself carries the adapter afterwards.
    Whatever ends the training early leaves a checkpoint, the LoRA so far and a true ``run.json``, and is raised again.

    Args:
        tell: hears everything that happens; what it raises ends the training between two steps.
        control: by which the run is stopped, paused, …; also found by ``control.active`` while it runs.
        encode: the VAE, for datasets that are encoded while training.
        validator: draws samples and works out the held-out loss; for a full fine-tune in every process.
        processes: of which this is one; each calls this with the same arguments.

    Raises:
        SettingError, RunError, ModelError: the run cannot start; nothing was written.
    """
    name = check_run_name(request.name)
    start = _start(store, request, settings.steps)
    check_together(settings, processes)
    tell = tell if processes.leads else lambda event: None
    model = transformer_fingerprint(transformer.state_dict().items(), transformer.config)
    data = data_identity(latents, texts)
    asked = settings
    settings, began_with = _with_batches_of_before(
        store.family(name),
        asked,
        processes.count,
        lambda settings: run_identity(settings, data, model, request.attempt, start),
    )
    identity = run_identity(settings, data, model, request.attempt, start, processes.count)
    full = settings.full_fine_tune
    modules = {n: m.weight.to("meta") for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    folder = decide(store, name, identity, settings.steps, request.continue_token, full).folder
    file = store.file(folder, full)
    with _held(store, folder, processes):
        decision = decide(store, name, identity, settings.steps, request.continue_token, full)
        at = decision.checkpoint.step if decision.checkpoint else 0
        drawn = validator is not None if full else ""
        processes.check_same(f"{decision.folder} from step {at}: {identity} {drawn}")
        if decision.folder != folder:
            raise RunError(f"The training run {folder!r} was begun by another process just now. Queue again.")
        notes = [decision.message, *differences(store.read(start.path.parent.name) if start else None, settings)]
        notes += said_of_others(decision, [] if start else store.family(name), settings)
        if settings is not asked:
            each = settings.optimizer.gradient_accumulation_steps
            notes.append(
                f"{processes.count} of {began_with} processes: gradient_accumulation_steps {each}, same batches"
            )
        tell(Said("; ".join(notes)))
        events = store.root / folder / "events.jsonl"
        if decision.done and decision.run:
            read = _trained_model if full else _trained_lora
            lora = processes.lead(lambda: read(file, decision.checkpoint, transformer, modules)) or {}
            tell(Ended(decision.run.status, decision.run.step, decision.message, 0))
            return Outcome(decision.run, lora, read_losses(events, decision.run.step), decision.message)

        check()
        with Batches(latents, texts, settings, scale_latents, encode, processes) as batches:
            caption_side = _caption_side(transformer)
            state, said = _prepare(transformer, settings, processes)
            notes += said
            if not any(name.startswith(CAPTION_SIDE) for name in state.adapter.weights):
                batches.refine_with(_refiner(transformer, caption_side, settings))
            checkpoint = decision.checkpoint or start
            if checkpoint:
                load_checkpoint(checkpoint, state)
            if checkpoint is start:
                state.rate_factor = 1.0
            run = Run(
                name=name,
                folder=folder,
                identity=identity,
                status="running",
                step=state.step,
                target=settings.steps,
                continue_token=request.continue_token,
                settings=asked.written(),
                model=model,
                start=f"{start.path.parent.name}/{start.path.name}" if start else "",
                notes=tuple(notes),
                learning_rate=state.rate_factor * settings.optimizer.learning_rate if state.rate_factor != 1 else 0.0,
                processes=began_with,
            )
            journal = Journal(events) if processes.leads else _NoJournal(events)
            told = processes.heard(to_all([journal, tell]))
            keeper = Keeper(store, run, settings, modules, told, file_metadata(latents, texts), processes)
            ledger = Ledger(keeper.tell, read_losses(events, state.step), tolerant=state.loss_scale is not None)
            control = control or Control()
            between = BetweenSteps(
                transformer, state, settings, keeper, ledger, keeper.tell, control, validator, processes
            )
            began = time.monotonic()
            try:
                keeper.check_space(state)
                keeper.tell(Started(run, state.step, batches.epoch_steps))
                with reachable(keeper.folder, control):
                    train(transformer, state, batches, settings, ledger, between, processes)
                lora = keeper.end(state, between.status, between.note)
            except BaseException as error:
                gone = processes.meet(state.step if state.whole else -1, error)
                _keep_what_there_is(gone or error, keeper, ledger, journal, state, between.first)
                explained = gone or _explained(error, keeper, state, transformer, settings, latents)
                message = str(explained or error) or type(error).__name__
                ended = Ended(keeper.run.status, state.step, message, time.monotonic() - began)
                for listener in (journal, tell):  # whose own errors are not the one to raise
                    with suppress(BaseException):
                        listener(ended)
                if explained:
                    raise explained from error
                raise
            notes += [between.note] if between.note else []
            notes += [f"{ledger.skipped} steps skipped, not a number"] if ledger.skipped else []
            message = "; ".join(notes)
            keeper.tell(Ended(keeper.run.status, state.step, message, time.monotonic() - began))
    return Outcome(keeper.run, lora, ledger.losses, message)


def _keep_what_there_is(
    error: BaseException, keeper: Keeper, ledger: Ledger, journal: Journal, state: TrainState, first: int
) -> None:
    """A checkpoint, the file and a true ``run.json``, where something was trained; no listener can stop it any more."""
    status = "failed" if isinstance(error, (Lumina2Error, MemoryError, OSError, RuntimeError)) else "interrupted"
    keeper.tell = journal
    with suppress(OSError):
        journal.write(ledger.take())
    if isinstance(error, NotFiniteError):  # goes on before the steps that changed nothing
        state.step -= error.steps
    try:
        if state.step > first and state.whole:
            keeper.end(state, status, str(error))
    except Exception as trouble:  # which must not hide the error that ended the run
        status = "failed"
        with suppress(OSError):
            journal(Said(str(trouble)))
    with suppress(OSError):
        keeper.note(status)


def _explained(
    error: BaseException,
    keeper: Keeper,
    state: TrainState,
    transformer: Lumina2Transformer,
    settings: TrainSettings,
    latents: LatentCache,
) -> RunError | None:
    """The system's and torch's errors as sentences, where somebody can do something about them."""
    if is_disk_full(error):
        return keeper.no_space(state)
    if is_out_of_memory(error):
        shapes = latents.rows().shape
        _, height, width = shapes[(shapes[:, 1] * shapes[:, 2]).argmax()].tolist()
        stored = transformer.get_parameter("layers.0.attention_norm1.weight")  # norms are never quantised
        hint = what_would_fit(transformer.config, settings, (height, width), stored, transformer.dtype)
        return RunError(f"Out of memory in step {state.step + 1}; what was trained before is kept. {hint}")
    return None


class _NoJournal(Journal):
    """Of a process that does not lead."""

    def write(self, events: Iterable[Event]) -> None:
        pass


@contextmanager
def _held(store: RunStore, folder: str, processes: Processes) -> Iterator[None]:
    """The run's folder is locked by the leader."""
    with ExitStack() as stack:
        processes.lead(lambda: stack.enter_context(locked(store.root, folder)))
        yield


def _with_batches_of_before(
    runs: Iterable[Run], settings: TrainSettings, processes: int, identify: Callable[[TrainSettings], str]
) -> tuple[TrainSettings, int]:
    """Go on with a run that another number of processes began: its steps keep their batches by another accumulation.

    Args:
        identify: the identity of one process's run.

    Returns:
        The settings, and how many processes began the run.

    Raises:
        RunError: so many processes cannot share those batches evenly.
    """
    optimizer = settings.optimizer
    each = optimizer.gradient_accumulation_steps

    def accumulating(batches: int) -> TrainSettings:
        return replace(settings, optimizer=replace(optimizer, gradient_accumulation_steps=batches))

    known = list(runs)
    if any(run.identity == identify(accumulating(each * processes)) for run in known):
        return settings, processes
    for run in known:
        batches = each * run.processes
        asked_so = run.settings.get("gradient_accumulation_steps") == each
        same = asked_so and run.identity == identify(accumulating(batches))
        if same and batches % processes:
            raise RunError(
                f"The run {run.folder!r} was begun by {run.processes} processes with {batches} batches a step, which "
                f"{processes} processes cannot share evenly. Start it with {run.processes} or 1."
            )
        if same:
            return accumulating(batches // processes), run.processes
    return settings, processes


def _prepare(
    transformer: Lumina2Transformer, settings: TrainSettings, processes: Processes = ALONE
) -> tuple[TrainState, list[str]]:
    """The transformer made ready to be trained, in place, and what the user is told of it."""
    precision = settings.precision
    device = transformer.final_layer.linear.weight.device
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
    said = [adapter.describe(), *computing.notes]
    if precision.musubi_blocks_to_swap:
        said.append(_swap_blocks(transformer, precision.musubi_blocks_to_swap))
    shards = Shards(transformer, adapter, processes) if isinstance(adapter, Full) and processes.count > 1 else None
    state = new_state(adapter, settings, computing.loss_scaling)
    state.shards = shards
    return state, said


def _swap_blocks(transformer: Lumina2Transformer, count: int) -> str:
    """Frozen weights of blocks put into the CPU's memory, and what the user is told of it."""
    device = transformer.final_layer.linear.weight.device
    if device.type == "cpu":
        return "musubi_blocks_to_swap changes nothing on a CPU, whose memory the weights are in already"
    swapped = transformer.swap_blocks(count)
    return f"the weights of {swapped} blocks wait in the CPU's memory, and those of 2 at a time are on {device}"


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


def _trained_model(
    path: Path, checkpoint: Checkpoint | None, transformer: Lumina2Transformer, modules: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of a full fine-tune, written again from its newest checkpoint where they are missing."""
    from safetensors.torch import load_file

    if not path.exists() and checkpoint:
        saved = load_file(checkpoint.path / "state.safetensors")
        trained = {key.removeprefix("adapter."): w for key, w in saved.items() if key.startswith("adapter.")}
        write_tensors(path, {**transformer.state_dict(), **trained}, {"modelspec.architecture": "lumina-2"})
    return load_file(path)


def _trained_lora(
    path: Path, checkpoint: Checkpoint | None, transformer: Lumina2Transformer, modules: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The run's LoRA file, written again from its newest checkpoint where it is missing."""
    if not path.exists() and checkpoint:
        from safetensors import safe_open

        with safe_open(checkpoint.lora, framework="pt") as file:
            metadata = file.metadata()
        write_lora(path, read_lora(checkpoint.lora), modules, metadata)
    lora = read_lora(path)
    check_lora(lora, modules, str(path))
    return lora
