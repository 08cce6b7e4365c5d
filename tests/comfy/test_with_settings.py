"""Settings nodes in a real server: what they say is trained, and what comes out loads with ComfyUI's own nodes."""

import json

import numpy as np
import pytest
from comfy_server import ServerError
from graphs import pictures, run_json, sampled, workflow
from safetensors.torch import load_file


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def config(**changed):
    chosen = {
        "optimizer": "adamw_bf16",
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "weight_decay": -1.0,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 2,
        "use_ema": True,
        "ema_decay": 0.9,
        "noise_levels": "uniform",
        "flow_schedule_shift": 2.0,
        "flow_stratified": True,
        "loss_type": "huber",
        "caption_dropout_probability": 0.1,
        "input_perturbation": 0.05,
        "prior_loss_weight": 1.0,
        "mixed_precision": "auto",
        "base_model_precision": "int8-torchao",
        "gradient_checkpointing": "selective",
        "torch_compile": False,
        "checkpoint_step_interval": 3,
        "checkpoints_total_limit": 2,
        "more": '{"scheduled_sampling_max_step_offset": 3, "scheduled_sampling_probability": 0.5}',
    }
    return node("Lumina2TrainingSettings", **{**chosen, **changed})


def test_training_settings_are_trained_with(server):
    graph = workflow("all settings", steps=7)
    graph["config"] = config()
    graph["train"]["inputs"] |= {"config": ["config", 0], "batch_size": 2}
    server.run(graph)
    record = run_json(server, "all settings")
    assert (record["status"], record["step"]) == ("finished", 7)
    written = record["settings"]
    assert (written["optimizer"], written["base_model_precision"]) == ("adamw_bf16", "int8-torchao")
    assert (written["flow_schedule_shift"], written["scheduled_sampling_max_step_offset"]) == (2.0, 3)
    run = server.base / "output" / "lumina2" / "all settings"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7"]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    rates = [event["lr"] for event in events if "event" not in event]
    assert len(rates) == 7
    assert rates[0] < rates[1] < rates[2] == 1e-3 > rates[3] > rates[6]
    loras = server.base / "models" / "loras" / "lumina2"
    raw, averaged = load_file(loras / "all settings.safetensors"), load_file(loras / "all settings-ema.safetensors")
    assert raw.keys() == averaged.keys()
    assert any(not (raw[key] == averaged[key]).all() for key in raw)
    graph["config"] = config(checkpoint_step_interval=100, gradient_checkpointing="off")
    server.run(graph)  # neither changes what is learned: nothing is trained again
    assert not (server.base / "output" / "lumina2" / "all settings-2").exists()
    graph["config"] = config(loss_type="l2")
    server.run(graph)
    assert run_json(server, "all settings-2")["settings"]["loss_type"] == "l2"


@pytest.mark.parametrize(
    "adapter",
    [
        node("Lumina2LyCORISSettings", algo="lokr", linear_dim=10000, linear_alpha=1.0, factor=4, multiplier=1.0),
        node("Lumina2LyCORISSettings", algo="lokr", linear_dim=10000, linear_alpha=1.0, factor=4, multiplier=1.0,
             lycoris_qkv="split"),
        node("Lumina2LoRASettings", rank=4, alpha=0, dropout=0.1, targets="blocks", blocks="0-2", lora_qkv="split",
             init="pissa", use_dora=True),
    ],
    ids=["lokr", "split lokr", "split dora"],
)  # fmt: skip
def test_every_kind_of_adapter_draws_the_same_from_its_file(server, adapter, request):
    name = f"adapter {request.node.callspec.id}"
    graph = workflow(name, steps=6, learning_rate=1e-2) | {"lora": adapter}
    server.run(graph)
    file = f"lumina2/{name}.safetensors"
    graph["file"] = node("LoraLoaderModelOnly", model=["model", 0], lora_name=file, strength_model=1.0)
    graph |= sampled(f"{name} file", ["file", 0]) | sampled(f"{name} handed", ["train", 0])
    graph |= sampled(f"{name} base", ["model", 0])
    server.run(graph)
    (read,), (handed,), (base,) = (pictures(server, f"{name} {way}") for way in ("file", "handed", "base"))
    assert np.array_equal(read, handed)
    assert np.abs(read - base).max() > 10
    assert "lora key not loaded" not in server.log.read_text(encoding="utf-8")


