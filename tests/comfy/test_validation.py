"""Validation in a real server: Validate Sample against KSampler's own chain, and pictures while a run trains."""

import json

import numpy as np
import pytest
from comfy_server import ServerError
from graphs import pictures, run_json, sampled, workflow
from PIL import Image

from training.adapter.formats.combine import combine
from training.adapter.formats.read import read_adapters
from training.adapter.formats.write import write_adapters

SAMPLERS = [("euler", "simple"), ("res_multistep", "simple"), ("dpmpp_2m", "beta"), ("euler_ancestral", "normal")]


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def validate_sample(**changed):
    chosen = {
        **{"model": ["model", 0], "clip": ["model", 1], "vae": ["model", 2]},
        **{"prompts": "red apple", "negative_prompt": "", "width": 64, "height": 64, "steps": 7, "guidance": 4.0},
        **{"seed": 3, "system_prompt": "superior", "lora": "", "strengths": "0, 1"},
    }
    return node("Lumina2ValidateSample", **{**chosen, **changed})


def validation_settings(**changed):
    chosen = {
        **{"validation_prompt": "red apple\nblue heart", "validation_negative_prompt": "ugly"},
        **{"validation_resolution": "64x64", "validation_num_inference_steps": 5, "validation_guidance": 4.0},
        **{"validation_seed": 3, "num_validation_images": 1, "validation_step_interval": 4},
    }
    return node("Lumina2ValidationSettings", **{**chosen, **changed})


def saved(name, source):
    return {f"save {name}": node("SaveImage", images=source, filename_prefix=name)}


def report_of(server, graph, name):
    """Runs a graph whose node "draw" is Validate Sample; its report, as the page would show it."""
    shown = {"report": node("PreviewAny", source=["draw", 2])}
    outputs = server.run({**graph, **saved(name, ["draw", 0]), **saved(f"{name} grid", ["draw", 1]), **shown})
    return json.loads(outputs["report"]["text"][0])


@pytest.fixture(scope="module")
def trained(server):
    """The server, in which a run was trained with validation."""
    graph = workflow("validated", steps=8, vae=["model", 2], clip=["model", 1])
    graph["validation"] = validation_settings(validation_prompt_library=False)
    graph["texts"]["inputs"]["validation"] = ["validation", 0]
    server.run({**graph, **saved("validated samples", ["train", 4])})
    return server


def run_folder(server):
    return server.base / "output" / "lumina2" / "validated"


def png(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def difference(a, b):
    """The mean over all pixels; below 1 where only the cache's bf16 and ComfyUI's rounding down tell them apart."""
    return np.abs(a - b).mean()


def test_a_run_draws_while_it_trains_as_ksampler_does(trained):
    drawn = sorted(path.relative_to(run_folder(trained)).as_posix() for path in run_folder(trained).rglob("*.png"))
    names = ["validation-0.png", "validation-2-0.png"]
    assert drawn == [f"samples/step-{step}/{name}" for step in (0, 4, 8) for name in names]
    lora = {"loaded": node("LoraLoaderModelOnly", model=["model", 0], lora_name="lumina2/validated.safetensors",
                           strength_model=1.0)}  # fmt: skip
    graph = {**workflow("validated", steps=8), **lora}
    for name, model in (("base chain", ["model", 0]), ("trained chain", ["loaded", 0])):
        graph |= sampled(name, model)
        graph[f"{name} sampler"]["inputs"] |= {"steps": 5}
        graph[f"{name} empty text"]["inputs"]["text"] = "ugly"
    for unused in ("data", "latents", "texts", "lora", "train"):
        del graph[unused]
    trained.run(graph)
    for step, name in ((0, "base chain"), (8, "trained chain")):
        (chain,) = pictures(trained, name)
        assert difference(png(run_folder(trained) / f"samples/step-{step}/validation-0.png"), chain) < 1
    assert difference(pictures(trained, "base chain")[0], pictures(trained, "trained chain")[0]) > 2
    assert np.array_equal(
        pictures(trained, "validated samples")[0], png(run_folder(trained) / "samples/step-8/validation-0.png")
    )


def test_the_log_tells_the_pictures_and_their_distances(trained):
    events = [json.loads(line) for line in (run_folder(trained) / "events.jsonl").read_text().splitlines()]
    told = [event for event in events if event.get("event") == "Validated"]
    assert [event["step"] for event in told] == [0, 4, 8]
    assert all(set(event["scores"]) == {"nearest_training", "diversity"} for event in told)
    assert [sample["prompt"] for sample in told[-1]["samples"]] == ["red apple", "blue heart"]
    assert run_json(trained, "validated")["status"] == "finished"


@pytest.mark.parametrize(("sampler", "scheduler"), SAMPLERS)
def test_validate_sample_draws_ksamplers_pixels(trained, sampler, scheduler):
    name = f"{sampler} {scheduler}"
    graph = {
        "model": workflow()["model"],
        "loaded": node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name="lumina2/validated.safetensors", strength_model=0.7
        ),
        **sampled(f"{name} base", ["model", 0]),
        **sampled(f"{name} lora", ["loaded", 0]),
        "draw": validate_sample(
            lora="lumina2/validated.safetensors", strengths="0, 0.7", sampler_name=sampler, scheduler=scheduler
        ),
        **saved(name + " ours", ["draw", 0]),
    }
    for part in ("base", "lora"):
        graph[f"{name} {part} sampler"]["inputs"] |= {"steps": 7, "sampler_name": sampler, "scheduler": scheduler}
    trained.run(graph)
    ours = pictures(trained, f"{name} ours")
    for number, part in enumerate(("base", "lora")):
        assert np.array_equal(ours[number], pictures(trained, f"{name} {part}")[0]), part
    assert not np.array_equal(ours[0], ours[1])


