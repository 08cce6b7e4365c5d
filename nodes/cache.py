"""The caches: pictures to latents, captions to embeddings."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..training.cache.latents import cache_latents
from ..training.cache.store import Store
from ..training.cache.texts import cache_texts
from ..training.config.settings import Config
from ..training.config.validation import ValidationSettings
from ..training.data.dataset import Dataset
from ..training.data.prompts import SYSTEM_PROMPTS
from ..training.model.config import MAX_CAPTION_TOKENS
from .places import cache
from .progress import Counting, Progress
from .sockets import ConfigSocket, DatasetSocket, EmbedsSocket, LatentsSocket, ValidationSocket


class Lumina2CacheLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2CacheLatents",
            display_name="Cache Latents",
            category="Lumina2",
            description="Encodes the pictures with the VAE, once each, and keeps the latents on disk.",
            inputs=[
                DatasetSocket.Input("dataset", tooltip="The pictures to encode."),
                io.Vae.Input("vae", tooltip="The VAE of the model that will be trained."),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=256,
                    tooltip="Pictures encoded at a time; lower it if memory is short.",
                ),
                ConfigSocket.Input(
                    "config", optional=True, tooltip="A config whose vae_batch_size and cache_dir_vae win over these."
                ),
            ],
            outputs=[LatentsSocket.Output(display_name="latents", tooltip="For the train node.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> tuple[bool, int]:
        return cache("latents").state()  # what was deleted or found damaged is made again

    @classmethod
    def execute(cls, dataset: Dataset, vae: Any, batch_size: int, config: Config | None = None) -> io.NodeOutput:
        import comfy.model_management

        from .bridge import vae_fingerprint

        progress = Progress(cls.hidden.unique_id)
        counted = Counting(progress, "encoding picture")
        progress.say("reading the VAE")
        told = config.data if config else {}
        latents = cache_latents(
            dataset,
            vae.encode,
            vae_fingerprint(vae),
            _store("latents", told.get("cache_dir_vae")),
            told.get("vae_batch_size", batch_size),
            counted,
            shares_cores=comfy.model_management.is_device_cpu(vae.device),
        )
        skipped = f"; {len(latents.skipped)} skipped: {latents.skipped[0]}" if latents.skipped else ""
        progress.say(f"{latents.count} latents{'' if counted.worked else ', all cached'}{skipped}")
        return io.NodeOutput(latents)


class Lumina2CacheTextEmbeds(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2CacheTextEmbeds",
            display_name="Cache Text Embeds",
            category="Lumina2",
            description="Encodes the captions with the text encoder, once each, and keeps them on disk.",
            inputs=[
                DatasetSocket.Input("dataset", tooltip="The captions to encode."),
                io.Clip.Input("clip", tooltip="Lumina2's text encoder (a Gemma2)."),
                io.Combo.Input(
                    "system_prompt",
                    options=list(SYSTEM_PROMPTS),
                    tooltip="What stands before every caption. Use the same when you draw with the LoRA.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=256,
                    min=1,
                    max=MAX_CAPTION_TOKENS,
                    tooltip="Longer captions are cut, and named. 256 is Lumina2's own limit.",
                ),
                ValidationSocket.Input(
                    "validation",
                    optional=True,
                    tooltip="Validation Settings: their prompts are encoded too, and drawn while a run trains.",
                ),
                ConfigSocket.Input(
                    "config",
                    optional=True,
                    tooltip="A config: the prompts of its slider are encoded too, and its validation settings hold "
                    "where none are wired. Its tokenizer_max_length, system_prompt, write_batch_size and "
                    "cache_dir_text win over these.",
                ),
            ],
            outputs=[EmbedsSocket.Output(display_name="embeds", tooltip="For the train node.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> tuple[bool, int]:
        return cache("text").state()

    @classmethod
    def execute(
        cls,
        dataset: Dataset,
        clip: Any,
        system_prompt: str,
        max_tokens: int,
        validation: ValidationSettings | None = None,
        config: Config | None = None,
    ) -> io.NodeOutput:
        from .bridge import clip_fingerprint, embed_text

        progress = Progress(cls.hidden.unique_id)
        counted = Counting(progress, "encoding caption")
        progress.say("reading the text encoder")
        told, kept = config.data if config else {}, dataset.texts
        system_prompt = told.get("system_prompt", system_prompt)
        max_tokens = told.get("tokenizer_max_length", max_tokens)
        embeds = cache_texts(
            dataset,
            lambda text: embed_text(clip, text, max_tokens),
            clip_fingerprint(clip),
            SYSTEM_PROMPTS[system_prompt],
            max_tokens,
            _store("text", kept.cache_dir or told.get("cache_dir_text")),
            counted,
            told.get("write_batch_size", kept.write_batch_size),
            validation=validation or _validation_of(config),
            others=config.slider if config else (),
        )
        cut = f"; {len(embeds.cut)} cut to {max_tokens} tokens, first: {embeds.cut[0][-60:]}" if embeds.cut else ""
        progress.say(f"captions of {embeds.count} pictures{'' if counted.worked else ', all cached'}{cut}")
        return io.NodeOutput(embeds)


def _store(kind: str, named: str | None) -> Store:
    return Store(named) if named else cache(kind)


def _validation_of(config: Config | None) -> ValidationSettings | None:
    """A config's validation settings, where it has any."""
    names = {each.name for each in fields(ValidationSettings)}
    return config.validation if config and names & config.values.keys() else None
