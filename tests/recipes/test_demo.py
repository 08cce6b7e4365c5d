"""The README's first command, as a newcomer runs it, and the template that it queues."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_server import Server
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "example_workflows" / "01_quickstart_nano.json"
# torchaudio is not installed, so ComfyUI leaves its own audio nodes and models out and says so, with their tracebacks.
KNOWN = (
    r"Traceback \(most recent call last\):\n(?:  .*\n)+ModuleNotFoundError: No module named 'torchaudio'\n",
    r"Cannot import .*/comfy_extras/nodes_audio(_encoder)?\.py module for custom nodes: No module named 'torchaudio'\n",
    r"WARNING: some comfy_extras/ nodes did not import correctly\..*\n",
    r"IMPORT FAILED: nodes_audio(_encoder)?\.py\n",
    r"torchaudio missing, .*\n",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Its folder and what it printed."""
    base = tmp_path_factory.mktemp("demo") / "a folder"
    command = [sys.executable, str(ROOT / "scripts" / "demo"), "--keep", str(base), "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return base, answer


def test_the_demo_trains_and_the_style_is_learnt(demo):
    base, answer = demo
    lines = answer.stdout.splitlines()
    result = json.loads(lines[-1])
    assert list(result) == [
        *("lora", "before", "after", "steps", "loss_first", "loss_last", "seconds"),
        *("style_distance_before", "style_distance_after"),
    ]
    assert len(lines) == 1
    assert result["steps"] == 500
    assert result["loss_last"] < result["loss_first"]
    assert result["style_distance_after"] < 0.7 * result["style_distance_before"]
    assert load_file(result["lora"])
    assert Path(result["lora"]).is_relative_to(base)
    for name in ("before", "after"):
        assert Image.open(result[name]).size == (512, 512)
    assert "Step 500" in answer.stderr or "Step 4" in answer.stderr  # it talked while it worked
    assert result["lora"] in answer.stderr


def test_its_log_holds_no_complaint(demo):
    base, _ = demo
    text = (base / "server.log").read_text()
    for known in KNOWN:
        text = re.sub(known, "", text)
    lines = text.splitlines()
    words = ("warning", "error", "traceback", "failed", "cannot", "not loaded", "deprecat")
    assert [line for line in lines if any(word in line.lower() for word in words)] == []
    assert any(line.endswith("custom_nodes/lumina2-trainer") for line in lines)  # imported; how fast: test_server.py


def test_a_folder_that_is_not_empty_is_left_alone(demo):
    base, _ = demo
    command = [sys.executable, str(ROOT / "scripts" / "demo"), "--keep", str(base)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert "is not empty" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_the_template_runs_through_comfy_run_as_it_is(demo):
    base, _ = demo
    with Server(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]), base) as server:
        comfy = Path(sys.executable).with_name("comfy" + Path(sys.executable).suffix)
        where = ["--wait", "--host", "127.0.0.1", "--port", str(server.port)]
        answer = subprocess.run(
            [str(comfy), "--skip-prompt", "run", "--workflow", str(TEMPLATE), *where],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HOME": str(base.parent), "DO_NOT_TRACK": "1"},
        )
        assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
        history = server.ask("/history")
    assert [entry["status"]["status_str"] for entry in history.values()] == ["success"]
    run = json.loads((base / "output" / "lumina2" / "nano-style" / "run.json").read_text())
    assert (run["status"], run["step"]) == ("finished", 500)
    assert len(list((base / "output" / "lumina2").glob("compare_*.png"))) == 8  # four of the demo, four of this
    assert [path.parent.name for path in (base / "output" / "lumina2").glob("*/run.json")] == ["nano-style"]