def test_several_loras_checkpoints_seeds_and_prompts_stand_side_by_side(trained):
    loras = trained.base / "models" / "loras" / "lumina2"
    stronger = combine([(read_adapters(loras / "validated.safetensors"), 3.0)])
    write_adapters(loras / "stronger.safetensors", stronger.adapters, "diffusers")  # which ComfyUI would not take
    graph = {
        "model": workflow()["model"],
        "draw": validate_sample(
            prompts="red apple\nblue heart",
            lora="validated/checkpoint-8, lumina2/stronger.safetensors",
            strengths="0, 1",
            images_per_prompt=2,
        ),
    }
    report = report_of(trained, graph, "sheet")
    labels = ["base model", "validated/checkpoint-8 at 1", "lumina2/stronger at 1"]
    assert [column["label"] for column in report["columns"]] == labels
    assert [column["strength"] for column in report["columns"]] == [0, 1, 1]
    drawn = pictures(trained, "sheet")
    assert len(drawn) == 3 * 4
    assert len(report["pictures"]) == 12
    assert sorted({picture["seed"] for picture in report["pictures"]}) == [3, 4]
    assert all(np.abs(a - b).max() > 3 for a, b in zip(drawn[0::3], drawn[2::3], strict=True))
    assert 0 < report["columns"][1]["change"] < report["columns"][2]["change"]
    assert "change" not in report["columns"][0]
    assert all(column["diversity"] > 0 for column in report["columns"])
    assert report["best"] is None  # nothing was scored
    assert pictures(trained, "sheet grid")[0].shape[1] > 3 * 192


def test_validation_settings_win_over_the_widgets_and_each_kind_of_guidance_acts(trained):
    def drawn(name, **changed):
        graph = {
            "model": workflow()["model"],
            "validation": validation_settings(validation_prompt="red apple", **changed),
            "draw": validate_sample(validation=["validation", 0], prompts="nothing of this", seed=77),
        }
        return report_of(trained, graph, name), pictures(trained, name)[0]

    report, plain = drawn("plain")
    assert [prompt["prompt"] for prompt in report["prompts"]] == ["red apple"]
    assert (report["seed"], report["steps"], report["negative_prompt"]) == (3, 5, "ugly")
    # What a run draws at its start, with the engine's own network and sampler
    assert difference(plain, png(run_folder(trained) / "samples/step-0/validation-0.png")) < 1
    for number, changed in enumerate(
        (
            {"validation_guidance_rescale": 0.7},
            {"cfg_normalization": True},
            {"cfg_trunc_ratio": 0.5},
            {"validation_shift": 6.0},
        )
    ):
        graph = workflow(f"kind {number}", steps=1, vae=["model", 2])
        graph["validation"] = validation_settings(validation_prompt="red apple", **changed)
        graph["texts"]["inputs"]["validation"] = ["validation", 0]
        trained.run(graph)
        engine = png(trained.base / "output" / "lumina2" / f"kind {number}" / "samples/step-0/validation-0.png")
        _, comfyui = drawn(f"guided {number}", **changed)
        assert difference(comfyui, plain) > 2, changed
        assert difference(comfyui, engine) < 1, changed


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"prompts": " \n"}, "prompts is empty"),
        ({"strengths": "much"}, "write numbers by commas"),
        ({"lora": "validated/checkpoint-999"}, "There is no LoRA of 'validated/checkpoint-999'"),
        ({"lora": "../checkpoint-8"}, "There is no LoRA"),
        ({"lora": "lumina2/no.safetensors"}, "There is no LoRA 'lumina2/no.safetensors'"),
        ({"clip_score_model": "/no/such/clip"}, "There is no CLIP at '/no/such/clip'"),
    ],
)
def test_mistakes_name_themselves(trained, changed, sentence):
    graph = {"model": workflow()["model"], "draw": validate_sample(**changed), **saved("never", ["draw", 0])}
    with pytest.raises(ServerError, match=sentence):
        trained.run(graph)


def test_an_edited_library_is_read_again(trained):
    library = trained.base / "input" / "mine.json"

    def drawn(name):
        graph = {
            "model": workflow()["model"],
            "validation": validation_settings(validation_prompt="", user_prompt_library="mine.json"),
            "draw": validate_sample(validation=["validation", 0]),
        }
        return [prompt["prompt"] for prompt in report_of(trained, graph, name)["prompts"]]

    library.write_text(json.dumps({"one": "red apple"}))
    assert drawn("first library") == ["red apple"]
    library.write_text(json.dumps({"one": "red apple", "two": "a blue heart"}))
    assert drawn("second library") == ["red apple", "a blue heart"]
    library.write_text("[]")
    with pytest.raises(ServerError, match=r"mine\.json"):
        drawn("broken library")
