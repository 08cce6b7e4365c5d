"""Processes that train together, seen from one: what a launcher says, lines between processes, a run followed."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.cache.given import keep_given
from training.cache.store import Store
from training.config.adapter import FullSettings, LoRASettings, LyCORISSettings
from training.config.optim import OPTIMIZERS, OptimizerSettings
from training.config.precision import PrecisionSettings
from training.config.settings import TrainSettings
from training.errors import ModelError, RunError, SettingError
from training.model.config import TransformerConfig
from training.model.transformer import Lumina2Transformer
from training.run import launching
from training.run.control import Control, Interrupt, SampleNow, SaveNow, SetLearningRate, Stop, active
from training.run.events import Between, Ended, Evaluated, LoRASaved, Said, Sample, Started, StepDone, Validated
from training.run.folder import Run, RunStore
from training.run.launching import command_line, launch
from training.run.link import launched
from training.run.processes import ALONE, Processes
from training.run.remote import Failed, Finished, Spec, obey, read_model, write_model, write_vae
from training.run.session import Request
from training.run.shards import BY_NUMBER, check_together
from training.run.wire import from_line, to_line

NANO = Path(__file__).resolve().parents[2] / "assets" / "nano"
CONFIG = TransformerConfig(
    dim=24, layers=1, refiner_layers=1, heads=2, kv_heads=1, caption_dim=8, ffn_dim=32, channels=4, axes_dim=(4, 4, 4)
)


@pytest.fixture
def environment(monkeypatch):
    """A process that a launcher started, or none."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def started(gpus=0, by=(), **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

        class Parent:
            def cmdline(self):
                return list(by)

        monkeypatch.setattr(psutil.Process, "parents", lambda self: [Parent()])

    return started


def test_without_a_launcher_it_is_alone(environment):
    environment()
    assert launched() is None
    environment(WORLD_SIZE=1, RANK=0)
    assert launched(1) is None


def test_a_launcher_says_which_it_is(environment):
    environment(WORLD_SIZE=4, RANK=3, LOCAL_RANK=1)
    assert launched() == (3, 4, torch.device("cpu"))
    environment(gpus=2, WORLD_SIZE=4, RANK=3, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)
    assert launched() == (3, 4, torch.device("cuda:1"))


def test_more_processes_than_gpus_are_refused(environment):
    environment(gpus=1, WORLD_SIZE=2, RANK=1, LOCAL_RANK=1)
    with pytest.raises(RunError, match="2 processes were started on a computer with 1 GPUs"):
        launched()


@pytest.mark.parametrize(
    ("by", "variables", "asked"),
    [
        ((), {}, 2),
        (("python", "/bin/accelerate", "launch", "--num_processes", "2", "plugin", "train"), {}, 0),
        (("python", "-m", "accelerate.commands.launch", "--num_processes=2", "plugin"), {}, 0),
        (("python", "/bin/accelerate", "launch", "--num-processes", "3", "plugin"), {"WORLD_SIZE": 2, "RANK": 0}, 0),
    ],
)
def test_fewer_processes_than_asked_are_refused(environment, by, variables, asked):
    environment(by=by, **variables)
    with pytest.raises(RunError, match="processes were asked for and the launcher started"):
        launched(asked)


def test_another_programs_options_are_none_of_ours(environment):
    environment(by=("something", "--num_processes", "8"))
    assert launched() is None


@given(step=st.integers(0, 1000), accumulated=st.integers(1, 5), count=st.integers(1, 6))
def test_the_batches_of_a_step_are_shared_out_whole(step, accumulated, count):
    shares = [list(Processes(rank, count).batch_numbers(step, accumulated)) for rank in range(count)]
    assert {len(share) for share in shares} == {accumulated}
    together = sorted(number for share in shares for number in share)
    assert together == list(Processes().batch_numbers(step, accumulated * count))


