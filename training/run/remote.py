"""A run in processes of its own: what starts it as a file, its events as lines out, its commands as lines in."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..cache.latents import Encode, LatentCache
from ..cache.texts import TextCache
from ..config.settings import TrainSettings
from ..errors import Lumina2Error, ModelError
from ..files import write_json, write_tensors
from ..model.config import TransformerConfig
from ..model.fingerprint import fingerprint, transformer_fingerprint
from ..model.transformer import Lumina2Transformer
from .control import Control
from .events import Event
from .folder import Run, RunStore
from .processes import joined
from .session import Request, train_lora
from .validation import Validator
from .wire import from_line, to_line

MARK = "lumina2> "  # before a line that is an event, among whatever else libraries print
PAUSE, RESUME = "pause", "resume"


@dataclass(frozen=True)
class Spec:
    """What ``train_lora`` is called with, where the model and what belongs to it lie on disk."""

    model: Path  # as ``write_model`` writes it
    latents: LatentCache
    texts: TextCache
    settings: TrainSettings
    request: Request
    store: RunStore
    processes: int
    latent_shift: float  # from the VAE's units to the transformer's: (z − shift) · scale
    latent_scale: float
    shift: float  # the model's own in inference
    vae: Path | None = None  # a folder in diffusers' layout


@dataclass(frozen=True)
class Finished:
    """The last line of a run that ended well."""

    run: Run
    losses: tuple[float, ...]
    message: str


@dataclass(frozen=True)
class Failed:
    """The last line of a run that raised one of our errors."""

    kind: str
    message: str


Helpers = tuple[Encode | None, Validator | None]


def run_spec(
    path: Path,
    control_stream: IO[Any],
    event_stream: IO[str],
    helpers: Callable[[Spec, torch.device], Helpers] = lambda spec, device: (None, None),
    device: torch.device | None = None,
    control: Control | None = None,
) -> int:
    """Train as a file says, as one of the processes that a launcher started.

    Args:
        path: what ``to_line`` made of a ``Spec``.
        control_stream: commands, a line each, for the leader; its end ends the run, with everything saved.
        event_stream: gets the leader's events, and as the last line ``Finished`` or of any process ``Failed``.
        helpers: makes the VAE's encode and the validator.
        device: where the model is put if this process is the only one.
        control: by which it can be stopped from here, too.

    Returns:
        The exit code: 0, or 1 where it failed.
    """
    spec: Spec = from_line(path.read_text(encoding="utf-8"))
    leads = os.environ.get("RANK", "0") == "0"
    say = _writer(event_stream)
    tell = say if leads else lambda said: None
    control = control or Control()
    try:
        with joined(spec.processes) as processes:
            if processes.leads:
                threading.Thread(target=obey, args=(control_stream, control), daemon=True).start()
            place = processes.device if processes.count > 1 else device or torch.device("cpu")
            encode, validator = helpers(spec, place)
            outcome = train_lora(
                read_model(spec.model).to(place),
                spec.latents,
                spec.texts,
                spec.settings,
                spec.request,
                spec.store,
                lambda latents: (latents - spec.latent_shift) * spec.latent_scale,
                tell,
                control=control,
                encode=encode,
                validator=validator,
                processes=processes,
            )
    except Lumina2Error as error:
        print(error, file=sys.stderr, flush=True)
        say(Failed(type(error).__name__, str(error)))
        return 1
    except Exception as error:  # a bug, or torch's own: the other end of the pipe sees nothing else of it
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        say(Failed("RunError", f"{type(error).__name__} in {where.filename}, line {where.lineno}: {error}"))
        return 1
    tell(Finished(outcome.run, tuple(outcome.losses), outcome.message))
    return 0


def _writer(stream: IO[str]) -> Callable[[Any], None]:
    def write(said: Event | Finished | Failed) -> None:
        print(MARK + to_line(said), file=stream, flush=True)

    return write


def obey(stream: IO[Any], control: Control) -> None:
    """Pass commands on, until whoever sends them is gone; then the run ends, with everything saved."""
    # Not buffered: a thread that waits in a buffered stream keeps Python from ending.
    with open(stream.fileno(), "rb", buffering=0, closefd=False) as lines:
        while line := lines.readline():
            command = from_line(line.decode())
            if command == PAUSE:
                control.pause()
            elif command == RESUME:
                control.resume()
            else:
                control.send(command)
    control.interrupt()


# --- the model


def write_model(transformer: Lumina2Transformer, folder: Path, say: Callable[[str], None]) -> Path:
    """The weights as they are wired, in a file that is written once and used again.

    Args:
        say: hears how large the file gets before it is written.
    """
    weights, config = transformer.state_dict(), transformer.config
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    path = folder / f"{transformer_fingerprint(weights.items(), config)}-{'-'.join(dtypes)}.safetensors"
    if not path.exists():
        size = sum(weight.nbytes for weight in weights.values())
        say(f"writing the model for the other processes, once: {size / 2**30:.2f} GB to {path}")
        write_tensors(path, weights, {"config": json.dumps(asdict(config))})
    return path


def write_vae(weights: Mapping[str, Tensor], shift: float, scale: float, folder: Path) -> Path:
    """A VAE in a folder of diffusers' layout, written once and used again.

    Args:
        weights: under diffusers' names; the layout is read off them, with groups of 32 in the norms, as ComfyUI has it.
        shift, scale: of its latents.
    """
    path = folder / f"vae-{fingerprint(weights.items())}"
    if (path / "config.json").exists():
        return path
    widths: list[int] = []
    while (conv := weights.get(f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight")) is not None:
        widths.append(len(conv))
    layers = sum(
        re.fullmatch(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight", name) is not None for name in weights
    )
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": len(weights["decoder.conv_out.weight"]),
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "layers_per_block": layers,
        "mid_block_add_attention": any(".mid_block.attentions." in name for name in weights),
        "norm_num_groups": 32,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "shift_factor": shift,
        "scaling_factor": scale,
        "force_upcast": True,
    }
    write_tensors(path / "diffusion_pytorch_model.safetensors", weights, {"format": "pt"})
    write_json(path / "config.json", config)
    return path


def read_model(path: Path) -> Lumina2Transformer:
    """A frozen transformer that ``write_model`` wrote, on the CPU.

    Raises:
        ModelError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["config"])
            weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Delete it, and queue again.") from error
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Lumina2Transformer.from_weights(replace(TransformerConfig(), **{**values, **lists}), weights)
