"""The command line: one process as a user starts it, from anywhere; the rest within this one."""

import json
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from training.__main__ import COMMANDS, main
from training.command import cache
from training.command.plan import open_plan, overrides, run_store
from training.command.terminal import RunLines, Terminal, obeying_signals
from training.errors import SettingError
from training.files import write_json
from training.run.control import Control, Interrupt
from training.run.events import Between, Said

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ask(capsys):
    """(exit code, what --json printed, what went to stderr)."""

    def ask(*arguments):
        code = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return ask


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "my cats 猫"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(folder / f"cat {number}.png")
        (folder / f"cat {number}.txt").write_text("a red square", encoding="utf-8")
    return folder


def config(**options):
    """A configuration for the nano model in the working folder."""
    values = {
        "model_type": "lora",
        "max_train_steps": 3,
        "pretrained_model_name_or_path": "lumina2-nano",
        "output_dir": "out",
        "data_backend_config": "data.json",
        "mixed_precision": "no",
    }
    Path("config.json").write_text(json.dumps({**values, **options}), encoding="utf-8")
    return Path("config.json")


def datasets(folder, **keys):
    write_json(Path("data.json"), [{"id": "a", "instance_data_dir": str(folder), "resolution": 64, **keys}])


def test_it_starts_by_the_plugins_folder_in_an_isolated_python(tmp_path):
    def start(*arguments):
        command = [sys.executable, "-I", str(ROOT), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    told = start("--help")
    assert told.returncode == 0
    assert all(f"> {name} " in told.stdout for name in COMMANDS)
    assert "Exit codes: 0 done" in told.stdout
    answer = start("info", "gone.safetensors")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "cannot be read" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["info"], ["clean", "x", "--fly"], ["init", "x", "--memory", "big"]]
)
def test_what_is_no_command_is_told_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python <plugin folder>" in capsys.readouterr().err


def test_info_of_a_lora(ask, capsys):
    name = "diffusion_model.layers.0.attention.out.lora_"
    weights = {f"{name}A.weight": torch.zeros(4, 48), f"{name}B.weight": torch.zeros(48, 4)}
    save_file(weights, "a.safetensors", {"ss_steps": "7"})
    code, found, _ = ask("info", "a.safetensors")
    assert code == 0
    assert (found["format"], found["layers"], found["ranks"], found["parameters"]) == ("ComfyUI", 1, [4], 384)
    assert found["metadata"] == {"ss_steps": "7"}
    assert main(["info", "a.safetensors"]) == 0
    assert "ss_steps = 7" in capsys.readouterr().out


def test_what_cannot_be_read_is_named(ask):
    save_file({"x": torch.zeros(1)}, "no lora.safetensors")
    Path("text.safetensors").write_text("hello")
    for name, sentence in (("no lora", "holds no LoRA"), ("text", "cannot be read"), ("gone", "cannot be read")):
        code, found, error = ask("info", f"{name}.safetensors")
        assert (code, found) == (1, None)
        assert sentence in error


def test_info_of_pictures_datasets_and_configurations(ask, pictures):
    (pictures / "broken.png").write_bytes(b"no picture")
    code, found, _ = ask("info", pictures)
    assert (code, found["pictures"], found["used"]) == (0, 4, 3)
    assert any("broken.png" in line for line in found["report"])
    datasets(pictures, caption_strategy="textfile")
    assert ask("info", "data.json")[1]["used"] == 3
    _, found, _ = ask("info", config(snr_gamma=5))
    assert found["output_dir"] == "out"
    assert any("snr_gamma" in line for line in found["report"])


def test_estimate_tells_parts_and_what_would_save(ask, capsys):
    sizes = {
        "hidden_size": 96,
        "num_layers": 3,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "axes_dim_rope": [8, 8, 8],
    }
    write_json(Path("config.json"), sizes)
    code, found, _ = ask("estimate", "--model", ".", "--resolution", "512")
    assert (code, found["preset"]) == (0, 8)
    assert found["total"] == sum(found["parts"].values())
    assert main(["estimate", "--model", ".", "--full", "--no-gradient-checkpointing"]) == 0
    table = capsys.readouterr().out
    assert "optimiser states" in table
    assert "gradient_checkpointing = true" in table
    code, found, error = ask("estimate", "--resolution", "7")
    assert (code, found) == (2, None)
    assert "resolution is 7" in error


# check