def test_alone_nothing_is_waited_for():
    weight = torch.nn.Parameter(torch.ones(2))
    loss = torch.tensor(3.0)
    assert ALONE.average([weight], loss) is loss
    assert weight.grad is None
    assert ALONE.lead(lambda: 7) == 7
    assert ALONE.share(["a", "b"]) == ["a", "b"]
    assert ALONE.meet(3, ValueError()) is None
    with pytest.raises(ZeroDivisionError):
        ALONE.lead(lambda: 1 / 0)
    ALONE.check_same("it")


# --- what does not go together


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith("bnb-")])
def test_a_full_fine_tune_takes_optimisers_that_look_at_single_numbers(name):
    settings = TrainSettings(
        adapter=FullSettings(), optimizer=OptimizerSettings(name, 1.0 if name == "prodigy" else 1e-3)
    )
    if name in BY_NUMBER:
        check_together(settings, Processes(0, 2))
    else:
        with pytest.raises(SettingError, match=f"{name} measures whole weights"):
            check_together(settings, Processes(0, 2))
    check_together(settings, ALONE)
    check_together(replace(settings, adapter=LoRASettings()), Processes(0, 2))


def test_what_steps_too_early_or_compiles_whole_blocks_is_refused():
    full = TrainSettings(adapter=FullSettings(), optimizer=OptimizerSettings("torch-adamw", 1e-3))
    fused = replace(full.optimizer, fused_backward=True, max_grad_norm=0.0)
    with pytest.raises(SettingError, match="fused_backward"):
        check_together(replace(full, optimizer=fused), Processes(0, 2))
    with pytest.raises(SettingError, match="torch_compile"):
        check_together(replace(full, precision=PrecisionSettings(torch_compile=True)), Processes(0, 2))


# --- lines


def caches(folder):
    latents, texts = [torch.randn(4, 4, 4) for _ in range(2)], [torch.randn(3, 8) for _ in range(2)]
    return keep_given(latents, texts, torch.randn(1, 8), Store(str(folder / "latents")), Store(str(folder / "text")))


def spec(folder, **changes):
    latents, texts = caches(folder)
    made = Spec(
        model=folder / "模型.safetensors",
        latents=latents,
        texts=texts,
        settings=TrainSettings(steps=20, adapter=LyCORISSettings("lokr")),
        request=Request("cats\n", attempt=2),
        store=RunStore(folder / "runs", folder / "loras", folder / "models"),
        processes=2,
        latent_shift=0.1159,
        latent_scale=0.3611,
        shift=6.0,
        vae=folder / "vae",
    )
    return replace(made, **changes)


RUN = Run("cats", "cats-2", "abc", "running", 3, 20, settings={"rank": 4, "x": None}, notes=("one", "two"))


