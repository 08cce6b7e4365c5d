"""Settings that a train node can be given by wire."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..training.config.adapter import ALGOS, INITS, QKV, TARGETS, LoRASettings, lycoris_from_json
from ..training.config.objective import LOSS_TYPES
from ..training.config.optim import OPTIMIZERS, SCHEDULERS
from ..training.config.precision import BASE_PRECISION, MIXED_PRECISION
from ..training.config.settings import Config
from ..training.errors import SettingError
from . import places
from .sockets import AdapterSocket, ConfigSocket

NOISE_LEVELS: dict[str, dict[str, Any]] = {
    "logit-normal": {},
    "uniform": {"flow_use_uniform_schedule": True},
    "beta": {"flow_use_beta_schedule": True},
}
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "auto": {"gradient_checkpointing": None},
    "on": {"gradient_checkpointing": True},
    "selective": {"gradient_checkpointing": True, "gradient_checkpointing_selective": True},
    "off": {"gradient_checkpointing": False},
}


class Lumina2LoRASettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2LoRASettings",
            display_name="LoRA Settings",
            category="Lumina2",
            description="Size and place of the LoRA. What is set here wins over the train node's rank.",
            inputs=[
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=1024,
                    tooltip="How much it can learn: 8–32 for most uses, 64–128 with care.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="The LoRA acts with alpha / rank; 0 means equal to the rank.",
                ),
                io.Float.Input(
                    "dropout",
                    default=0.0,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    tooltip="The share of its inputs that is left out in each step, against overfitting.",
                ),
                io.Combo.Input(
                    "targets",
                    options=list(TARGETS),
                    tooltip="attention: least. attention+ff: also the feed-forward layers, better for styles. "
                    "blocks: also their modulation. all: every linear layer.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    optional=True,
                    tooltip="Which blocks: 0-12,20 of the main layers, noise_refiner, context_refiner. Empty: all.",
                ),
                io.Combo.Input(
                    "lora_qkv",
                    options=list(QKV),
                    optional=True,
                    tooltip="fused: one adapter over query, key and value. split: one each, three times as large.",
                ),
                io.Combo.Input(
                    "init",
                    options=list(INITS),
                    optional=True,
                    tooltip="How it starts. pissa and olora start from the weights' main directions and learn faster.",
                ),
                io.Boolean.Input(
                    "use_dora",
                    default=False,
                    optional=True,
                    tooltip="Also learn the length of each row (DoRA): closer to a full fine-tune, slower.",
                ),
                io.Boolean.Input(
                    "use_rslora",
                    default=False,
                    optional=True,
                    tooltip="Scale with alpha / √rank: keeps high ranks as strong as low ones.",
                ),
                io.Float.Input(
                    "loraplus_lr_ratio",
                    default=1.0,
                    min=0.1,
                    max=64.0,
                    step=0.5,
                    optional=True,
                    tooltip="LoRA+: how much faster B learns than A; 16 is usual, 1 is off.",
                ),
                io.String.Input(
                    "init_lora",
                    default="",
                    optional=True,
                    tooltip="A LoRA under models/loras to start from; its rank wins.",
                ),
            ],
            outputs=[AdapterSocket.Output(display_name="adapter", tooltip="For the train node's adapter.")],
        )

    @classmethod
    def execute(
        cls,
        rank: int,
        alpha: float,
        dropout: float,
        targets: str,
        blocks: str = "",
        lora_qkv: str = "fused",
        init: str = "default",
        use_dora: bool = False,
        use_rslora: bool = False,
        loraplus_lr_ratio: float = 1.0,
        init_lora: str = "",
    ) -> io.NodeOutput:
        settings = LoRASettings(
            rank,
            alpha,
            dropout,
            targets,
            blocks.strip(),
            lora_qkv,
            init,
            use_dora,
            use_rslora,
            loraplus_lr_ratio,
            _start(init_lora),
        )
        return io.NodeOutput(settings)


class Lumina2LyCORISSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2LyCORISSettings",
            display_name="LyCORIS Settings",
            category="Lumina2",
            description="An adapter of the LyCORIS family in place of a LoRA.",
            inputs=[
                io.Combo.Input(
                    "algo",
                    options=[algo for algo in ALGOS if algo != "locon"],
                    default="lokr",
                    tooltip="lokr: small and strong, the usual choice. loha: for styles. full: every weight's change.",
                ),
                io.Int.Input(
                    "linear_dim",
                    default=10000,
                    min=1,
                    max=100000,
                    tooltip="The rank. For lokr 10000 means full matrices.",
                ),
                io.Float.Input(
                    "linear_alpha",
                    default=1.0,
                    min=0.0,
                    max=100000.0,
                    step=0.5,
                    tooltip="It acts with alpha / rank; without effect on lokr's full matrices. 0: equal to the rank.",
                ),
                io.Int.Input(
                    "factor",
                    default=16,
                    min=-1,
                    max=1024,
                    tooltip="lokr: the size of the small matrix. 4–8 learns more, 16–32 makes a smaller file.",
                ),
                io.Float.Input(
                    "multiplier",
                    default=1.0,
                    min=0.01,
                    max=10.0,
                    step=0.05,
                    tooltip="What its effect is multiplied with while training.",
                ),
                io.String.Input(
                    "lycoris_config",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="SimpleTuner's lycoris_config as JSON; what it says wins over the widgets above.",
                ),
                io.String.Input(
                    "init_lora",
                    default="",
                    optional=True,
                    tooltip="A file under models/loras to start from: of the same algo and sizes, with full of any.",
                ),
                io.Combo.Input(
                    "lycoris_qkv",
                    options=list(QKV),
                    optional=True,
                    tooltip="fused: one over query, key, value. split: one each, for diffusers; ComfyUI's file grows.",
                ),
            ],
            outputs=[AdapterSocket.Output(display_name="adapter", tooltip="For the train node's adapter.")],
        )

    @classmethod
    def execute(
        cls,
        algo: str,
        linear_dim: int,
        linear_alpha: float,
        factor: int,
        multiplier: float,
        lycoris_config: str = "",
        init_lora: str = "",
        lycoris_qkv: str = "fused",
    ) -> io.NodeOutput:
        values: dict[str, Any] = {"algo": algo, "linear_dim": linear_dim, "linear_alpha": linear_alpha}
        values |= {"multiplier": multiplier, "qkv": lycoris_qkv} | ({"factor": factor} if algo == "lokr" else {})
        settings = lycoris_from_json(values | json_object(lycoris_config))
        return io.NodeOutput(replace(settings, init_lora=_start(init_lora)))


class Lumina2TrainingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2TrainingSettings",
            display_name="Training Settings",
            category="Lumina2",
            description="How a training learns and what it does to need less memory. The defaults are sound.",
            inputs=[
                io.Combo.Input(
                    "optimizer",
                    options=list(OPTIMIZERS),
                    default="torch-adamw",
                    tooltip="torch-adamw: safe. ao-adamw8bit: less memory. prodigy finds the rate: learning_rate 1.",
                ),
                io.Combo.Input(
                    "lr_scheduler",
                    options=list(SCHEDULERS),
                    tooltip="How the learning rate goes over the run; cosine ends gently.",
                ),
                io.Int.Input(
                    "lr_warmup_steps",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps in which the learning rate rises from 0.",
                ),
                io.Float.Input(
                    "weight_decay",
                    default=-1.0,
                    min=-1.0,
                    max=10.0,
                    step=0.001,
                    round=1e-6,
                    tooltip="Pulls weights towards 0. -1: the optimiser's own, 0.01 for torch-adamw.",
                ),
                io.Float.Input(
                    "max_grad_norm",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="Larger gradients are scaled down to it. 0: off.",
                ),
                io.Int.Input(
                    "gradient_accumulation_steps",
                    default=1,
                    min=1,
                    max=1024,
                    tooltip="Batches a step: 2–4 is like a larger batch at the memory of a small one.",
                ),
                io.Boolean.Input(
                    "use_ema",
                    default=False,
                    tooltip="Also keep a running average of the weights, saved as <run>-ema: often smoother.",
                ),
                io.Float.Input(
                    "ema_decay",
                    default=0.995,
                    min=0.0,
                    max=0.99999,
                    step=0.001,
                    round=1e-5,
                    tooltip="How slowly the average follows.",
                ),
                io.Combo.Input(
                    "noise_levels",
                    options=list(NOISE_LEVELS),
                    tooltip="Which noise levels are trained on: logit-normal favours the middle ones.",
                ),
                io.Float.Input(
                    "flow_schedule_shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Moves them towards noise. 0: as suits the picture's size, 3.16 at 1024 px.",
                ),
                io.Boolean.Input(
                    "flow_stratified",
                    default=False,
                    tooltip="Spread the noise levels of a batch evenly: a steadier loss.",
                ),
                io.Combo.Input(
                    "loss_type",
                    options=list(LOSS_TYPES),
                    tooltip="huber and smooth_l1 weigh large errors less: good for uneven pictures.",
                ),
                io.Float.Input(
                    "caption_dropout_probability",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="The share of pictures that are shown without their caption.",
                ),
                io.Float.Input(
                    "input_perturbation",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Extra noise in what the network sees, against overfitting; 0.1 is much.",
                ),
                io.Float.Input(
                    "prior_loss_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How much regularisation data counts.",
                ),
                io.Combo.Input(
                    "mixed_precision",
                    options=list(MIXED_PRECISION),
                    tooltip="auto: bf16 where the device is fast at it, else fp32.",
                ),
                io.Combo.Input(
                    "base_model_precision",
                    options=list(BASE_PRECISION),
                    tooltip="Store the frozen weights smaller: int8 halves bf16. The LoRA itself stays exact.",
                ),
                io.Combo.Input(
                    "gradient_checkpointing",
                    options=list(CHECKPOINTING),
                    tooltip="Less memory for a third more time. auto: for large models. selective: between both.",
                ),
                io.Boolean.Input(
                    "torch_compile",
                    default=False,
                    tooltip="Compile the blocks: minutes at the start, then quicker steps. Needs a C++ compiler.",
                ),
                io.Int.Input(
                    "checkpoint_step_interval",
                    default=500,
                    min=1,
                    max=1_000_000,
                    tooltip="Steps between checkpoints.",
                ),
                io.Int.Input(
                    "checkpoints_total_limit",
                    default=5,
                    min=1,
                    max=10_000,
                    tooltip="So many of the newest checkpoints are kept.",
                ),
                io.String.Input(
                    "more",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip='Further options as JSON, by SimpleTuner\'s names: {"optimizer_config": "eps=1e-6"}.',
                ),
                ConfigSocket.Input("config", optional=True, tooltip="Settings that these are added to; these win."),
            ],
            outputs=[ConfigSocket.Output(display_name="config", tooltip="For the train node's config.")],
        )

    @classmethod
    def execute(
        cls,
        noise_levels: str,
        flow_schedule_shift: float,
        weight_decay: float,
        gradient_checkpointing: str,
        more: str = "",
        config: Config | None = None,
        **values: Any,
    ) -> io.NodeOutput:
        values |= NOISE_LEVELS[noise_levels] | CHECKPOINTING[gradient_checkpointing]
        values |= {
            "flow_schedule_auto_shift": flow_schedule_shift == 0,
            "flow_schedule_shift": flow_schedule_shift or None,
            "weight_decay": None if weight_decay < 0 else weight_decay,
        }
        before = config or Config({})
        chosen = replace(before, values={**before.values, **values, **json_object(more)})
        chosen.check()
        return io.NodeOutput(chosen)


def _start(name: str) -> str:
    """The path of a file under models/loras."""
    return str(places.lora_file(name.strip())) if name.strip() else ""


def json_object(text: str) -> dict[str, Any]:
    """What a widget says in JSON; nothing where it is empty.

    Raises:
        SettingError: it is no JSON object.
    """
    try:
        found = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        raise SettingError(f'This is not JSON: {error}. Write it as {{"name": value}}.') from None
    if not isinstance(found, dict):
        raise SettingError('A JSON object is wanted: {"name": value}.')
    return found