def test_check_reads_everything_and_starts_nothing(ask, pictures):
    datasets(pictures, caption_strategy="textfile")
    code, found, _ = ask("check", config(), "--strict", "--device", "cpu")
    assert (code, found["missing"], found["datasets"]) == (0, [], ["a"])
    assert not Path("out").exists(), "nothing is written"


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        (
            {
                "optimizer": "bnb-adamw8bit",
                "base_model_precision": "int4-torchao",
                "evaluation_type": "clip",
                "pretrained_evaluation_model_name_or_path": "no/clip",
                "eval_steps_interval": 5,
                "checkpoints_total_limit": 10**8,
                "train_batch_size": 20_000,
            },
            (
                "needs the package bitsandbytes: pip install bitsandbytes",
                "int4-torchao, which needs a CUDA or XPU device",
                "no/clip is not on this machine",
                "no dataset is of dataset_type eval",
                "checkpoints take about",
                "GB are free.*train_batch_size = 1 saves",
            ),
        ),
        (
            {"mixed_precision": "fp16", "pretrained_model_name_or_path": "nobody/nothing"},
            ("mixed_precision is fp16, which cpu does not train in", "nobody/nothing.*Download it", "no GPU here"),
        ),
        ({"pretrained_model_name_or_path": "."}, ("has no folder 'transformer'",)),
    ],
)
def test_what_this_machine_lacks_is_a_warning(ask, pictures, options, sentences):
    datasets(pictures)
    code, found, _ = ask("check", config(**options), "--device", "cpu", "--strict")
    assert code == 3
    for sentence in sentences:
        assert any(re.search(sentence, each) for each in found["missing"]), found["missing"]


def test_check_of_folders_that_are_not_there_and_of_datasets(ask):
    datasets("/no such folder", minimum_image_size=32)
    code, found, _ = ask("check", config())
    assert code == 0, "the files are understood"
    assert any("/no such folder is no folder here" in each for each in found["missing"])
    assert any("are enlarged up to 2.0 times" in each for each in found["missing"])
    code, found, _ = ask("check", "data.json")
    assert (code, found["datasets"]) == (0, ["a"])
    assert ask("check", "data.json", "--strict")[0] == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda: config(learning_rat=1),
            'config.json: there is no option "learning_rat"; did you mean "learning_rate"?',
        ),
        (lambda: config(data_backend_config="gone.json"), "gone.json does not exist; correct data_backend_config"),
        (lambda: datasets("x", crop_aspec="square"), 'there is no setting "crop_aspec"; did you mean "crop_aspect"?'),
        (lambda: Path("config.json").write_text("{"), "config.json, line 1, is not JSON"),
        (lambda: Path("config.json").unlink(), "There is no config.json or config/config.json here.*init"),
    ],
)
def test_files_that_are_not_understood_give_2(ask, pictures, change, sentence):
    datasets(pictures)
    config()
    change()
    for command in ("check", "train", "cache", "validate"):
        code, found, error = ask(command)
        assert (code, found) == (2, None)
        assert re.search(sentence, error), error
    assert not Path("out").exists()


def test_options_follow_and_win(pictures):
    assert overrides(["--seed=7", "--use_ema", "--learning_rate", "1e-5", "--lr-end", "-1"]) == {
        "seed": "7", "use_ema": "true", "learning_rate": "1e-5", "lr-end": "-1"
    }  # fmt: skip
    with pytest.raises(SettingError, match="has 'x' where an option should stand"):
        overrides(["x"])
    datasets(pictures)
    rest = ["--learning_rate", "1e-5", "--seed=7", "--cache_dir_text", "texts"]
    plan = open_plan(Namespace(config=config(seed=3), rest=rest, adopt_our_defaults=False))
    settings = plan.config.settings()
    assert (settings.optimizer.learning_rate, settings.seed) == (1e-5, 7)
    assert (plan.output, plan.text_folder) == (Path.cwd() / "out", Path.cwd() / "texts")
    assert plan.datasets[0].captions.caption_strategy == "filename", "SimpleTuner's own"


def test_runs_in_comfyuis_output_leave_their_files_in_its_models(tmp_path):
    output = tmp_path / "output" / "lumina2"
    assert run_store(output).loras == output / "loras"
    (tmp_path / "models" / "loras").mkdir(parents=True)
    store = run_store(output)
    assert (store.root, store.loras) == (output, tmp_path / "models" / "loras" / "lumina2")
    assert store.models == tmp_path / "models" / "diffusion_models" / "lumina2"


