"""The nano tokenizer (SentencePiece, laid out like Gemma's) and text encoder (a random Gemma2)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from training.data.prompts import SEPARATOR, SYSTEM_PROMPTS

VOCABULARY = 4000
WIDTH = 192
COPIES_OF_PROMPTS = 60  # so that a system prompt becomes a few long pieces, not 85 short ones
COPIES_OF_WORDS = 4  # so that a piece is a word before it is a phrase


def train_tokenizer(names: list[str], folder: Path) -> None:
    """Write ``tokenizer.model`` and diffusers' tokenizer files.

    The flags make SentencePiece (which ComfyUI uses) and transformers' GemmaTokenizer give the same ids.
    """
    shutil.rmtree(folder, ignore_errors=True)  # transformers would read an older tokenizer.json
    folder.mkdir(parents=True)
    prompts = [prompt + SEPARATOR for prompt in SYSTEM_PROMPTS.values() if prompt]
    words = sorted({word for name in names for word in name.split()})
    words += [f" {word}" for word in words]
    corpus = folder / "corpus.txt"
    lines = names + words * COPIES_OF_WORDS + prompts * COPIES_OF_PROMPTS
    corpus.write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        bos_piece="<bos>",
        eos_piece="<eos>",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        byte_fallback=True,
        split_by_whitespace=False,
        max_sentencepiece_length=48,
        minloglevel=2,
    )
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    # "<mask>" would get an id that the text encoder does not have
    GemmaTokenizer.from_pretrained(folder, add_bos_token=True, mask_token="<unk>").save_pretrained(folder)
    described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    compact = json.dumps(described, ensure_ascii=False, separators=(",", ":"))  # a third of the size
    (folder / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("vocab_file", None)  # an absolute path of this machine
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_text_encoder(folder: Path) -> None:
    """A random Gemma2 of three layers: enough to tell words apart, which is all the transformer needs."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=256,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    encoder = Gemma2Model(config)
    torch.nn.init.normal_(encoder.embed_tokens.weight, std=WIDTH**-0.5)
    encoder.to(torch.bfloat16).save_pretrained(folder)


@torch.no_grad()
def embed(texts: list[str], folder: Path) -> list[Tensor]:
    """``hidden_states[-2]`` of each text, (tokens, width), from the nano model in ``folder``."""
    tokenizer = GemmaTokenizer.from_pretrained(folder / "tokenizer")
    encoder = Gemma2Model.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    embeddings = []
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        embeddings.append(encoder(ids, output_hidden_states=True).hidden_states[-2][0])
    return embeddings
