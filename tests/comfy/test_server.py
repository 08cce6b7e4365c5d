"""A real ComfyUI server with the plugin in it: it starts clean, and the nano model draws."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NODES = {
    "Lumina2LoadDiffusers": "Load Lumina2 (Diffusers)",
    "Lumina2LoadDataset": "Load Dataset",
    "Lumina2DatasetOptions": "Dataset Options",
    "Lumina2LoadDatasetConfig": "Load Dataset Config",
    "Lumina2DatasetFromImages": "Dataset from Images",
    "Lumina2DatasetFromLatents": "Dataset from Latents",
    "Lumina2SaveCaptions": "Save Captions",
    "Lumina2PreviewDataset": "Preview Dataset",
    "Lumina2CacheLatents": "Cache Latents",
    "Lumina2CacheTextEmbeds": "Cache Text Embeds",
    "Lumina2LoRASettings": "LoRA Settings",
    "Lumina2LyCORISSettings": "LyCORIS Settings",
    "Lumina2TrainingSettings": "Training Settings",
    "TrainLumina2LoRA": "Train Lumina2 LoRA",
    "Lumina2LoadRun": "Load Training Run",
    "Lumina2ValidateSample": "Validate Sample",
    "Lumina2PushToHub": "Push to Hub",
    "Lumina2ReportSettings": "Tracking Settings",
    "Lumina2SliderSettings": "Slider Settings",
    "Lumina2SaveConfig": "Save Training Config",
    "Lumina2LoadConfig": "Load Training Config",
    "TrainLumina2Full": "Train Lumina2 (full fine-tune)",
    "Lumina2ValidationSettings": "Validation Settings",
    "Lumina2LoadLoRA": "Load LoRA (Lumina2)",
    "Lumina2SaveLoRA": "Save LoRA",
    "Lumina2ConvertLoRA": "Convert LoRA",
    "Lumina2MergeLoRA": "Merge LoRAs",
    "Lumina2ExtractLoRA": "Extract LoRA",
    "Lumina2ResizeLoRA": "Resize LoRA",
}
TRAIN_WIDGETS = ["run_name", "steps", "learning_rate", "rank", "batch_size", "seed", "resume", "checkpoint"]


def test_plugin_loads_without_a_word(server):
    log = server.log.read_text().split("To see the GUI go to")[0]  # before anything was asked of it
    failed = {line for line in log.splitlines() if "IMPORT FAILED" in line}
    # torchaudio is not installed: two audio nodes of ComfyUI's own stay away
    assert failed <= {"IMPORT FAILED: nodes_audio.py", "IMPORT FAILED: nodes_audio_encoder.py"}
    assert not [line for line in log.splitlines() if 'File "' in line and "custom_nodes/lumina2-trainer" in line]
    assert any(line.endswith("custom_nodes/lumina2-trainer") for line in log.splitlines())


def test_importing_the_plugin_loads_nothing_new(tmp_path, packed):
    """As the registry hands it out, by ComfyUI's way of loading, after ComfyUI's own modules: only our own and
    comfy_api may come, and quickly."""
    plugin = packed[0]
    program = f"""
