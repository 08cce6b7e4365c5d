"""Every template, queued as it is saved; only shorter, and with the bundled model in place of the real one."""

import json
from pathlib import Path

import pytest
from graphs import is_ours, run_json, saved_values

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "example_workflows").glob("*.json"))
STEPS = {"TrainLumina2LoRA": 4, "TrainLumina2Full": 4, "KSampler": 2, "Lumina2ValidateSample": 2}
# As people saved them with earlier versions: a copy of each template is added whenever a node gets a new widget.
SAVED = sorted((ROOT / "tests" / "comfy" / "saved").glob("*.json"))
CHECKPOINTS = {"checkpoint_step_interval": 2, "validation_step_interval": 2, "validation_num_inference_steps": 2}


def shortened(prompt):
    """Four steps of training, two of sampling; the real model's loader, folder and sizes become the bundled ones'."""
    real = any(node["class_type"] == "CheckpointLoaderSimple" for node in prompt.values())
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        inputs |= {"steps": STEPS[kind]} if kind in STEPS else {}
        inputs |= {name: value for name, value in CHECKPOINTS.items() if name in inputs}
        if kind == "Lumina2ValidateSample":
            inputs["lora"] = inputs["lora"].replace("-100", "-2").replace("-200", "-4").split("\n")[0]
        if kind == "CheckpointLoaderSimple":
            node |= {
                "class_type": "Lumina2LoadDiffusers",
                "inputs": {"folder": "lumina2-nano (bundled)", "dtype": "auto", "fine_tune": "none"},
            }
        if real:
            inputs |= {name: 64 for name in ("width", "height", "resolution") if name in inputs}
            if kind == "Lumina2LoadDataset":
                inputs["folder"] = "bundled: nano-concept"
    return prompt


def short_config(folder):
    """The bundled SimpleTuner configuration with fewer steps, in ComfyUI's input folder."""
    source = ROOT / "assets" / "nano" / "simpletuner"
    (folder / "short").mkdir()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"max_train_steps": 4, "validation_step_interval": 2, "validation_num_inference_steps": 2}
    (folder / "short" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    datasets = json.loads((source / "multidatabackend.json").read_text(encoding="utf-8"))
    datasets[0]["instance_data_dir"] = str(source.parent / "style")
    (folder / "short" / "multidatabackend.json").write_text(json.dumps(datasets), encoding="utf-8")
    return "short/config.json"


def test_there_are_eight_each_with_a_picture():
    assert [path.name[:2] for path in TEMPLATES] == [f"{number:02}" for number in range(1, 9)]
    for path in TEMPLATES:
        assert path.with_suffix(".jpg").stat().st_size < 150_000


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_runs_as_it_is(server, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    prompt = shortened(server.api_prompt(workflow))
    train = next(node["inputs"] for node in prompt.values() if node["class_type"].startswith("TrainLumina2"))
    folder = train["run_name"] or "nano-simpletuner"
    train["run_name"] = f"template {path.stem}" if train["run_name"] else ""
    for node in prompt.values():
        if node["class_type"] == "Lumina2LoadConfig":
            assert node["inputs"]["file"] == "bundled: nano-simpletuner"
            node["inputs"]["file"] = short_config(server.base / "input")
        if node["class_type"] == "Lumina2ValidateSample":
            node["inputs"]["lora"] = node["inputs"]["lora"].replace(folder, train["run_name"])
    outputs = server.run(prompt)
    run = run_json(server, train["run_name"] or folder)
    assert run["status"] == "finished"
    assert run["step"] == run["target"] > 0
    assert any("images" in shown for shown in outputs.values())
    assert "lora key not loaded" not in server.log.read_text(encoding="utf-8")


def test_workflows_of_earlier_versions_keep_their_values_in_the_right_widgets(server):
    checked = set()
    for path in SAVED:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        prompt = server.api_prompt(workflow)
        for node in workflow["nodes"]:
            if not is_ours(node):
                continue
            inputs = prompt[str(node["id"])]["inputs"]
            wired = {each["name"] for each in node["inputs"] if each.get("link") is not None}
            for name, value in saved_values(node).items():
                assert name in wired or inputs[name] == value, f"{path.stem}: {node['type']}.{name}"
                checked.add((node["type"], name))
    assert len(checked) > 100


def test_groups_and_notes_are_the_same_in_all():
    for path in TEMPLATES:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        titles = [group["title"] for group in workflow["groups"]]
        assert titles[:4] == ["1 Model", "2 Pictures", "3 Prepare", "4 Train"], path.stem
        assert titles[4] in ("5 Compare", "5 Convert")
        notes = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
        assert len(notes) == 5
        assert notes[0].startswith("Press **Run**. Then change the folder in group 2.")
        assert all(len([line for line in note.splitlines() if line]) <= 3 for note in notes), path.stem
        kinds = {node["type"] for node in workflow["nodes"]}
        assert not kinds & {"Reroute", "PrimitiveNode"}
        for node in workflow["nodes"]:
            if node["type"] == "CheckpointLoaderSimple":
                (model,) = node["properties"]["models"]
                assert node["widgets_values"] == [model["name"]]
