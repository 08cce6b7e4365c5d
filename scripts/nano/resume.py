"""Trainings that are killed at any moment, or that go on for very long, against what they should be.

``kills``: pairs of random settings and a random moment. A process trains and is killed there by SIGKILL, in the middle
of a step or of a file; the next one goes on. Weights, optimiser, averages and the log must be, bit for bit, those of
the training that nothing happened to, and every checkpoint must be readable at any time.

``memory``: one training of the nano model. The process must not grow, nor hold more and more files.

``scripts/soak`` has both as commands.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "scripts")) if path not in sys.path]

import torch  # noqa: E402
import torch._dynamo  # noqa: E402 - else the first step imports it, slowly where it is followed line by line
from nano import tiny  # noqa: E402
from nano.forks import Forks  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from training.config.adapter import AdapterSettings, FullSettings, LoRASettings, LyCORISSettings  # noqa: E402
from training.config.objective import ObjectiveSettings, ScheduledSamplingSettings  # noqa: E402
from training.config.optim import OPTIMIZERS, OptimizerSettings  # noqa: E402
from training.config.precision import PrecisionSettings  # noqa: E402
from training.config.settings import TrainSettings  # noqa: E402
from training.errors import SettingError  # noqa: E402
from training.run.events import Between, Started, read_events  # noqa: E402
from training.run.folder import RunStore  # noqa: E402
from training.run.session import Outcome  # noqa: E402

STEPS = 8
ADAPTERS: tuple[AdapterSettings, ...] = (
    LoRASettings(64, targets="attention+ff"),  # large enough for states of few bits
    LoRASettings(4, dropout=0.3, qkv="split", use_dora=True),
    LoRASettings(4, init="pissa", loraplus_lr_ratio=4),
    LyCORISSettings("lokr", linear_dim=10000, factor=2),
    LyCORISSettings("loha", linear_dim=4, linear_alpha=4, rank_dropout=0.2),
    FullSettings(),
)
ROLLOUT = ScheduledSamplingSettings(max_step_offset=2, probability=0.5, grid_steps=20)
RATES = {"prodigy": 1.0, "optimi-sgd": 0.1}


@dataclass(frozen=True)
class Case:
    """A training, and the share of its work after which it is killed."""

    settings: TrainSettings
    datasets: tuple[str, ...]
    moment: float


def case(number: int) -> Case:
    """Random, and the same one for the same number."""
    chance = random.Random(number)
    while True:
        with suppress(SettingError):  # what contradicts itself is drawn again
            return Case(_settings(chance), chance.choice([("warm",), ("warm", "cold")]), chance.random())


def _settings(chance: random.Random) -> TrainSettings:
    optimizer = chance.choice([name for name in OPTIMIZERS if not name.startswith("bnb-")])
    adapter = chance.choice(ADAPTERS)
    if optimizer == "prodigy" and getattr(adapter, "loraplus_lr_ratio", 1) != 1:
        raise SettingError("prodigy has one learning rate for all weights")
    full = isinstance(adapter, FullSettings)
    fused = full and chance.random() < 0.5
    return TrainSettings(
        steps=STEPS,
        batch_size=2,
        seed=chance.randrange(2**32),
        adapter=adapter,
        optimizer=OptimizerSettings(
            optimizer,
            RATES.get(optimizer, 1e-3),
            fused_backward=fused,
            grad_clip_method="value" if fused else "norm",
            gradient_accumulation_steps=chance.choice([1, 2]),
            lr_scheduler=chance.choice(["constant", "cosine", "linear"]),
            use_ema=chance.random() < 0.5,
        ),
        precision=PrecisionSettings(base_model_precision="no_change" if full else chance.choice(_STORED)),
        objective=ObjectiveSettings(
            input_perturbation=chance.choice([0.0, 0.1]),
            scheduled_sampling=chance.choice([ScheduledSamplingSettings(), ROLLOUT]),
            flow_stratified=chance.random() < 0.3,
        ),
        checkpoint_step_interval=chance.choice([1, 2, 3]),
        checkpoints_total_limit=chance.choice([1, 3]),
    )


_STORED = ("no_change", "int8-torchao")


@dataclass
class Work:
    """Counts the lines that are run in the modules that keep a run, from its start on."""

    kill_at: int = 0  # the line at which the process is killed; 0: never
    done: int = 0
    MODULES = tuple(str(ROOT / "training" / name) for name in ("run", "files.py"))

    @contextmanager
    def counted(self) -> Iterator[None]:
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(None)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._ran if frame.f_code.co_filename.startswith(self.MODULES) else None

    def _ran(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.done += 1
        if self.done == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._ran


def train(chosen: Case, store: RunStore, data: Path, work: Work | None = None) -> Outcome:
    """Train or go on, on as many threads as every other one."""
    settings = chosen.settings
    stored = torch.bfloat16 if settings.optimizer.fused_backward else torch.float32
    run = tiny.Train(tiny.caches(data, chosen.datasets), store, settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)

        def on(event: object) -> None:  # what is imported and made ready before would be slow to follow
            if work and isinstance(event, Started):
                stack.enter_context(work.counted())

        return run(on, model=tiny.transformer(stored))


def train_and_die(number: int, folder: str, kill_at: int) -> None:
    """Train a case into ``folder/killed``, up to a line of its work."""
    train(case(number), tiny.store(Path(folder) / "killed"), Path(folder) / "data", Work(kill_at))


def check(number: int, folder: Path, forks: Forks) -> str:
    """Train a case without and with its kill.

    Args:
        forks: of this module.

    Returns:
        What happened to it, in words.

    Raises:
        AssertionError: something is other than in the training that nothing happened to.
    """
    chosen, data = case(number), folder / "data"
    whole_store, store = tiny.store(folder / "whole"), tiny.store(folder / "killed")
    work = Work()
    whole = train(chosen, whole_store, data, work)
    kill_at = max(int(0.98 * chosen.moment * work.done), 1)  # a few lines more or less depend on the clock
    forks.call("train_and_die", number, str(folder), kill_at)
    assert (code := forks.code()) == -signal.SIGKILL, f"was not killed: {code}"
    at_kill = {path.name for path in store.root.glob("*/checkpoint-*")}
    for path in store.root.glob("*/checkpoint-*"):
        load_file(path / "state.safetensors")
        json.loads((path / "checkpoint.json").read_text())
    before = max((int(name.partition("-")[2]) for name in at_kill), default=0)
    resumed = train(chosen, store, data)
    compare(whole_store, whole, store, resumed)
    return f"{_words(chosen)}: killed at line {kill_at} of {work.done}, went on from step {before}"


def compare(whole_store: RunStore, whole: Outcome, store: RunStore, resumed: Outcome) -> None:
    """Raises AssertionError where two runs differ in a bit that counts."""
    runs = ((whole_store, whole), (store, resumed))
    one, other = (_tensors(s, o) for s, o in runs)
    assert one.keys() == other.keys()
    differing = [name for name, tensor in one.items() if not torch.equal(bits(tensor), bits(other[name]))]
    assert not differing, f"{len(differing)} of {len(one)} tensors differ, the first: {differing[0]}"
    assert whole.losses == resumed.losses
    one_log, other_log = (_steps(s.path(o.run) / "events.jsonl") for s, o in runs)
    assert [line["step"] for line in other_log] == list(range(1, STEPS + 1))
    assert one_log == other_log
    left = [
        path for place in (store.root, store.loras) for path in place.rglob(".*") if path.suffix in (".tmp", ".old")
    ]
    assert not left, f"something half is left: {left[0]}"


def _tensors(store: RunStore, outcome: Outcome) -> dict[str, torch.Tensor]:
    """Of the last checkpoint and of every file for ComfyUI, each under its file's name."""
    files = [*store.path(outcome.run).glob(f"checkpoint-{STEPS}/*.safetensors")]
    files += [path for place in (store.loras, store.models) if place for path in place.glob("*.safetensors")]
    return {f"{path.name} {name}": tensor for path in files for name, tensor in load_file(path).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """So that what is not a number equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _steps(log: Path) -> list[dict[str, Any]]:
    times = ("time", "memory")
    return [
        {name: value for name, value in event.items() if name not in times}
        for event in read_events(log)
        if "event" not in event
    ]


def _words(chosen: Case) -> str:
    settings, optimizer = chosen.settings, chosen.settings.optimizer
    said = [optimizer.optimizer, getattr(settings.adapter, "algo", type(settings.adapter).__name__)]
    said += [settings.precision.base_model_precision] if settings.precision.quantised else []
    said += [name for name in ("use_ema", "fused_backward") if getattr(optimizer, name)]
    said += ["accumulation"] if optimizer.gradient_accumulation_steps > 1 else []
    said += ["rollout"] if settings.objective.scheduled_sampling.max_step_offset else []
    return " ".join([*said, f"{len(chosen.datasets)} dataset(s)"])


def kills(pairs: int, first: int) -> list[dict[str, Any]]:
    """Check so many cases from one on, and print each."""
    rows = []
    with Forks(__name__) as forks:
        for number in range(first, first + pairs):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    rows.append({"case": number, "exact": True, "what": check(number, Path(folder), forks)})
                except AssertionError as error:
                    rows.append({"case": number, "exact": False, "what": f"{_words(case(number))}: {error}"})
            print(*rows[-1].values(), sep="\t", flush=True)
    return rows


def memory(steps: int) -> dict[str, Any]:
    """Bytes and open files over a long training of the nano model, with checkpoints; from a tenth of it on."""
    with tempfile.TemporaryDirectory() as folder:
        return _memory(steps, Path(folder))


def _memory(steps: int, folder: Path) -> dict[str, Any]:
    from nano.trial import mixed, scale_latents, transformer

    from training.run.session import Request, train_lora

    bytes_held: list[int] = []
    files: list[int] = []
    page = os.sysconf("SC_PAGE_SIZE")

    def tell(event: object) -> None:
        if isinstance(event, Between) and event.step > steps // 10:
            bytes_held.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
            files.append(len(os.listdir("/proc/self/fd")))
            if event.step % max(steps // 10, 1) == 0:
                print(f"step {event.step}: {bytes_held[-1] / 2**20:.1f} MB, {files[-1]} files", flush=True)

    settings = TrainSettings(
        steps=steps,
        batch_size=2,
        adapter=LoRASettings(16),
        optimizer=OptimizerSettings(learning_rate=1e-3, use_ema=True),
        checkpoint_step_interval=max(steps // 40, 1),
    )
    latents, texts = mixed({"style": {}, "concept": {}}, folder)
    outcome = train_lora(
        transformer(), latents, texts, settings, Request("long"), tiny.store(folder), scale_latents, tell
    )
    tenth = max(len(bytes_held) // 10, 1)
    begin, end = statistics.median(bytes_held[:tenth]), statistics.median(bytes_held[-tenth:])
    return {
        "steps": outcome.run.step,
        "bytes_after_warm_up": int(begin),
        "bytes_at_the_end": int(end),
        "growth": end / begin - 1,
        "files_after_warm_up": files[0],
        "files_at_the_end": files[-1],
        "flat": end / begin - 1 < 0.01 and files[-1] <= files[0],
    }
