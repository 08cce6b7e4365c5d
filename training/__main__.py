"""The command line.

    python <plugin folder> info FILE [--json]
    python <plugin folder> clean FOLDER [--dry-run] [--grace-hours 24] [--json]
    python <plugin folder> estimate [--resolution 1024] [--batch-size 1] [--rank 16 | --full] [--device cuda] [--json]

``info`` tells what a LoRA file holds: its layers, rank, size and where it came from.
``estimate`` tells how much memory a training will need, part by part, and which switch would save how much.
``clean`` removes what no dataset refers to from a cache folder (``output/lumina2/.cache/latents`` or ``…/text``).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .adapter.files import PREFIX
from .cache.garbage import GRACE_HOURS, collect_garbage
from .errors import Lumina2Error, ModelError
from .run.estimate import add_arguments, estimate, lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python <plugin folder>", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what a LoRA file holds")
    info.add_argument("file", type=Path)
    info.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    clean = commands.add_parser("clean", help="remove what no dataset refers to from a cache folder")
    clean.add_argument("folder", type=Path)
    clean.add_argument("--dry-run", action="store_true", help="only tell what would be removed")
    clean.add_argument("--grace-hours", type=float, default=GRACE_HOURS, help="what is newer stays")
    clean.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    estimated = commands.add_parser("estimate", help="how much memory a training will need")
    add_arguments(estimated)
    options = parser.parse_args(arguments)
    try:
        if options.command == "estimate":
            found = estimate(options)
        elif options.command == "clean":
            found = asdict(collect_garbage(options.folder, options.grace_hours, options.dry_run))
        else:
            found = lora_info(options.file)
    except Lumina2Error as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(found, ensure_ascii=False))
    elif options.command == "estimate":
        print(lines(found))
    elif options.command == "clean":
        print("\n".join(f"{name:14} {value}" for name, value in found.items()))
    else:
        print("\n".join(f"{name:10} {value}" for name, value in found.items() if name != "metadata"))
        print("\n".join(f"  {name} = {value}" for name, value in found["metadata"].items()))
    return 0


def lora_info(path: Path) -> dict[str, Any]:
    """Format, layers, ranks and metadata of a LoRA file.

    Raises:
        ModelError: the file is missing, or is not a LoRA in safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as safetensors ({error}).") from error
    down = {key: shape for key, shape in shapes.items() if key.endswith(("lora_A.weight", "lora_down.weight"))}
    if not down:
        raise ModelError(f"{path} holds no LoRA: none of its {len(shapes)} tensors is named lora_A or lora_down.")
    return {
        "file": str(path),
        "format": "ComfyUI" if all(key.startswith(PREFIX) for key in shapes) else "another",
        "layers": len(down),
        "ranks": sorted({shape[0] for shape in down.values()}),
        "parameters": sum(_product(shape) for shape in shapes.values()),
        "metadata": metadata,
    }


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


if __name__ == "__main__":
    sys.exit(main())
