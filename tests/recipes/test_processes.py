"""Two processes train what one does: the same losses, the same files, and each can go on with what the other left.

This file is also the program that the processes run: ``torchrun --nproc_per_node 2 test_processes.py SCENE FOLDER``.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.cache.given import keep_given
from training.cache.store import Store
from training.config.adapter import FullSettings, LoRASettings
from training.config.objective import ObjectiveSettings
from training.config.optim import OptimizerSettings
from training.config.settings import TrainSettings
from training.errors import RunError
from training.model.config import TransformerConfig
from training.model.transformer import Lumina2Transformer
from training.optim.adamw_bf16 import AdamWBF16
from training.run.checkpoint import newest_checkpoint
from training.run.control import Control
from training.run.events import Between, CheckpointSaved, Ended, Evaluated, LoRASaved, Started, StepDone
from training.run.folder import RunStore
from training.run.launching import launch as launch_run
from training.run.processes import joined
from training.run.remote import Spec, write_model
from training.run.session import Request, train_lora

CONFIG = TransformerConfig(
    dim=48, layers=2, refiner_layers=1, heads=4, kv_heads=2, caption_dim=8, ffn_dim=64, channels=4, axes_dim=(4, 4, 4)
)
STEPS, HALF = 20, 10


def settings(adapter, accumulation=1, optimizer="torch-adamw", **changes):
    return TrainSettings(
        steps=STEPS,
        batch_size=2,
        adapter=adapter,
        optimizer=OptimizerSettings(optimizer, 2e-3, gradient_accumulation_steps=accumulation, use_ema=True, **changes),
        objective=ObjectiveSettings(caption_dropout_probability=0),
        checkpoint_step_interval=HALF,
    )


def transformer(dtype=torch.float32):
    torch.manual_seed(0)
    made = Lumina2Transformer(CONFIG).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(1 if weight.ndim == 1 else 0, 0.2)
    return made.to(dtype)


def caches(folder):
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn((4, 4, 4) if n < 3 else (4, 4, 8), generator=generator) for n in range(5)]
    texts = [torch.randn(2 + n, 8, generator=generator) for n in range(5)]
    stores = Store(str(folder / "latents")), Store(str(folder / "text"))
    return keep_given(latents, texts, torch.randn(1, 8, generator=generator), *stores)


def store_in(folder):
    return RunStore(folder / "runs", folder / "loras", folder / "models")


def run(folder, name, settings, processes=None, model=None, **more):
    together = {"processes": processes} if processes else {}
    return train_lora(
        model or transformer(),
        *caches(folder / "caches"),
        settings,
        Request(name),
        store_in(folder),
        lambda latents: latents * 0.5,
        **together,
        **more,
    )


class Judge:
    """A validator that only evaluates: it says that step 5 is the best, and shows who was asked."""

    def __init__(self):
        self.asked = 0

    def due(self, step):
        return step == 5

    def run(self, moment):
        self.asked += 1
        moment.tick()
        with torch.no_grad():
            sigmas = torch.ones(1)
            moment.transformer(torch.zeros(1, 4, 4, 4), 1 - sigmas, torch.zeros(1, 2, 8), (2,))
        yield Evaluated(moment.step, 0.5, best=True)

    def sample(self, moment, prompt):
        return []


# --- what the processes do


def scene_together(processes, folder):
    told = {"rank": processes.rank, "count": processes.count}
    judge = Judge()
    told["lora"] = run(folder, "lora", settings(LoRASettings(4)), processes, validator=judge).losses
    told["asked"] = judge.asked

    judge, model = Judge(), transformer()
    told["full"] = run(folder, "full", settings(FullSettings()), processes, model, validator=judge).losses
    told["asked in full"] = judge.asked
    kinds = {name: type(weight).__name__ for name, weight in model.named_parameters()}
    told["kinds"] = kinds
    told["rows"] = len(dict(model.named_parameters())["layers.0.feed_forward.w1.weight"].to_local())

    control = Control()
    if processes.rank == 1:
        stop_at(processes, control, 7)
    stopped = run(folder, "stopped", settings(FullSettings()), processes, control=control)
    told["stopped"] = [stopped.run.status, stopped.run.step]

    told["went on"] = run(folder, "begun alone", settings(FullSettings(), 2), processes).losses
    told["bf16"] = fifty_steps_in_bf16(processes)

    def tell(event):
        if isinstance(event, Between) and event.step == 3:
            raise KeyboardInterrupt

    try:
        run(folder, "broken off", settings(FullSettings()), processes, tell=tell)
    except (KeyboardInterrupt, RunError) as error:
        told["broken off"] = repr(error)
    return told


def stop_at(processes, control, step):
    """Ask for an interrupt from a process that does not lead, as a signal would."""
    share = processes.link.exchange
    calls = {"n": 0}

    def exchange(text):
        calls["n"] += 1
        if calls["n"] == 4 * step:
            control.interrupt()
        return share(text)

    processes.link.exchange = exchange


def fifty_steps_in_bf16(processes):
    """What is left of a weight that each process has other gradients of."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 64, dtype=torch.bfloat16))
    optimizer = AdamWBF16([{"params": [weight], "names": ["w"]}], lr=1e-3)
    generator = torch.Generator().manual_seed(processes.rank)
    for _ in range(50):
        weight.grad = torch.randn(64, generator=generator).bfloat16()
        processes.average([weight], torch.zeros(()))
        optimizer.step()
    return [weight.tolist(), *[optimizer.state[weight][kind].tolist() for kind in ("exp_avg", "exp_avg_sq")]]


