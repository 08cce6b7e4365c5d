"""Datasets in a real server: two at once, pictures and latents from other nodes, captions and previews."""

import json

import numpy as np
import pytest
from comfy_server import ServerError
from graphs import run_json, workflow
from PIL import Image


@pytest.fixture
def own_pictures(tmp_path):
    """A folder of pictures of two sizes, one of them damaged."""
    folder = tmp_path / "my pictures 图片"
    folder.mkdir()
    for number, size in enumerate([(96, 96), (200, 100), (96, 96), (120, 120)]):
        pixels = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"red apple {number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def text_of(server, outputs, name):
    return outputs[name]["text"][0]


def test_two_datasets_one_of_them_regularisation_train_together(server, own_pictures):
    graph = workflow("two datasets", steps=8)
    graph["regularisation"] = node(
        "Lumina2LoadDataset",
        folder=str(own_pictures),
        resolution=128,
        crop="preserve",
        caption_strategy="filename",
        instance_prompt="",
        repeats=3,
        is_regularisation_data=True,
        probability=2.0,
        dataset=["data", 0],
    )
    for cache in ("latents", "texts"):
        graph[cache]["inputs"]["dataset"] = ["regularisation", 0]
    server.run(graph)
    record = run_json(server, "two datasets")
    assert (record["status"], record["step"]) == ("finished", 8)
    events = (server.base / "output" / "lumina2" / "two datasets" / "events.jsonl").read_text().splitlines()
    losses = [event["loss"] for event in map(json.loads, events) if "event" not in event]
    assert len(losses) == 8
    # A regularisation batch's target is the model's own word: at the start its loss is nearly nothing.
    assert min(losses) < 0.05 < max(losses)
    server.run(graph)
    assert run_json(server, "two datasets")["step"] == 8
    assert not (server.base / "output" / "lumina2" / "two datasets-2").exists()
    graph["regularisation"]["inputs"]["is_regularisation_data"] = False
    server.run(graph)
    assert run_json(server, "two datasets-2")["status"] == "finished"


def test_a_dataset_is_previewed_with_what_was_left_out(server, own_pictures):
    graph = {
        "data": node(
            "Lumina2LoadDataset",
            folder=str(own_pictures),
            resolution=64,
            crop="square",
            caption_strategy="filename",
            instance_prompt="",
            repeats=0,
            options=["options", 0],
        ),
        "options": node("Lumina2DatasetOptions", minimum_image_size=100.0, trigger_word="zorblax"),
        "model": node("Lumina2LoadDiffusers", folder="lumina2-nano (bundled)", dtype="auto"),
        "preview": node("Lumina2PreviewDataset", dataset=["data", 0], limit=10, clip=["model", 1]),
        "report": node("PreviewAny", source=["preview", 1]),
        "captions": node("PreviewAny", source=["preview", 3]),
        "sheet": node("SaveImage", images=["preview", 0], filename_prefix="sheet"),
    }
    outputs = server.run(graph)
    report = json.dumps(outputs, ensure_ascii=False)
    assert "2 of 5 pictures" in report
    assert "2 smaller than minimum_image_size (red apple 0.png, red apple 2.png)" in report
    assert "broken.png" in report
    assert "zorblax, red apple 1" in report
    assert "2 captions of" in report
    assert "tokens on average" in report
    (saved,) = outputs["sheet"]["images"]  # others on this server save pictures of the same name
    sheet = np.asarray(Image.open(server.base / "output" / saved["filename"]).convert("RGB"))
    assert sheet.shape[1] > 350
    assert sheet.std() > 10


def test_pictures_of_the_graph_are_trained_on(server):
    graph = workflow("from images", steps=4)
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(server.base / "input" / "one.png")
    graph["image"] = node("LoadImage", image="one.png")
    graph["flipped"] = node("ImageInvert", image=["image", 0])
    graph["both"] = node("ImageBatch", image1=["image", 0], image2=["flipped", 0])
    graph["data"] = node(
        "Lumina2DatasetFromImages",
        images=["both", 0],
        captions="a pale square\na dark square",
        resolution=64,
        crop="square",
        repeats=0,
    )
    server.run(graph)
    assert run_json(server, "from images")["status"] == "finished"
    graph["data"]["inputs"]["captions"] = "one\ntwo\nthree"
    graph["train"]["inputs"]["run_name"] = "all alike"
    server.run(graph)  # three lines are no list of two: one caption for both
    graph["data"]["inputs"]["captions"] = " "
    with pytest.raises(ServerError, match="A caption is empty"):
        server.run(graph)


def test_latents_of_other_nodes_are_trained_on(server):
    graph = workflow("from latents", steps=4)
    del graph["data"], graph["texts"]
    graph["image"] = node("LoadImage", image="two.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        server.base / "input" / "two.png"
    )
    graph["made"] = node("MakeTrainingDataset", images=["image", 0], vae=["model", 2], clip=["model", 1], texts="noise")
    graph["latents"] = node("Lumina2DatasetFromLatents", latents=["made", 0], conditioning=["made", 1])
    graph["train"]["inputs"]["embeds"] = ["latents", 1]
    server.run(graph)
    assert run_json(server, "from latents")["status"] == "finished"


def test_captions_are_written_beside_the_pictures(server, own_pictures):
    (own_pictures / "red apple 0.txt").write_text("mine")
    graph = {
        "data": node(
            "Lumina2LoadDataset",
            folder=str(own_pictures),
            resolution=64,
            crop="square",
            caption_strategy="filename",
            instance_prompt="",
            repeats=0,
        ),
        "preview": node("Lumina2PreviewDataset", dataset=["data", 0], limit=10),
        "save": node("Lumina2SaveCaptions", dataset=["data", 0], captions=["preview", 3], overwrite="keep existing"),
        "after": node("Lumina2PreviewDataset", dataset=["save", 0], limit=10),
        "captions": node("PreviewAny", source=["after", 3]),
    }
    outputs = server.run(graph)
    assert (own_pictures / "red apple 0.txt").read_text() == "mine"
    assert (own_pictures / "red apple 3.txt").read_text() == "red apple 3\n"
    assert "mine" in json.dumps(outputs)


def test_simpletuners_own_file_is_read(server, own_pictures):
    config = server.base / "input" / "multidatabackend.json"
    config.write_text(
        json.dumps(
            [
                {
                    "id": "apples",
                    "type": "local",
                    "instance_data_dir": str(own_pictures),
                    "crop": True,
                    "crop_aspect": "square",
                    "resolution": 64,
                    "resolution_type": "pixel_area",
                    "caption_strategy": "filename",
                },
                {"id": "texts", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "x"},
            ]
        )
    )
    graph = workflow("from config", steps=4)
    graph["data"] = node("Lumina2LoadDatasetConfig", file="multidatabackend.json")
    server.run(graph)
    assert run_json(server, "from config")["status"] == "finished"
    config.write_text(config.read_text().replace("crop_aspect", "crop_aspekt"))
    with pytest.raises(ServerError, match=r"crop_aspekt.*crop_aspect"):
        server.run(graph)


def test_pictures_can_be_encoded_while_training(server, own_pictures):
    graph = workflow("online", steps=4, folder=str(own_pictures))
    graph["data"]["inputs"] |= {"caption_strategy": "filename", "options": ["options", 0]}
    graph["options"] = node("Lumina2DatasetOptions", crop_style="random", vae_cache_clear_each_epoch=True)
    with pytest.raises(ServerError, match="Wire a VAE into the train node"):
        server.run(graph)
    graph["train"]["inputs"]["vae"] = ["model", 2]
    server.run(graph)
    assert run_json(server, "online")["status"] == "finished"