import asyncio, importlib.util, json, sys, time
sys.argv = ["main.py", "--cpu", "--base-directory", {str(tmp_path)!r}]
import comfy.options
comfy.options.enable_args_parsing()
import utils.extra_config
import nodes, server, execution
asyncio.run(nodes.init_builtin_extra_nodes())
before, comfyui_s = set(sys.modules), time.process_time()
spec = importlib.util.spec_from_file_location(
    "pack", {str(plugin / "__init__.py")!r}, submodule_search_locations=[{str(plugin)!r}]
)
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
spec.loader.exec_module(module)
extension = asyncio.run(module.comfy_entrypoint())
listed = asyncio.run(extension.get_node_list())
share = (time.process_time() - comfyui_s) / comfyui_s
print(json.dumps([share, len(listed), *sorted(set(sys.modules) - before)]))
"""
    comfyui = Path(os.environ["COMFYUI_PATH"])
    for name in ("custom_nodes", "input", "output", "user", "models"):
        (tmp_path / name).mkdir()
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=comfyui,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(comfyui)},
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    share, listed, *new = json.loads(answer.stdout.splitlines()[-1])
    assert listed == len(NODES)
    assert share <= 0.1  # of what ComfyUI itself takes
    assert [name for name in new if name.split(".")[0] not in ("pack", "comfy_api")] == []
    assert "pack.nodes.train" in new


def test_a_newer_comfyui_loads_all_of_it_too(server):
    version = server.ask("/system_stats")["system"]["comfyui_version"]
    if tuple(map(int, version.split(".")[:2])) < (0, 28):
        pytest.skip(f"this is ComfyUI {version}; a newer one: COMFYUI_PATH=… scripts/test tests/comfy tests/browser")
    log = server.log.read_text(encoding="utf-8")
    failed = ("IMPORT FAILED", "rror", "deprecated")
    assert [line for line in log.splitlines() if "lumina2-trainer" in line and any(map(line.count, failed))] == []


def test_every_node_is_there_with_its_texts(server):
    """English stands in the nodes themselves, which the page falls back to: there is no locales/en to keep in step."""
    known = server.ask("/object_info")
    for name, title in NODES.items():
        node = known[name]
        assert (node["display_name"], node["category"]) == (title, "Lumina2")
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        assert [key for key, spec in inputs.items() if not spec[1].get("tooltip")] == []
        assert all(node["output_tooltips"]), name
        assert node["description"], name
    assert {name for name in known if "umina2" in name and known[name]["category"] == "Lumina2"} == set(NODES)


def test_saved_widgets_stay_where_they_are(server):
    node = server.ask("/object_info/TrainLumina2LoRA")["TrainLumina2LoRA"]
    inputs = {**node["input"]["required"], **node["input"]["optional"]}
    kinds = ("INT", "FLOAT", "STRING", "COMBO")
    order = [name for name, spec in inputs.items() if isinstance(spec[0], list) or spec[0] in kinds]
    assert order == [*TRAIN_WIDGETS, "continue_token", "attempt", "launch"]
    assert inputs["seed"][1]["control_after_generate"] is False
    assert node["output"] == ["MODEL", "LORA_MODEL", "STRING", "LOSS_MAP", "IMAGE"]


def test_chinese_texts_name_every_node_input_and_output(server):
    known = server.ask("/object_info")
    chinese = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(chinese) == set(NODES)
    for name in NODES:
        inputs = {**known[name]["input"].get("required", {}), **known[name]["input"].get("optional", {})}
        assert set(chinese[name]["inputs"]) == set(inputs), name
        outputs = chinese[name].get("outputs", {})
        assert list(outputs) == [str(number) for number in range(len(known[name]["output"]))], name
        for text in (*chinese[name]["inputs"].values(), *outputs.values()):
            assert text["name"], name
            assert text["tooltip"], name
        assert chinese[name]["display_name"], name
        assert chinese[name]["description"], name
    assert server.ask("/i18n")["zh"]["nodeDefs"]["TrainLumina2LoRA"] == chinese["TrainLumina2LoRA"]


def test_nano_draws_with_comfyui_own_nodes(server):
    def picture(name, text):
        return {
            f"{name}1": {
                "class_type": "CLIPTextEncodeLumina2",
                "inputs": {"clip": ["1", 1], "system_prompt": "superior", "user_prompt": text},
            },
            f"{name}2": {
                "class_type": "KSampler",
                "inputs": {
                    "model": ["1", 0],
                    "positive": [f"{name}1", 0],
                    "negative": ["2", 0],
                    "latent_image": ["3", 0],
                    "seed": 1,
                    "steps": 20,
                    "cfg": 3.0,
                    "sampler_name": "euler",
                    "scheduler": "simple",
                    "denoise": 1.0,
                },
            },
            f"{name}3": {"class_type": "VAEDecode", "inputs": {"samples": [f"{name}2", 0], "vae": ["1", 2]}},
            f"{name}4": {"class_type": "SaveImage", "inputs": {"images": [f"{name}3", 0], "filename_prefix": name}},
        }

    prompt = {
        "1": {"class_type": "Lumina2LoadDiffusers", "inputs": {"folder": "lumina2-nano (bundled)", "dtype": "auto"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 4}},
        **picture("apple", "red apple"),
        **picture("heart", "blue heart"),
    }
    server.run(prompt)

    def pictures(name):
        files = sorted((server.base / "output").glob(f"{name}_*.png"))
        assert len(files) == 4
        return np.stack([np.asarray(Image.open(f).convert("RGB"), dtype=float) for f in files])

    apple, heart = pictures("apple"), pictures("heart")
    assert apple.shape == (4, 64, 64, 3)
    assert apple.std() > 20  # pictures, not a flat field
    assert np.abs(apple - heart).mean() > 5  # the prompt arrives
    red, blue = apple.mean((0, 1, 2)), heart.mean((0, 1, 2))
    assert red[0] - red[2] > blue[0] - blue[2]  # and is understood
