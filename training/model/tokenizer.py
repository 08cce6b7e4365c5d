"""SentencePiece's own file, which ComfyUI reads, from the ``tokenizer.json`` that newer model folders carry instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..files import read_json

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def sentencepiece_model(tokenizer_json: Path) -> bytes:
    """A serialised ``ModelProto`` that gives the same ids as Gemma's ``tokenizer.json``.

    SentencePiece joins the pair whose whole has the highest score, so a piece scores by the place of the first merge
    that makes it. Added tokens are matched in the text as they stand there; the four that frame texts are not.

    Raises:
        ModelError: the file describes another kind of tokenizer.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    described: dict[str, Any] = read_json(tokenizer_json)
    model = described.get("model", {})
    vocabulary: dict[str, int] = model.get("vocab", {})
    if model.get("type") != "BPE" or not model.get("byte_fallback") or "<bos>" not in vocabulary:
        raise ModelError(f"{tokenizer_json} is not a Gemma tokenizer (BPE with byte fallback and <bos>).")
    ranks: dict[str, int] = {}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, len(ranks))
    added = {token["content"] for token in described.get("added_tokens", [])}
    kinds = proto.ModelProto.SentencePiece
    control = {"<pad>": kinds.CONTROL, "<eos>": kinds.CONTROL, "<bos>": kinds.CONTROL, "<unk>": kinds.UNKNOWN}
    result = proto.ModelProto()
    for piece, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        if number != len(result.pieces):
            raise ModelError(f"{tokenizer_json} skips the id {len(result.pieces)}; SentencePiece cannot hold that.")
        kind = control.get(piece, kinds.BYTE if _BYTE.fullmatch(piece) else kinds.NORMAL)
        if piece in added and piece not in control:
            kind = kinds.USER_DEFINED
        # Pieces that no merge makes are single characters: they come last.
        score = 0.0 if kind != kinds.NORMAL else -float(ranks.get(piece, len(ranks) + number))
        result.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = result.trainer_spec, result.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(result.pieces)
    trainer.byte_fallback = True
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = (
        vocabulary[name] for name in ("<pad>", "<eos>", "<bos>", "<unk>")
    )
    trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = "<pad>", "<eos>", "<bos>", "<unk>"
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return bytes(result.SerializeToString())
