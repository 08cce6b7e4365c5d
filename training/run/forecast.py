"""How much memory a run will need, part by part, before it starts.

Weights, gradients and optimiser states are arithmetic. Activations are measured on the real code with tensors that
have no memory: one block of each kind takes a step, and what it keeps and needs is put together for all of them.
All figures are bytes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..config.precision import PrecisionSettings
from ..errors import SettingError
from ..model.config import TransformerConfig
from ..model.quantise import Int4Linear, is_quantised
from ..model.swap import SLOTS
from ..model.transformer import Lumina2Transformer
from ..optim.low_bit import SLICE

GB = 10**9
# Python and torch before a model is there (0.3 GB: benchmarks/memory.py, case "process"), and the part of torch that
# the first optimiser or checkpointed block imports (0.1 GB).
PROCESS = 400 * 10**6
ENCODING_PROCESS = 600 * 10**6  # with transformers and diffusers, and what one product needs
CUDA_CONTEXT = 500 * 10**6  # not measured on CUDA: what nvidia-smi shows of a process that did nothing, typically
CUDA_SLACK = 0.08  # not measured on CUDA: share of the activations that its allocator loses to fragmentation

# Samples of the largest batch that is measured; from half of it on, memory grows evenly, and time would, too.
MEASURED_BATCH = 8
STACKS = ("context_refiner", "noise_refiner", "layers")  # in the order in which they run

# Bytes of state for each trained parameter, where one takes `size` bytes; 8 bits have one fp32 scale per 256.
_STATES: dict[str, Callable[[int], float]] = {
    "adamw_bf16": lambda size: 4,
    "torch-adamw": lambda size: 2 * size,
    "optimi-stableadamw": lambda size: 2 * size + (size if size == 2 else 0),  # Kahan sums beside bf16
    "optimi-adamw": lambda size: 2 * size + (size if size == 2 else 0),
    "optimi-radam": lambda size: 2 * size + (size if size == 2 else 0),
    "optimi-ranger": lambda size: 3 * size + (size if size == 2 else 0),
    "optimi-adan": lambda size: 4 * size,
    "optimi-lion": lambda size: size + (size if size == 2 else 0),
    "optimi-sgd": lambda size: size if size == 2 else 0,
    "ao-adamw8bit": lambda size: 2 * (1 + 4 / 256),
    "ao-adamw4bit": lambda size: 2 * (0.5 + 4 / 128),
    "ao-adamfp8": lambda size: 2 * (1 + 4 / 256),
    "ao-adamwfp8": lambda size: 2 * (1 + 4 / 256),
    "prodigy": lambda size: 4 * size,
    "adamw_schedulefree": lambda size: 2 * size,
    "adafactor": lambda size: 0.01 * size,  # a number for each row and column
}
# Bytes for each element that an optimiser works on while it takes its step on one tensor, in bf16 and uncompiled.
_STEP_WORK = {"ao-adamw8bit": 57, "ao-adamw4bit": 57, "ao-adamfp8": 57, "ao-adamwfp8": 57, "adamw_bf16": 26}
_STEP_WORK_OF_OTHERS = 16


@dataclass(frozen=True)
class Shape:
    """One batch, in latent cells of 8 pixels."""

    batch: int = 1
    height: int = 128
    width: int = 128
    tokens: int = 128  # of each caption


@dataclass(frozen=True)
class Cost:
    """What a block adds to memory."""

    kept: int  # from its forward until its backward
    work: int  # more while its backward runs, beside what was there when that began


@dataclass(frozen=True)
class Pass:
    """Forward and backward in one way of checkpointing."""

    costs: tuple[tuple[Cost, ...], ...]  # of each block, by stack
    fixed: int  # batch, embedders, output: there from the forward to the end
    head: int  # more at the peak between the last block's forward and its backward


@dataclass(frozen=True)
class Measured:
    """A model with what is trained of it, for one batch: everything a forecast is made from."""

    config: TransformerConfig
    shape: Shape
    stored: torch.dtype
    computed: torch.dtype
    trained: int  # bytes of what is trained
    trained_bytes: int  # of one trained parameter
    largest_trained: int  # elements
    frozen: Mapping[str, tuple[int, ...]]  # shapes of the weights that stay as they are
    gradients: tuple[tuple[int, ...], ...]  # bytes of each block's gradients, by stack
    passes: Mapping[str, Pass]  # by the way of checkpointing
    full: bool  # the model's own weights are trained


@dataclass(frozen=True)
class Forecast:
    """The peak of a run, by what is there when it is reached."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    base: int  # the process; on CUDA its context and what the allocator loses
    notes: tuple[str, ...] = field(default=())

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.base

    def parts(self) -> dict[str, int]:
        names = ("weights", "adapter", "gradients", "optimizer", "activations", "base")
        return {name: getattr(self, name) for name in names}


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it, for as long as they live; ``ignore`` is what was there before."""

    def __init__(self, ignore: Iterator[Tensor] | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {t.untyped_storage()._cdata: None for t in ignore or ()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.now -= size


def state_bytes(optimizer: str, size: int) -> float:
    """State for each trained parameter of ``size`` bytes.

    Raises:
        SettingError: nothing is known of this optimiser.
    """
    name = "optimi-lion" if optimizer == "lion" else optimizer
    if name.startswith("bnb-"):
        return 2.03 if "8bit" in name else 2 * size
    if name not in _STATES:
        raise SettingError(f"optimizer is {optimizer!r}, whose memory is not known; known are {', '.join(_STATES)}.")
    return _STATES[name](size)


def weight_bytes(shapes: Mapping[str, tuple[int, ...]], mode: str, stored: torch.dtype) -> int:
    """What frozen weights take in a ``base_model_precision``, their scales included."""
    total = 0.0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        module, _, kind = name.rpartition(".")
        if mode == "no_change" or kind != "weight" or len(shape) != 2 or not is_quantised(module, *shape):
            total += count * stored.itemsize
        elif mode == "nf4":
            total += count * (0.5 + 4 / 64)
        elif mode == "int4-torchao":
            total += count * (0.5 + 4 / next(g for g in (Int4Linear.GROUP, 64, 32, 16) if shape[1] % g == 0))
        else:
            total += count + 4 * shape[0]
    return int(total)


def measure(
    config: TransformerConfig,
    shape: Shape,
    adapt: Callable[[Lumina2Transformer], object],
    stored: torch.dtype = torch.bfloat16,
    computed: torch.dtype = torch.bfloat16,
    ways: Sequence[str] = ("none", "full"),
) -> Measured:
    """What a step of this model on this batch needs.

    Args:
        adapt: puts into a frozen transformer on the meta device what will be trained, as the run will: an adapter, or
            ``requires_grad_(True)``.
        stored, computed: the dtypes of frozen weights and of products.
        ways: of checkpointing that will be asked about: "none", "full", "selective".
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        transformer = Lumina2Transformer(config).requires_grad_(False)
    own = {name: tuple(weight.shape) for name, weight in transformer.state_dict().items()}
    adapt(transformer)
    trained = [p for p in transformer.parameters() if p.requires_grad]
    named = {name.replace(".base_layer", ""): p for name, p in transformer.named_parameters()}
    full = any(named[name].requires_grad for name in own if name in named)
    size = stored.itemsize if full else (trained[0].element_size() if trained else 4)
    stacks = [list(getattr(transformer, name)) for name in STACKS]
    gradients = tuple(
        tuple(sum(p.numel() * size for p in block.parameters() if p.requires_grad) for block in stack)
        for stack in stacks
    )
    kinds = _kinds(stacks)
    for name, stack, kind in zip(STACKS, stacks, kinds, strict=True):
        setattr(transformer, name, nn.ModuleList(stack[kind.index(which)] for which in dict.fromkeys(kind)))

    found: dict[str, Pass] = {}

    def take_step(way: str, batch: int) -> Pass:
        return _pass(transformer, replace(shape, batch=batch), kinds, way, stored, computed, full)

    def run() -> None:  # in a thread of its own, whose scratch memory is not that of a training
        with FakeTensorMode():
            for way in ways:
                found[way] = take_step(way, min(shape.batch, MEASURED_BATCH))
                if shape.batch > MEASURED_BATCH:
                    found[way] = _of_batch(shape.batch, take_step(way, MEASURED_BATCH // 2), found[way])

    _in_a_thread(run)
    return Measured(
        config=config,
        shape=shape,
        stored=stored,
        computed=computed,
        trained=sum(p.numel() for p in trained) * size,
        trained_bytes=size,
        largest_trained=max((p.numel() for p in trained), default=0),
        frozen={name: dims for name, dims in own.items() if not (name in named and named[name].requires_grad)},
        gradients=gradients,
        passes=found,
        full=full,
    )


def forecast(
    measured: Measured,
    precision: PrecisionSettings | None = None,
    optimizer: str = "torch-adamw",
    fused_backward: bool = False,
    device_type: str = "cpu",
    process: int = PROCESS,
) -> Forecast:
    """The peak of a run on one device.

    Args:
        fused_backward: each weight is updated as its gradient arrives.
        device_type: on "cuda" the memory of the GPU is meant, on "cpu" that of the process.
        process: what the process takes before there is a model.
    """
    precision = precision or PrecisionSettings()
    config, on_gpu = measured.config, device_type != "cpu"
    parameters = sum(torch.Size(dims).numel() for dims in measured.frozen.values())
    every = precision.checkpoint_every(
        parameters + (measured.trained // measured.trained_bytes if measured.full else 0)
    )
    away = min(precision.musubi_blocks_to_swap, config.layers) - SLOTS if on_gpu else 0
    here = {n: s for n, s in measured.frozen.items() if not _is_away(n, config.layers, max(away, 0))}
    weights = weight_bytes(here, precision.base_model_precision, measured.stored)
    states = measured.trained / measured.trained_bytes * state_bytes(optimizer, measured.trained_bytes)

    ways = ways_of(precision, every)
    again, plain = measured.passes[ways[0]], measured.passes[ways[-1]]
    offloaded = on_gpu and precision.gradient_checkpointing_backend == "unsloth"
    costs, gradients = [], []
    for stack in range(len(STACKS)):
        for number, own in enumerate(measured.gradients[stack]):
            cost = (plain if every and number % every else again).costs[stack][number]
            costs.append(replace(cost, kept=0, work=cost.work + cost.kept) if offloaded else cost)
            gradients.append(0 if fused_backward else own)
    fixed = again.fixed
    if measured.computed == measured.stored and precision.quantised:  # one weight is read at a time
        largest = max((torch.Size(dims).numel() for dims in measured.frozen.values()), default=0)
        fixed += largest * measured.computed.itemsize
    at_once = min(measured.largest_trained, SLICE) if optimizer.startswith("ao-") else measured.largest_trained
    step = at_once * _STEP_WORK.get(optimizer, _STEP_WORK_OF_OTHERS) if fused_backward else 0

    kept = sum(cost.kept for cost in costs)
    moments = [(fixed + kept + again.head, 0)]
    arrived = 0
    for cost, own in zip(reversed(costs), reversed(gradients), strict=True):
        moments.append((fixed + kept + max(cost.work, step), arrived))
        kept -= cost.kept
        arrived += own
    moments.append((fixed, 0 if fused_backward else measured.trained))
    activations, arrived = max(moments, key=sum)
    notes: tuple[str, ...] = ()
    if on_gpu:
        base = CUDA_CONTEXT + int(CUDA_SLACK * activations)
        notes = ("CUDA's context and its allocator's losses are typical values, not measured on this device",)
    else:
        base = process
    return Forecast(
        weights=weights + (measured.trained if measured.full else 0),
        adapter=0 if measured.full else measured.trained,
        gradients=arrived,
        optimizer=int(states),
        activations=activations,
        base=base,
        notes=notes,
    )


def ways_of(precision: PrecisionSettings, every: int) -> list[str]:
    """How blocks are run where every n-th is checkpointed: the checkpointed ones first."""
    again = ["selective" if precision.gradient_checkpointing_selective else "full"] if every else []
    return again + (["none"] if every != 1 else [])


def startup_peak(text_encoder: int, vae: int, transformer: int) -> int:
    """The peak of a process that encodes and goes on to train, with each model let go before the next is loaded."""
    return ENCODING_PROCESS + max(text_encoder, vae, transformer)


def savings(
    measured: Measured,
    precision: PrecisionSettings,
    optimizer: str = "torch-adamw",
    fused_backward: bool = False,
    device_type: str = "cpu",
) -> dict[str, int]:
    """What each switch that is not set yet would save, largest first, as ``setting = value``."""

    def total(changed: PrecisionSettings = precision, optimizer: str = optimizer, fused: bool = fused_backward) -> int:
        return forecast(measured, changed, optimizer, fused, device_type).total

    now, found = total(), {}
    checkpointed = replace(
        precision,
        gradient_checkpointing=True,
        gradient_checkpointing_interval=1,
        gradient_checkpointing_selective=False,
    )
    found["gradient_checkpointing = true"] = now - total(checkpointed)
    if measured.full:
        found["optimizer = ao-adamw8bit"] = now - total(optimizer="ao-adamw8bit")
        found["fused_backward = true"] = now - total(fused=True)
    else:
        for mode in ("int8-torchao", *(("int4-torchao",) if device_type == "cuda" else ())):
            found[f"base_model_precision = {mode}"] = now - total(replace(precision, base_model_precision=mode))
    if device_type != "cpu":
        offload = replace(checkpointed, gradient_checkpointing_backend="unsloth")
        found["gradient_checkpointing_backend = unsloth"] = now - total(offload)
    if measured.shape.batch > 1:
        parts = forecast(measured, precision, optimizer, fused_backward, device_type)
        found["train_batch_size = 1"] = parts.activations - parts.activations // measured.shape.batch
    return {name: saved for name, saved in sorted(found.items(), key=lambda item: -item[1]) if saved > 0.01 * now}


@dataclass(frozen=True)
class Preset:
    """What suits a GPU at 1024 px, with room for the desktop."""

    precision: PrecisionSettings
    batch_size: int
    rank: int
    full_fine_tune: str = ""  # the optimiser with which one fits, with fused_backward; empty: none does


PRESETS: dict[int, Preset] = {
    8: Preset(PrecisionSettings(base_model_precision="int8-torchao", gradient_checkpointing=True), 1, 16),
    12: Preset(PrecisionSettings(gradient_checkpointing=True), 2, 16),
    16: Preset(PrecisionSettings(gradient_checkpointing=True), 4, 32, "ao-adamw8bit"),
    24: Preset(PrecisionSettings(gradient_checkpointing=True), 8, 64, "adamw_bf16"),
}


def _is_away(name: str, layers: int, away: int) -> bool:
    """Of so many main blocks the linear layers, which wait in the CPU's memory; norms are small and stay."""
    stack, _, rest = name.partition(".")
    return stack == "layers" and int(rest.partition(".")[0]) >= layers - away and "norm" not in rest


def _kinds(stacks: list[list[nn.Module]]) -> list[list[tuple[object, ...]]]:
    """For each block what its memory depends on: what is trained inside, and whether something before it is."""
    kinds: list[list[tuple[object, ...]]] = []
    before = False
    for stack in stacks:
        own: list[tuple[object, ...]] = []
        for block in stack:
            inside = tuple((n, tuple(p.shape)) for n, p in block.named_parameters() if p.requires_grad)
            own.append((inside, before))
            before = before or bool(inside)
        kinds.append(own)
    return kinds


def _pass(
    transformer: Lumina2Transformer,
    shape: Shape,
    kinds: list[list[tuple[object, ...]]],
    way: str,
    stored: torch.dtype,
    computed: torch.dtype,
    full: bool,
) -> Pass:
    """One step without memory, with one block of each kind."""
    config = transformer.config
    transformer.checkpoint_every = 0 if way == "none" else 1
    transformer.checkpoint_selective = way == "selective"
    transformer.compute_dtype = computed
    blocks = [block for name in STACKS for block in getattr(transformer, name)]
    with _without_memory(transformer, stored, full):
        batch = (
            torch.empty(shape.batch, config.channels, shape.height, shape.width),
            torch.empty(shape.batch),
            torch.empty(shape.batch, shape.tokens, config.caption_dim),
        )
        memory = LiveMemory(transformer.parameters())
        gauge = _Gauge(memory, blocks)
        try:
            with memory:
                with torch.no_grad():  # what is made once and kept is no block's own
                    transformer(*batch, (shape.tokens,) * shape.batch)
                gauge.begin()
                out = transformer(*batch, (shape.tokens,) * shape.batch)
                loss = (out.float() - batch[0]).square().mean()
                gauge.forward_ended()
                del out
                if loss.requires_grad:
                    loss.backward()
                gauge.backward_ended()
        finally:
            gauge.remove()
        for parameter in transformer.parameters():
            parameter.grad = None
    given = sum(tensor.nbytes for tensor in batch)
    costs = gauge.costs()
    by_kind: list[tuple[Cost, ...]] = []
    start = 0
    for stack in kinds:
        order = list(dict.fromkeys(stack))
        by_kind.append(tuple(costs[start + order.index(kind)] for kind in stack))
        start += len(order)
    return Pass(tuple(by_kind), gauge.after - sum(cost.kept for cost in costs) + given, gauge.head)


def _of_batch(batch: int, half: Pass, most: Pass) -> Pass:
    """A pass of more samples than were measured, on the line through ``MEASURED_BATCH`` and half as many."""
    times = (batch - MEASURED_BATCH) / (MEASURED_BATCH / 2)

    def grown(half: int, most: int) -> int:
        return round(most + times * (most - half))

    costs = tuple(
        tuple(Cost(grown(a.kept, b.kept), grown(a.work, b.work)) for a, b in zip(*stacks, strict=True))
        for stacks in zip(half.costs, most.costs, strict=True)
    )
    return Pass(costs, grown(half.fixed, most.fixed), grown(half.head, most.head))


class _Gauge:
    """Reads the memory at the borders of blocks, forward and backward."""

    def __init__(self, memory: LiveMemory, blocks: list[nn.Module]) -> None:
        self.memory = memory
        self.after = self.head = 0
        self._kept, self._work = [0] * len(blocks), [0] * len(blocks)
        self._forward = False  # checkpointed blocks run again in the backward pass
        self._running, self._began = -1, 0
        self._hooks = [hook for n, block in enumerate(blocks) for hook in self._watch(n, block)]

    def _watch(self, number: int, block: nn.Module) -> list[Any]:
        def enter(*_: object) -> None:
            if self._forward:
                self._kept[number] = -self.memory.now

        def leave(_: object, __: object, out: Tensor) -> None:
            if self._forward:
                self._kept[number] += self.memory.now
                if out.requires_grad:
                    out.register_hook(lambda _: self._switch(number))

        return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]

    def _switch(self, number: int) -> None:
        """The backward pass of a block begins, and that of the one after it has ended."""
        most = self.memory.peak - self._began
        if self._running < 0:
            self.head = most
        else:
            self._work[self._running] = most
        self._running, self._began, self.memory.peak = number, self.memory.now, self.memory.now

    def begin(self) -> None:
        self._forward = True

    def forward_ended(self) -> None:
        self.after = self._began = self.memory.peak = self.memory.now
        self._forward = False

    def backward_ended(self) -> None:
        self._switch(-1)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def costs(self) -> list[Cost]:
        return [Cost(kept, work) for kept, work in zip(self._kept, self._work, strict=True)]


@contextmanager
def _without_memory(transformer: nn.Module, stored: torch.dtype, full: bool) -> Iterator[None]:
    """Weights that are fake tensors on the CPU, for a step; gradients of a full fine-tune go as they come."""
    held: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in transformer.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for place in places:
            held += [(place, name, tensor) for name, tensor in place.items() if tensor is not None]
    for place, name, tensor in held:
        own = stored if isinstance(tensor, nn.Parameter) and (full or not tensor.requires_grad) else tensor.dtype
        made = torch.empty(tensor.shape, dtype=own, device="cpu")
        place[name] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    try:
        yield
    finally:
        for place, name, tensor in held:
            place[name] = tensor


def _in_a_thread(run: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def caught() -> None:
        try:
            run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=caught, name="forecast")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