def test_impossible_settings_name_themselves(server):
    graph = workflow("impossible", steps=4)
    graph["train"]["inputs"]["config"] = ["config", 0]
    for changed, sentence in (
        ({"base_model_precision": "int4-torchao"}, "int4-torchao.*CUDA"),
        ({"optimizer": "bnb-adamw8bit"}, "pip install --upgrade bitsandbytes"),
        ({"more": '{"flow_sigmoid_scal": 2}'}, "flow_sigmoid_scale"),
        ({"optimizer": "adamw_schedulefree", "lr_scheduler": "constant"}, "averages the weights itself"),
        ({"lr_warmup_steps": 50}, "lr_warmup_steps is 50"),
    ):
        graph["config"] = config(**changed)
        with pytest.raises(ServerError, match=sentence):
            server.run(graph)
    assert not (server.base / "output" / "lumina2" / "impossible").exists()


def test_a_full_fine_tune_gives_a_model_of_its_own(server):
    graph = workflow("whole model", steps=4, learning_rate=1e-3)
    del graph["lora"], graph["train"]["inputs"]["adapter"], graph["train"]["inputs"]["rank"]
    graph["train"]["class_type"] = "TrainLumina2Full"
    graph |= sampled("whole trained", ["train", 0]) | sampled("whole base", ["model", 0])
    server.run(graph)
    (trained,), (base,) = pictures(server, "whole trained"), pictures(server, "whole base")
    assert np.abs(trained - base).max() > 10
    file = server.base / "models" / "diffusion_models" / "lumina2" / "whole model.safetensors"
    before = file.read_bytes()
    server.run(graph)  # handed out, and the base is what it was
    assert np.array_equal(pictures(server, "whole trained")[-1], trained)
    assert np.array_equal(pictures(server, "whole base")[-1], base)
    assert file.read_bytes() == before
    assert run_json(server, "whole model")["settings"]["full_targets"] == ""


def test_a_run_is_loaded_as_it_was_at_any_checkpoint(server):
    graph = workflow("to load", steps=6, learning_rate=1e-2)
    graph["config"] = config(base_model_precision="no_change")
    graph["train"]["inputs"]["config"] = ["config", 0]
    server.run(graph)
    runs = server.base / "output" / "lumina2" / "to load"
    for checkpoint, file in (
        ("", server.base / "models" / "loras" / "lumina2" / "to load.safetensors"),
        ("checkpoint-3", runs / "checkpoint-3" / "lora.safetensors"),
    ):
        loaded = node("Lumina2LoadRun", run="to load", checkpoint=checkpoint)
        save = node("SaveLoRA", lora=["load", 0], prefix=f"loras/loaded {checkpoint}", steps=3)
        server.run({"load": loaded, "save": save})
        (saved,) = (server.base / "output" / "loras").glob(f"loaded {checkpoint}*")
        kept, written = load_file(file), load_file(saved)
        assert kept.keys() == written.keys()
        assert all((kept[key] == written[key]).all() for key in kept)
        saved.unlink()
    with pytest.raises(ServerError, match=r"no checkpoint .checkpoint-4.\. There are: checkpoint-3, checkpoint-6"):
        server.run({"load": node("Lumina2LoadRun", run="to load", checkpoint="checkpoint-4"), "save": save})
    with pytest.raises(ServerError, match="no training run 'nobody'"):
        server.run({"load": node("Lumina2LoadRun", run="nobody", checkpoint=""), "save": save})
