"""The command line, as a user starts it: by the plugin's folder, from anywhere, in an isolated Python."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments, folder):
    command = [sys.executable, "-I", str(ROOT), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_info_tells_what_a_file_holds(tmp_path):
    name = "diffusion_model.layers.0.attention.out.lora_"
    weights = {f"{name}A.weight": torch.zeros(4, 48), f"{name}B.weight": torch.zeros(48, 4)}
    save_file(weights, tmp_path / "a.safetensors", {"ss_steps": "7"})
    answer = start("info", "a.safetensors", "--json", folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert (found["format"], found["layers"], found["ranks"], found["parameters"]) == ("ComfyUI", 1, [4], 384)
    assert found["metadata"] == {"ss_steps": "7"}
    assert "ss_steps = 7" in start("info", "a.safetensors", folder=tmp_path).stdout


def test_what_cannot_be_read_is_named(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "no lora.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name, sentence in (("no lora", "holds no LoRA"), ("text", "cannot be read"), ("gone", "cannot be read")):
        answer = start("info", f"{name}.safetensors", folder=tmp_path)
        assert (answer.returncode, answer.stdout) == (1, "")
        assert sentence in answer.stderr
        assert "Traceback" not in answer.stderr


def test_estimate_tells_parts_and_what_would_save(tmp_path):
    config = {
        "hidden_size": 96,
        "num_layers": 3,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "axes_dim_rope": [8, 8, 8],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    answer = start("estimate", "--model", ".", "--resolution", "512", "--json", folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["total"] == sum(found["parts"].values())
    assert found["preset"] == 8
    table = start("estimate", "--model", ".", "--full", "--no-gradient-checkpointing", folder=tmp_path).stdout
    assert "optimiser states" in table
    assert "gradient_checkpointing = true" in table
    answer = start("estimate", "--resolution", "7", folder=tmp_path)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "resolution is 7" in answer.stderr