def scene_killed(processes, folder):
    """Says when it trains; goes on until somebody ends it."""

    def tell(event):
        if isinstance(event, Between) and event.step == 3:
            (folder / "trains").touch()
        time.sleep(0.02)

    run(folder, "killed", replace(settings(LoRASettings(4)), steps=100_000), processes, tell=tell)


def main(scene, folder):
    torch.set_num_threads(1)
    with joined() as processes:
        told = globals()[f"scene_{scene}"](processes, Path(folder))
        Path(folder, f"told-{processes.rank}.json").write_text(json.dumps(told))


# --- what comes of it


def launch(scene, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port())]
    return subprocess.run([*command, __file__, scene, str(folder)], capture_output=True, text=True, timeout=240)


def start(scene, folder):
    """The two processes without a launcher, which would end the other where one ends."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "PYTHONUNBUFFERED": "1"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, scene, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def together(folder):
    """What each of two processes told of all that they did."""
    begun = replace(settings(FullSettings(), 2), steps=HALF)
    run(folder, "begun alone", begun)
    done = launch("together", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same trainings by one process that accumulates two batches."""
    place = tmp_path_factory.mktemp("alone")
    kinds = {"lora": LoRASettings(4), "full": FullSettings()}
    return place, {name: run(place, name, settings(adapter, 2)).losses for name, adapter in kinds.items()}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_processes_have_the_losses_of_one(together, alone, kind):
    assert [told["count"] for told in together] == [2, 2]
    assert len(set(alone[1][kind])) == STEPS
    assert together[0][kind] == pytest.approx(alone[1][kind], rel=1e-5)


def test_a_full_fine_tune_lies_in_both(together):
    for told in together:
        blocks = {
            name for name in told["kinds"] if name.split(".")[0] in ("layers", "noise_refiner", "context_refiner")
        }
        assert {name for name, kind in told["kinds"].items() if kind == "DTensor"} == blocks
        assert told["rows"] == CONFIG.ffn_dim // 2


@pytest.mark.parametrize("file", ["models/full", "models/full-ema", "loras/lora", "loras/lora-ema"])
def test_the_files_are_those_of_one_process(together, alone, folder, file):
    ours, theirs = (load_file(place / f"{file}.safetensors") for place in (folder, alone[0]))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)


def test_checkpoints_are_those_of_one_process(together, alone, folder):
    ours, theirs = (load_file(p / "runs/full/checkpoint-20/state.safetensors") for p in (folder, alone[0]))
    assert {name: weight.shape for name, weight in ours.items()} == {n: w.shape for n, w in theirs.items()}
    assert any(name.startswith("optimizer.exp_avg.") for name in ours)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-5)


def test_only_the_leader_judges_a_lora_and_both_a_full_fine_tune(together, folder):
    assert [told["asked"] for told in together] == [1, 0]
    assert [told["asked in full"] for told in together] == [1, 1]
    assert (folder / "loras" / "lora-best.safetensors").exists()
    assert (folder / "models" / "full-best.safetensors").exists()


def test_what_one_process_is_asked_all_do(together, alone, folder):
    """An interrupt that came to the second process; then one process goes on by itself."""
    assert [told["stopped"][0] for told in together] == ["interrupted"] * 2
    step = together[0]["stopped"][1]
    assert 0 < step < STEPS
    assert newest_checkpoint(folder / "runs" / "stopped").step == step
    outcome = run(folder, "stopped", settings(FullSettings(), 1))
    assert "accumulation" in outcome.message
    assert outcome.losses == pytest.approx(alone[1]["full"], rel=1e-5)
    record = store_in(folder).read("stopped")
    assert (record.folder, record.processes, record.settings["gradient_accumulation_steps"]) == ("stopped", 2, 1)


