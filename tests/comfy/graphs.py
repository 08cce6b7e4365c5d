"""Graphs as the page queues them, and what a run wrote."""

import json

import numpy as np
from PIL import Image


def workflow(run_name="style", steps=12, learning_rate=1e-3, seed=42, folder="bundled: nano-style", **train):
    """Nano model → dataset → caches → training, as in the template."""
    return {
        "model": {
            "class_type": "Lumina2LoadDiffusers",
            "inputs": {"folder": "lumina2-nano (bundled)", "dtype": "auto"},
        },
        "data": {
            "class_type": "Lumina2LoadDataset",
            "inputs": {
                "folder": folder,
                "resolution": 64,
                "crop": "square",
                "caption_strategy": "textfile",
                "instance_prompt": "",
                "repeats": 0,
            },
        },
        "latents": {
            "class_type": "Lumina2CacheLatents",
            "inputs": {"dataset": ["data", 0], "vae": ["model", 2], "batch_size": 8},
        },
        "texts": {
            "class_type": "Lumina2CacheTextEmbeds",
            "inputs": {"dataset": ["data", 0], "clip": ["model", 1], "system_prompt": "superior", "max_tokens": 256},
        },
        "lora": {
            "class_type": "Lumina2LoRASettings",
            "inputs": {"rank": 16, "alpha": 0, "dropout": 0, "targets": "attention+ff"},
        },
        "train": {
            "class_type": "TrainLumina2LoRA",
            "inputs": {
                "model": ["model", 0],
                "latents": ["latents", 0],
                "embeds": ["texts", 0],
                "adapter": ["lora", 0],
                "run_name": run_name,
                "steps": steps,
                "learning_rate": learning_rate,
                "rank": 16,
                "batch_size": 4,
                "seed": seed,
                "resume": "continue",
                **train,
            },
        },
    }


def sampled(name, model, prompt="red apple"):
    """KSampler's chain behind a model output, saved under a name."""
    return {
        f"{name} text": {
            "class_type": "CLIPTextEncodeLumina2",
            "inputs": {"clip": ["model", 1], "system_prompt": "superior", "user_prompt": prompt},
        },
        f"{name} empty text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": ""}},
        f"{name} empty": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        },
        f"{name} sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": model,
                "positive": [f"{name} text", 0],
                "negative": [f"{name} empty text", 0],
                "latent_image": [f"{name} empty", 0],
                "seed": 3,
                "steps": 10,
                "cfg": 4.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        f"{name} decode": {
            "class_type": "VAEDecode",
            "inputs": {"samples": [f"{name} sampler", 0], "vae": ["model", 2]},
        },
        f"{name} save": {
            "class_type": "SaveImage",
            "inputs": {"images": [f"{name} decode", 0], "filename_prefix": name},
        },
    }


def is_ours(node):
    return "umina2" in node["type"] and node["type"] != "CLIPTextEncodeLumina2"


def saved_values(node):
    """Widgets' values by name, of a node of a saved workflow: the names were saved with them."""
    names = [each["widget"]["name"] for each in node["inputs"] if each.get("widget")]
    return dict(zip(names, node["widgets_values"], strict=False))


def run_json(server, folder):
    return json.loads((server.base / "output" / "lumina2" / folder / "run.json").read_text())


def pictures(server, name):
    """What was saved under a name, in order."""
    files = sorted((server.base / "output").glob(f"{name}_*.png"))
    return [np.asarray(Image.open(file).convert("RGB"), dtype=float) for file in files]