def test_a_missing_folder_is_told_before_a_model_is_fetched(ask, monkeypatch):
    monkeypatch.setattr(cache, "find_model", None)  # would be called
    datasets("/no such folder")
    code, _, error = ask("cache", "--config", config())
    assert (code, "/no such folder is no folder here" in error) == (1, True)


def test_train_starts_nothing_that_would_fail(ask, pictures):
    datasets(pictures)
    config(optimizer="bnb-adamw8bit", report_to="none")
    code, found, error = ask("train", "--device", "cpu")
    assert (code, found) == (2, None)
    assert "It cannot start so: optimizer is bnb-adamw8bit" in error
    assert not Path("out").exists()


# init


def test_init_writes_what_check_understands(ask, pictures):
    code, made, _ = ask("init", pictures, "--model", "lumina2-nano", "--memory", "8", "--trigger", "zorblax")
    assert (code, made["pictures"], made["captions"]) == (0, 3, 3)
    file = Path(made["config"])
    assert file == Path("config") / "my cats 猫" / "config.json"
    text = file.read_text(encoding="utf-8")
    assert "// how much it can learn" in text
    assert '"base_model_precision": "int8-torchao"' in text
    assert '"validation_prompt": "zorblax a red square"' in text
    code, found, _ = ask("check", file)
    assert (code, found["datasets"]) == (0, ["my cats 猫"])
    code, _, error = ask("init", pictures)
    assert code == 2
    assert "is there already" in error
    assert ask("init", pictures, "--out", "plain", "--plain", "--memory", "99")[0] == 0
    plain = json.loads(Path("plain/config.json").read_text(encoding="utf-8"))
    assert (plain["lora_rank"], plain["pretrained_model_name_or_path"]) == (64, "Alpha-VLLM/Lumina-Image-2.0")
    assert json.loads(Path("plain/multidatabackend.json").read_text(encoding="utf-8"))[0]["resolution"] == 1024


def test_init_says_what_it_cannot_do(ask, tmp_path, pictures):
    (tmp_path / "empty").mkdir()
    code, _, error = ask("init", "empty")
    assert (code, "holds no pictures" in error) == (1, True)
    code, _, error = ask("init", pictures, "--memory", "4")
    assert (code, "the smallest preset is for 8 GB" in error) == (2, True)
    for text in pictures.glob("*.txt"):
        text.unlink()
    made = ask("init", pictures, "--trigger", "zorblax")[1]
    entry = Path(made["datasets"]).read_text(encoding="utf-8")
    assert '"caption_strategy": "instanceprompt"' in entry
    assert '"instance_prompt": "zorblax"' in entry


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no signals to one process")
def test_a_signal_while_encoding_keeps_what_is_encoded(ask, pictures, monkeypatch):
    datasets(pictures)
    told = []

    def interrupt(terminal, text):
        if text.startswith("encoding"):
            told.append(text.partition(",")[0])
            if len(told) < 3:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Terminal, "show", interrupt)
    for command in ("cache", "train"):  # the one ends while it encodes pictures, the other while it encodes captions
        code, found, error = ask(command, "--config", config(vae_batch_size=1))
        assert (code, found) == (0, {"status": "interrupted"})
        assert "everything is saved" in error
    code, found, _ = ask("cache", "--config", config())
    assert (code, found["latents"], found["captions"]) == (0, 3, 3)
    began = ["encoding picture 1 of 3", "encoding caption 1 of 5"]
    assert told == [*began, "encoding caption 1 of 3", "encoding caption 2 of 3"]  # nothing twice
    assert not list(Path("out").glob("*/run.json"))


# The terminal


class _File(list):
    def isatty(self):
        return False

    def write(self, text):
        self.append(text)

    def flush(self):
        pass


def test_a_run_is_told_in_lines():
    file = _File()
    lines = RunLines(Terminal(file), 10)
    lines(Said("hello"))
    lines(Between(3, 0.25))
    lines(Between(4, 0.25))  # soon after: it waits
    assert "".join(file) == "hello\nstep 3 of 10, loss 0.2500\n"


def test_signals_stop_after_the_step_and_at_once_the_second_time():
    control, said = Control(), []
    before = signal.getsignal(signal.SIGINT)
    with obeying_signals(control, said.append):
        os.kill(os.getpid(), signal.SIGTERM)
        assert control.take() == [Interrupt()]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(said) == 1
    assert signal.getsignal(signal.SIGINT) is before