def test_two_processes_go_on_with_what_one_began(together, alone, folder):
    assert together[0]["went on"] == pytest.approx(alone[1]["full"], rel=1e-5)
    assert len(store_in(folder).family("begun alone")) == 1


def test_replicas_in_bf16_are_equal_to_the_bit(together):
    assert together[0]["bf16"] == together[1]["bf16"]
    assert together[0]["bf16"][0] != torch.linspace(-1, 1, 64, dtype=torch.bfloat16).tolist()


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_is_killed_ends_the_other_with_a_sentence(tmp_path, dead):
    both = start("killed", tmp_path)
    while not (tmp_path / "trains").exists():
        assert [each.poll() for each in both] == [None, None]
        time.sleep(0.1)
    both[dead].send_signal(signal.SIGKILL)
    _, said = both[1 - dead].communicate(timeout=10)
    both[dead].wait()
    assert both[1 - dead].returncode == 1
    assert f"Process {dead} of the 2 that train together has ended" in said
    if dead == 1:  # the leader kept what it had
        record = store_in(tmp_path).read("killed")
        assert record.status == "failed"
        assert newest_checkpoint(tmp_path / "runs" / "killed").step >= 3


def test_an_interrupt_of_the_leader_keeps_what_lies_in_both(together, folder):
    assert [told["broken off"] for told in together] == ["KeyboardInterrupt()", "RunError('KeyboardInterrupt')"]
    assert store_in(folder).read("broken off").status == "interrupted"
    assert newest_checkpoint(folder / "runs" / "broken off").step == 3
    assert (folder / "models" / "broken off.safetensors").exists()


class Following:
    """Hears a run that goes on in other processes."""

    def __init__(self, at, do):
        self.at, self.do, self.heard = at, do, []

    def __call__(self, event):
        self.heard.append(event)
        if isinstance(event, Between) and event.doing == "training" and event.step == self.at:
            self.do()


def handed_over(folder, name, settings, tell, control=None):
    latents, texts = caches(folder / "caches")
    model = write_model(transformer(), folder / "models", lambda text: None)
    spec = Spec(model, latents, texts, settings, Request(name), store_in(folder), 2, 0.0, 0.5, 6.0)
    return launch_run(spec, folder / "launches", tell, control)


def test_a_run_is_handed_to_two_processes_and_followed(alone, tmp_path):
    control = Control()
    following = Following(12, control.stop)
    outcome = handed_over(tmp_path, "handed", settings(LoRASettings(4)), following, control)
    assert (outcome.run.status, outcome.run.processes) == ("stopped", 2)
    assert 12 <= outcome.run.step < STEPS
    assert outcome.losses == pytest.approx(alone[1]["lora"][: outcome.run.step], rel=1e-5)
    written = load_file(tmp_path / "loras" / "handed.safetensors")
    assert written.keys() == outcome.lora.keys()
    assert {StepDone, Started, CheckpointSaved, LoRASaved, Ended} <= set(map(type, following.heard))
    steps = [event.step for event in following.heard if isinstance(event, StepDone)]
    assert steps == [*range(1, outcome.run.step + 1)]


def test_an_interrupt_ends_what_was_handed_over_with_everything_saved(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        handed_over(tmp_path, "handed", replace(settings(FullSettings()), steps=100_000), Following(3, interrupt))
    record = store_in(tmp_path).read("handed")
    assert record.status == "interrupted"
    assert newest_checkpoint(tmp_path / "runs" / "handed").step == record.step >= 3


def test_a_number_of_processes_that_cannot_share_the_batches_is_refused(tmp_path):
    run(tmp_path, "odd", replace(settings(LoRASettings(4), 3), steps=2))
    place = store_in(tmp_path)
    place.save(replace(place.read("odd"), processes=3, settings={"gradient_accumulation_steps": 1}))

    class Two:
        rank, count, leads, link = 0, 2, True, None

    with pytest.raises(RunError, match="begun by 3 processes with 3 batches a step, which 2 processes cannot share"):
        run(tmp_path, "odd", settings(LoRASettings(4), 1), Two())


if __name__ == "__main__":
    main(*sys.argv[1:])