@pytest.mark.parametrize(
    "value",
    [
        Started(RUN, 3, 1.5),
        StepDone(4, None, 1e-4, 0.1 + 0.2, 1.25, 2**40, {"sigma_q1": 0.1}),
        Validated(4, (Sample("a/b.png", "a", '猫 \u2028 "cat"', 2**63), Sample("c.png", "c", "", 1)), {"s": 1.0}),
        Evaluated(4, 0.5, best=True),
        LoRASaved(4, Path("/tmp/x y.safetensors")),
        SetLearningRate(1e-5),
        SampleNow("a\nb"),
        "paused",
        Failed("SettingError", "no"),
        [1, (2, "x"), {"of": "path", 3: None}],
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_line_gives_back_what_it_was_made_of(value):
    line = to_line(value)
    assert "\n" not in line
    assert from_line(line) == value
    assert type(from_line(line)) is type(value)


def test_a_whole_run_goes_through_a_line(tmp_path):
    made = spec(tmp_path)
    again = from_line(to_line(made))
    assert again == made
    assert again.texts.rows().keys.tolist() == made.texts.rows().keys.tolist()
    assert math.isnan(from_line(to_line(Between(0, math.nan))).loss)


@pytest.mark.parametrize(
    "line",
    [
        "nothing",
        '{"of": ".errors:Lumina2Error"}',
        '{"of": ".run.folder:RunStore.save"}',
        '{"of": "subprocess:Popen", "args": ["true"]}',
        '{"of": ".run.events:Said"}',
        '{"text": "no class"}',
    ],
)
def test_nothing_but_our_own_values_comes_out_of_a_line(line):
    with pytest.raises(RunError, match="was not written by this version"):
        from_line(line)


@pytest.mark.parametrize("foreign", [torch.ones(1), object(), psutil.Process().memory_info(), {1: {2}}])
def test_nothing_but_our_own_values_goes_into_a_line(foreign):
    with pytest.raises(TypeError):
        to_line(foreign)


# --- a listener of several processes


def test_what_a_listener_raises_waits_for_the_place_where_all_learn_of_it():
    heard = []

    def tell(event):
        heard.append(event)
        if isinstance(event, Said):
            raise KeyboardInterrupt

    deferred = Processes(0, 2, link=object()).heard(tell)
    deferred(Said("now"))
    deferred(LoRASaved(1, Path("x")))
    with pytest.raises(KeyboardInterrupt):
        deferred(Between(1, 0.5))
    assert len(heard) == 3
    Processes(1, 2, link=object()).heard(tell)(Said("nobody hears this"))
    assert len(heard) == 3


# --- the model's file


def transformer(dtype=torch.float32):
    torch.manual_seed(0)
    made = Lumina2Transformer(CONFIG).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_()
    return made.to(dtype)


def test_a_model_is_written_once_and_read_as_it_was(tmp_path):
    told = []
    model = transformer()
    path = write_model(model, tmp_path, told.append)
    assert len(told) == 1
    assert "GB" in told[0]
    assert write_model(model, tmp_path, told.append) == path
    assert len(told) == 1
    again = read_model(path)
    assert again.config == CONFIG
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert not any(weight.requires_grad for weight in again.parameters())
    assert write_model(transformer(torch.bfloat16), tmp_path, told.append) != path
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="cannot be read"):
        read_model(path)


def test_a_vae_is_laid_out_as_its_weights_say(tmp_path):
    from diffusers import AutoencoderKL

    original = AutoencoderKL.from_pretrained(NANO / "vae")
    path = write_vae(original.state_dict(), 0.1159, 0.3611, tmp_path)
    again = AutoencoderKL.from_pretrained(path)
    latents = torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        assert torch.equal(again.decode(latents).sample, original.decode(latents).sample)
        pictures = torch.rand(1, 3, 32, 32)
        assert torch.equal(again.encode(pictures).latent_dist.mean, original.encode(pictures).latent_dist.mean)
    for name in ("shift_factor", "scaling_factor", "block_out_channels", "latent_channels"):
        assert again.config[name] == original.config[name]
    written = (path / "config.json").stat().st_mtime_ns
    assert write_vae(original.state_dict(), 0.1159, 0.3611, tmp_path) == path
    assert (path / "config.json").stat().st_mtime_ns == written


# --- a run that is followed


def test_gpus_are_accelerates_and_without_them_torchrun_starts_as_many_as_asked(environment):
    environment(gpus=2)
    line = command_line(Path("spec.json"), 2)
    assert line[1:5] == ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    assert "--multi_gpu" in line
    assert line[-2:] == ["launched", "spec.json"]
    assert "--multi_gpu" not in command_line(Path("spec.json"), 1)
    environment(gpus=0)
    line = command_line(Path("spec.json"), 2)
    assert line[1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


@pytest.fixture
def followed(tmp_path, monkeypatch):
    """``launch`` with a small program in place of the launcher; ``MARK`` and lines are its to print."""

    def follow(program, tell=lambda event: None, control=None, **lines):
        head = "import sys, time\ndef say(line): print('lumina2> ' + line, flush=True)\n"
        named = "".join(f"{name} = {to_line(value)!r}\n" for name, value in lines.items())
        monkeypatch.setattr(launching, "command_line", lambda *_: [sys.executable, "-c", head + named + program])
        return launch(spec(tmp_path), tmp_path / "launches", tell, control)

    return follow


def test_events_come_in_order_and_the_outcome_last(followed, tmp_path):
    heard = []
    done = replace(RUN, status="finished", step=20)
    outcome = followed(
        "print('noise of a library')\nsay(started)\nsay(step)\nsay(finished)",
        heard.append,
        started=Started(RUN, 0),
        step=StepDone(1, 0.5, 1e-4, 1.0, 2.0),
        finished=Finished(done, (0.5, 0.25), "well"),
    )
    assert (outcome.run, outcome.losses, outcome.message) == (done, [0.5, 0.25], "well")
    assert [e for e in heard if not isinstance(e, Between)][1:] == [Started(RUN, 0), StepDone(1, 0.5, 1e-4, 1.0, 2.0)]
    assert heard[0] == Said("starting 2 processes")
    assert not list((tmp_path / "launches").iterdir())


def test_its_error_is_raised_here(followed):
    with pytest.raises(SettingError, match="rank is 0"):
        followed("say(failed); sys.exit(1)", failed=Failed("SettingError", "rank is 0; choose 1."))


def test_an_end_without_a_word_shows_the_last_lines(followed):
    with pytest.raises(RunError, match="ended with code 3") as raised:
        followed("print('on the way', flush=True); print('CUDA error', file=sys.stderr); sys.exit(3)")
    assert {"on the way", "CUDA error"} <= set(str(raised.value).splitlines())


def test_commands_go_there(followed, tmp_path):
    control, found, heard = Control(), [], []

    def tell(event):
        heard.append(event)
        if isinstance(event, Between) and event.step == 1 and not found:
            found.append(active(tmp_path / "runs" / "cats-2"))
            control.save()
            control.sample("a cat")
            control.pause()
            control.stop()

    program = """
say(started); say(between)
for line in sys.stdin:
    print(line, end='', file=sys.stderr)
    if ':Stop' in line: say(between)
    if 'pause' in line: break
say(finished)
"""
    lines = {"started": Started(RUN, 0), "between": Between(1, 0.5), "finished": Finished(RUN, (), "")}
    followed(program, tell, control, **lines)
    assert found == [control]
    assert active(tmp_path / "runs" / "cats-2") is None
    assert any(isinstance(event, Said) and "text encoder" in event.text for event in heard)


def test_an_interrupt_lets_it_save_and_is_raised_then(followed):
    heard = []

    def tell(event):
        heard.append(event)
        if isinstance(event, Between) and event.step == 1:
            raise KeyboardInterrupt

    program = """
say(started); say(between)
assert ':Interrupt' in sys.stdin.readline()
say(between); say(ended); say(finished)
"""
    ended = Ended("interrupted", 1, "", 1.0)
    lines = {"started": Started(RUN, 0), "between": Between(1, 0.5), "ended": ended, "finished": Finished(RUN, (), "")}
    with pytest.raises(KeyboardInterrupt):
        followed(program, tell, **lines)
    assert heard[-1] == ended
    assert heard.count(Between(1, 0.5)) == 1


def test_an_interrupt_before_it_began_waits_for_nothing(followed):
    def tell(event):
        if isinstance(event, Between):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        followed("time.sleep(100_000)", tell)


def test_commands_of_a_stream_reach_the_run_and_its_end_interrupts(tmp_path):
    file = tmp_path / "commands"
    file.write_text("".join(to_line(each) + "\n" for each in (SaveNow(), "pause", SetLearningRate(1e-5), Stop())))
    control = Control()
    with file.open("rb") as stream:
        obey(stream, control)
    assert control.paused
    assert control.take() == [SaveNow(), SetLearningRate(1e-5), Stop(), Interrupt()]
