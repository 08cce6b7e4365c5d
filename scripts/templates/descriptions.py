"""What the templates hold. All run as they are on the bundled model; those for the real one differ in group 1 alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .layout import Group, Node

START = "Press **Run**. Then change the folder in group 2."
REAL_MODEL = {
    "name": "lumina_2.safetensors",
    "url": "https://huggingface.co/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/all_in_one/lumina_2.safetensors",
    "directory": "checkpoints",
}
NANO = Node("load", "Lumina2LoadDiffusers", {"folder": "lumina2-nano (bundled)", "dtype": "auto"})
REAL = Node("load", "CheckpointLoaderSimple", {"ckpt_name": REAL_MODEL["name"]}, models=(REAL_MODEL,))
PIXELS = {"Lumina2LoadDiffusers": 64, "CheckpointLoaderSimple": 1024}


def model_group(load: Node, *more: Node) -> Group:
    small = "This small model needs no GPU."
    real = "The real model: ComfyUI offers to download it where it is missing."
    return Group("1 Model", f"{START}\n\n{small if load is NANO else real}", "Start here", ((load, *more),))


def dataset(key: str = "data", title: str = "", wires: dict[str, str] | None = None, **widgets: Any) -> Node:
    chosen = {"folder": "bundled: nano-style", "resolution": 64, "crop": "square", "caption_strategy": "textfile"}
    return Node(key, "Lumina2LoadDataset", {**chosen, **widgets}, wires or {}, title)


def pictures(*nodes: Node, note: str = "") -> Group:
    usual = "Your own: a folder under ComfyUI's *input*, `cat.txt` beside `cat.png`.\n\n"
    usual += "Resolution 64 for this small model, 1024 for Lumina-Image-2.0."
    return Group("2 Pictures", note or usual, "Pictures and captions", (nodes,))


def prepare(
    data: str = "data",
    batch_size: int = 8,
    embeds: dict[str, str] | None = None,
    *more: Node,
    latents: dict[str, str] | None = None,
) -> Group:
    return Group(
        "3 Prepare",
        "Pictures and captions are encoded once\n\nand kept for the next training.",
        "Prepare",
        (
            (
                Node(
                    "latents",
                    "Lumina2CacheLatents",
                    {"batch_size": batch_size},
                    {"dataset": f"{data}.dataset", "vae": "load.VAE", **(latents or {})},
                ),
                Node(
                    "embeds",
                    "Lumina2CacheTextEmbeds",
                    {"system_prompt": "superior"},
                    {"dataset": f"{data}.dataset", "clip": "load.CLIP", **(embeds or {})},
                ),
                *more,
            ),
        ),
    )


def train(kind: str = "TrainLumina2LoRA", wires: dict[str, str] | None = None, **widgets: Any) -> Node:
    usual = {"run_name": "nano-style", "steps": 500, "learning_rate": 0.001, "batch_size": 8, "seed": 42}
    sources = {"model": "load.MODEL", "latents": "latents.latents", "embeds": "embeds.embeds", "vae": "load.VAE"}
    return Node("train", kind, {**usual, **widgets}, {**sources, **(wires or {})})


def train_group(*nodes: Node, note: str = "") -> Group:
    usual = "Running again with the same settings trains nothing twice.\n\n"
    usual += "The LoRA is saved under *models/loras/lumina2*."
    samples = Node("samples", "PreviewImage", wires={"images": "train.samples"}, title="Samples", height_px=200)
    return Group("4 Train", note or usual, "Training", ((*nodes, samples),), width_px=370)


LORA = Node("lora", "Lumina2LoRASettings", {"rank": 16, "targets": "attention+ff"})


def compare(prompt: str, prompts: str, pixels: int = 64, grid: bool = True, trained: str = "train.MODEL") -> Group:
    """The same prompt, seed and noise, without and with what was trained; below, a grid of prompts."""

    def sampler(key: str, model: str, title: str) -> Node:
        widgets = {"seed": 1, "control_after_generate": "fixed", "steps": 20, "cfg": 4.0, "sampler_name": "euler"}
        wires = {"model": model, "positive": "prompt.CONDITIONING", "negative": "negative.CONDITIONING"}
        return Node(
            key, "KSampler", {**widgets, "scheduler": "simple"}, {**wires, "latent_image": "size.LATENT"}, title
        )

    def decode(of: str, title: str) -> Node:
        return Node(f"decode {of}", "VAEDecode", wires={"samples": f"{of}.LATENT", "vae": "load.VAE"}, title=title)

    said = Node(
        "prompt",
        "CLIPTextEncodeLumina2",
        {"system_prompt": "superior", "user_prompt": prompt},
        {"clip": "load.CLIP"},
        "Prompt",
        "positive",
        150,
    )
    unwanted = Node(
        "negative", "CLIPTextEncode", {"text": ""}, {"clip": "load.CLIP"}, "Negative prompt", "negative", 90
    )
    count = 4 if pixels == 64 else 1
    size = Node("size", "EmptySD3LatentImage", {"width": pixels, "height": pixels, "batch_size": count})
    stitched = Node(
        "stitch",
        "ImageStitch",
        {"direction": "right", "match_image_size": True, "spacing_width": 8, "spacing_color": "white"},
        {"image1": "decode without.IMAGE", "image2": "decode with.IMAGE"},
        "Without | with",
    )
    save = Node("save", "SaveImage", {"filename_prefix": "lumina2/compare"}, {"images": "stitch.IMAGE"}, height_px=342)
    columns = [
        [said, unwanted, size],
        [sampler("without", "load.MODEL", "Without"), sampler("with", trained, "With")],
        [decode("without", "Decode: without"), decode("with", "Decode: with"), stitched],
        [replace(save, title="Without | with")],
    ]
    note = "The same prompt, seed and noise on both sides: without what was trained | with it."
    if grid:
        note += "\n\nBelow, a grid of prompts: the base model beside the trained one."
        widgets = {"prompts": prompts, "width": pixels, "height": pixels, "steps": 20, "guidance": 4.0, "seed": 42}
        wires = {"model": "load.MODEL", "clip": "load.CLIP", "vae": "load.VAE", "lora_model": "train.LORA_MODEL"}
        columns[2].append(Node("validate", "Lumina2ValidateSample", {**widgets, "strengths": "0, 1"}, wires))
        grid_save = Node("grid", "SaveImage", {"filename_prefix": "lumina2/grid"}, {"images": "validate.grid"})
        columns[3].append(replace(grid_save, title="Prompts: base | trained", height_px=380))
    return Group("5 Compare", note, "Before and after", tuple(map(tuple, columns)), width_px=290)


REPORT_PX = 100  # what a node needs to tell what it understood
CHECKPOINTS = "\n".join(f"nano-checkpoints/checkpoint-{step}" for step in (100, 200, 300))
EMOJI = "red heart\ncat face\ngrinning face\nevergreen tree"
WITH_LORA = {"adapter": "lora.adapter"}

TEMPLATES: dict[str, tuple[Group, ...]] = {
    "01_quickstart_nano": (
        model_group(NANO),
        pictures(dataset()),
        prepare(),
        train_group(LORA, train(wires=WITH_LORA, rank=16)),
        compare("red heart", EMOJI),
    ),
    "02_lora_from_a_folder": (
        model_group(REAL),
        pictures(
            dataset(
                folder="my-pictures",
                resolution=1024,
                crop="preserve",
                caption_strategy="instanceprompt",
                instance_prompt="a photo of zorblax",
            ),
            note="Bare photos are enough: put ten to thirty into *input/my-pictures*.\n\n"
            "Replace zorblax by a word of your own: it calls your subject up.",
        ),
        prepare(batch_size=1),
        train_group(
            replace(LORA, widgets={"rank": 16, "targets": "attention+ff"}),
            train(wires=WITH_LORA, run_name="zorblax", steps=1500, learning_rate=1e-4, batch_size=1, rank=16),
        ),
        compare("a photo of zorblax on a beach", "a photo of zorblax\na dog in a garden", 1024),
    ),
    "03_lora_from_a_simpletuner_config": (
        model_group(NANO),
        Group(
            "2 Pictures",
            "SimpleTuner's two files, as they are; each node tells what it understood.\n\n"
            "The config wins over the widgets of the train node.",
            "Configuration",
            (
                (
                    Node(
                        "config", "Lumina2LoadConfig", {"file": "bundled: nano-simpletuner"}, height_px=REPORT_PX + 153
                    ),
                    Node(
                        "data",
                        "Lumina2LoadDatasetConfig",
                        wires={"file": "config.dataset_file", "config": "config.config"},
                        height_px=2 * REPORT_PX + 104,
                    ),
                ),
            ),
        ),
        prepare(
            embeds={"validation": "config.validation", "config": "config.config"}, latents={"config": "config.config"}
        ),
        train_group(train(wires={"config": "config.config"}, run_name="", steps=300, rank=16)),
        compare("red heart", EMOJI),
    ),
    "04_lycoris": (
        model_group(NANO),
        pictures(dataset()),
        prepare(),
        train_group(
            Node("lycoris", "Lumina2LyCORISSettings", {"algo": "lokr", "linear_dim": 10000, "factor": 8}),
            train(wires={"adapter": "lycoris.adapter"}, run_name="nano-lokr", rank=16),
            note="LoKr: a Kronecker product in place of two thin matrices.\n\nComfyUI's own LoRA loaders read it.",
        ),
        compare("red heart", EMOJI),
    ),
    "05_full_fine_tune": (
        model_group(NANO),
        pictures(dataset()),
        prepare(),
        train_group(
            Node("config", "Lumina2TrainingSettings", {"optimizer": "adamw_bf16", "use_ema": True}),
            train(
                "TrainLumina2Full",
                wires={"config": "config.config"},
                run_name="nano-full",
                steps=300,
                learning_rate=1e-4,
            ),
            note="All weights are trained: far more memory, a tenth of a LoRA's learning rate.\n\n"
            "The model is saved under *models/diffusion_models/lumina2*.",
        ),
        compare("red heart", EMOJI, grid=False),
    ),
    "06_regularisation": (
        model_group(NANO),
        pictures(
            dataset(title="The subject", folder="bundled: nano-concept"),
            dataset(
                "regularisation",
                "What shall stay as it is",
                {"dataset": "data.dataset"},
                folder="bundled: nano-style-heldout",
                is_regularisation_data=True,
            ),
            note="The second dataset holds the model where it is:\n\n"
            "its target is what the model said before the training.",
        ),
        prepare("regularisation"),
        train_group(LORA, train(wires=WITH_LORA, run_name="nano-concept", steps=400, rank=16)),
        compare("zorblax", "zorblax\ncat face\nred heart\nevergreen tree"),
    ),
    "07_compare_checkpoints": (
        model_group(NANO),
        pictures(dataset()),
        prepare(
            "data",
            8,
            {"validation": "validation.validation"},
            Node(
                "validation",
                "Lumina2ValidationSettings",
                {
                    "validation_prompt": "red heart\ncat face",
                    "validation_resolution": "64x64",
                    "validation_num_inference_steps": 20,
                    "validation_step_interval": 100,
                },
            ),
        ),
        train_group(
            Node("config", "Lumina2TrainingSettings", {"checkpoint_step_interval": 100, "checkpoints_total_limit": 10}),
            train(wires={"config": "config.config"}, run_name="nano-checkpoints", steps=300, rank=16),
            note="A checkpoint and samples every 100 steps.\n\nThe run's folder is *output/lumina2/nano-checkpoints*.",
        ),
        Group(
            "5 Compare",
            "Every checkpoint beside the base model: which one is best?\n\nRun this template a second time if the "
            "training is not over.",
            "Which checkpoint",
            (
                (
                    Node(
                        "validate",
                        "Lumina2ValidateSample",
                        {
                            "prompts": "red heart\ncat face\ngrinning face",
                            "width": 64,
                            "height": 64,
                            "steps": 20,
                            "lora": CHECKPOINTS,
                            "strengths": "1",
                        },
                        {
                            "model": "load.MODEL",
                            "clip": "load.CLIP",
                            "vae": "load.VAE",
                            "lora_model": "train.LORA_MODEL",
                        },
                    ),
                ),
                (
                    Node(
                        "save",
                        "SaveImage",
                        {"filename_prefix": "lumina2/compare"},
                        {"images": "validate.grid"},
                        height_px=380,
                    ),
                ),
            ),
            width_px=330,
        ),
    ),
    "08_convert_a_lora": (
        model_group(NANO),
        pictures(dataset()),
        prepare(),
        train_group(
            LORA,
            train(wires=WITH_LORA, run_name="nano-style", steps=500, rank=16),
            note="Any LoRA of Lumina2 will do: delete groups 2 to 4\n\nand name a file of yours in *Convert LoRA*.",
        ),
        Group(
            "5 Convert",
            "The same LoRA in another format: for diffusers here.\n\n*Load LoRA (Lumina2)* reads every format.",
            "Another format",
            (
                (
                    Node(
                        "convert",
                        "Lumina2ConvertLoRA",
                        {"format": "diffusers"},
                        {"lora": "train.lora_name"},
                    ),
                    Node(
                        "loaded",
                        "Lumina2LoadLoRA",
                        {"strength": 1.0},
                        {"model": "load.MODEL", "lora": "convert.lora_name"},
                    ),
                ),
                (
                    Node(
                        "validate",
                        "Lumina2ValidateSample",
                        {"prompts": EMOJI, "width": 64, "height": 64, "steps": 20, "strengths": "1"},
                        {
                            "model": "loaded.MODEL",
                            "clip": "load.CLIP",
                            "vae": "load.VAE",
                        },
                    ),
                ),
                (
                    Node(
                        "save",
                        "SaveImage",
                        {"filename_prefix": "lumina2/compare"},
                        {"images": "validate.grid"},
                        height_px=380,
                    ),
                ),
            ),
        ),
    ),
}

# What stands in for a template of the real model where it shall run here.
RUN_INSTEAD: dict[str, tuple[Group, ...]] = {
    "02_lora_from_a_folder": (
        model_group(NANO),
        pictures(
            dataset(
                folder="bundled: nano-concept",
                caption_strategy="instanceprompt",
                instance_prompt="zorblax",
            )
        ),
        prepare(),
        train_group(LORA, train(wires=WITH_LORA, run_name="folder", steps=400, rank=16)),
        compare("zorblax", "zorblax\ncat face"),
    ),
}
