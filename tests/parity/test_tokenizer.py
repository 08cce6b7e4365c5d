"""Token ids: SentencePiece's own model, the one made from ``tokenizer.json``, and transformers' GemmaTokenizer."""

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import GemmaTokenizer

from training.errors import ModelError
from training.model.tokenizer import sentencepiece_model

NANO = Path(__file__).resolve().parents[2] / "assets" / "nano" / "tokenizer"


def texts():
    generator = random.Random(0)
    vocabulary = list(json.loads((NANO / "tokenizer.json").read_text())["model"]["vocab"])[260:]
    joined = [" ".join(generator.choices(vocabulary, k=6)).replace("▁", " ") for _ in range(300)]
    letters = ["".join(generator.choices("abcdefgh   ij,.()é猫🍎\n", k=30)) for _ in range(300)]
    return [*joined, *letters, "red apple", "hatsune_miku_(vocaloid), a \\(b\\)", "  two  spaces ", ""]


def test_tokenizer_json_gives_the_ids_of_the_original_and_of_transformers():
    made = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(NANO / "tokenizer.json"))
    original = sentencepiece.SentencePieceProcessor(model_file=str(NANO / "tokenizer.model"))
    theirs = GemmaTokenizer.from_pretrained(NANO, add_bos_token=True)
    assert (made.bos_id(), made.eos_id(), made.pad_id(), made.unk_id()) == (2, 1, 0, 3)
    for text in texts():
        ids = made.encode(text)
        assert ids == original.encode(text), text
        assert [2, *ids] == theirs(text).input_ids, text


def test_tokens_that_were_added_are_one_piece(tmp_path):
    described = json.loads((NANO / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["<unused>"] = number = len(vocabulary)
    described["added_tokens"].append(
        {"id": number, "content": "<unused>", "special": False, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    shutil.copy(NANO / "tokenizer_config.json", tmp_path)
    made = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(tmp_path / "tokenizer.json"))
    assert number in made.encode("red <unused>apple")


def test_another_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(ModelError, match="not a Gemma tokenizer"):
        sentencepiece_model(tmp_path / "tokenizer.json")
