"""Who is told of a training, and what goes to the Hugging Face hub. No token is ever a widget."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from ..training.config.report import ReportSettings
from ..training.config.settings import Config
from ..training.errors import SettingError
from . import places
from .progress import Progress
from .sockets import ConfigSocket, LoraModelSocket


class Lumina2ReportSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2ReportSettings",
            display_name="Tracking Settings",
            category="Lumina2",
            description="Who is told of a training: trackers, the Hugging Face hub, webhooks. Log in beforehand in a "
            "terminal; no token is written here.",
            inputs=[
                io.Boolean.Input(
                    "local_report",
                    default=True,
                    tooltip="report.html in the run's folder: loss, samples and settings in one file.",
                ),
                io.Boolean.Input("tensorboard", default=False, tooltip="Curves and samples for tensorboard."),
                io.Boolean.Input(
                    "wandb",
                    default=False,
                    tooltip="Curves and samples on wandb. Run `wandb login` first, or set WANDB_MODE=offline.",
                ),
                io.String.Input("tracker_project_name", default="lumina2-training", tooltip="The project on wandb."),
                io.String.Input(
                    "tracker_run_name", default="", tooltip="The run's name there. Empty: that of its folder."
                ),
                io.Boolean.Input(
                    "push_to_hub",
                    default=False,
                    tooltip="Upload the LoRA with a model card when the training ends. Run `hf auth login` first.",
                ),
                io.Boolean.Input(
                    "push_checkpoints_to_hub", default=False, tooltip="Also upload each checkpoint's LoRA meanwhile."
                ),
                io.String.Input(
                    "hub_model_id", default="", tooltip="The repository: name or owner/name. Empty: the run's folder."
                ),
                io.Boolean.Input(
                    "model_card_private", default=True, tooltip="A new repository is one that only you can see."
                ),
                io.String.Input(
                    "model_card_note", default="", multiline=True, tooltip="A text of yours for the model card."
                ),
                io.String.Input(
                    "webhook_config",
                    default="",
                    optional=True,
                    tooltip="A JSON file with the webhooks to tell, for example Discord's. See the help page.",
                ),
                ConfigSocket.Input("config", optional=True, tooltip="Settings that these are added to; these win."),
            ],
            outputs=[ConfigSocket.Output(display_name="config", tooltip="For the train node's config.")],
        )

    @classmethod
    def execute(
        cls,
        local_report: bool,
        tensorboard: bool,
        wandb: bool,
        webhook_config: str = "",
        config: Config | None = None,
        **values: Any,
    ) -> io.NodeOutput:
        wanted = {"simpletuner": local_report, "tensorboard": tensorboard, "wandb": wandb}
        values = {name: value.strip() if isinstance(value, str) else value for name, value in values.items()}
        values["report_to"] = ",".join(name for name, on in wanted.items() if on) or "none"
        if file := webhook_config.strip():
            if file.startswith(("{", "[", "http:", "https:")):
                raise SettingError(
                    "webhook_config is not a file. A webhook's address is a secret, and a workflow is part of every "
                    "picture: write it into a JSON file, and name that here."
                )
            values["webhook_config"] = str(Path(folder_paths.base_path) / Path(file).expanduser())
            ReportSettings(webhook_config=values["webhook_config"]).webhooks()
        before = config or Config({})
        chosen = replace(before, values={**before.values, **values})
        chosen.check()
        return io.NodeOutput(chosen)


class Lumina2PushToHub(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2PushToHub",
            display_name="Push to Hub",
            category="Lumina2",
            description="Uploads a training run or a LoRA to the Hugging Face hub, with a model card.",
            inputs=[
                io.String.Input(
                    "run_or_lora",
                    default="",
                    tooltip="A run's folder, or a LoRA's name under models/loras. lora_name of the train node fits.",
                ),
                io.String.Input(
                    "repo_id", default="", tooltip="The repository: name or owner/name. Empty: named like the run."
                ),
                io.Boolean.Input("private", default=True, tooltip="A new repository is one that only you can see."),
                io.String.Input("note", default="", multiline=True, tooltip="A text of yours for the model card."),
                LoraModelSocket.Input(
                    "lora_model", optional=True, tooltip="A LoRA by wire; run_or_lora is its name then."
                ),
            ],
            outputs=[io.String.Output(display_name="url", tooltip="The repository's web address.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(
        cls,
        run_or_lora: str,
        repo_id: str,
        private: bool,
        note: str = "",
        lora_model: dict[str, torch.Tensor] | None = None,
    ) -> io.NodeOutput:
        from ..training.files import write_tensors
        from ..training.report.hub import hub_name, push_file, push_run
        from ..training.report.login import check_logins

        progress = Progress(cls.hidden.unique_id)
        settings = ReportSettings(
            push_to_hub=True, hub_model_id=repo_id.strip(), model_card_private=private, model_card_note=note
        )
        name = run_or_lora.strip().replace("\\", "/")
        folder = name.removeprefix(f"{places.SUBFOLDER}/").removesuffix(".safetensors")
        if not name:
            raise SettingError("run_or_lora is empty. Write the name of a run, or of a LoRA under models/loras.")
        check_logins(settings)
        progress.say(f"pushing {folder}")
        store = places.runs()
        run = store.read(folder) if lora_model is None and folder == Path(folder).name else None
        if run:
            url = push_run(store, run, settings, progress.say)
        else:
            repo = settings.hub_model_id or hub_name(Path(folder).name)
            with tempfile.TemporaryDirectory() as work:
                file = Path(work) / f"{Path(folder).name}.safetensors"
                if lora_model is None:
                    file = places.lora_file(name)
                else:
                    write_tensors(file, lora_model)
                url = push_file(file, repo, private, note, progress.say, Path(work))
        progress.say(url)
        return io.NodeOutput(url, ui={"text": (url,)})
