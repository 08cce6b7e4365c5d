"""What is said of a picture."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError

STRATEGIES = ("textfile", "filename", "instanceprompt")


def read_captions(pictures: list[Path], strategy: str, instance_prompt: str, folder: Path) -> list[tuple[str, ...]]:
    """The captions of each picture, at least one; several are variants, one of which is drawn each time.

    ``textfile`` reads ``name.txt`` beside ``name.png`` (each non-empty line a variant), ``filename`` takes the
    name itself, ``instanceprompt`` gives every picture the same text.

    Raises:
        DataError: captions are missing or empty (all of them are counted), or a file is not UTF-8.
    """
    if strategy == "instanceprompt":
        if not instance_prompt.strip():
            raise DataError(
                'caption_strategy is "instanceprompt" but instance_prompt is empty. Write what the pictures show.'
            )
        return [(instance_prompt.strip(),)] * len(pictures)
    if strategy == "filename":
        return [(path.stem.replace("_", " ").strip(),) for path in pictures]
    captions = [_read(path.with_suffix(".txt")) for path in pictures]
    missing = [path for path, lines in zip(pictures, captions, strict=True) if not lines]
    if missing:
        first = missing[0].relative_to(folder).as_posix()
        raise DataError(
            f"Caption missing for {len(missing)} of {len(pictures)} pictures (first: {first}). Add "
            f'{Path(first).with_suffix(".txt").as_posix()}, or choose caption_strategy "filename" or "instanceprompt".'
        )
    return captions


def _read(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ()
    except UnicodeDecodeError:
        raise DataError(f"The caption {path} is not UTF-8 text. Save it again as UTF-8.") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())
