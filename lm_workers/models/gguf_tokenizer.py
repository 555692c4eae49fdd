"""The tokenizer inside a GGUF file, saved so that it splits text as the model learned it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from transformers import AutoTokenizer

from lm_workers.models.weights import read_json

DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
"""Values of `tokenizer.ggml.pre` under which every digit is a piece of its own, as in llama.cpp.
transformers falls back to GPT-2's split, which cuts runs of spaces before numbers apart."""

LIKE_LLAMA_3 = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "tekken"}
"""Values of it under which a word that is a token is not merged together, and a bos goes before a
text unless the file says no, as in llama.cpp. transformers does neither."""

DIGIT_SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}

DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
MERGES_ALONE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "byte_fallback": False,
}
"""Byte-level BPE: every byte has a token, so nothing is unknown and nothing falls back."""

SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""What transformers and a GGUF call the special tokens."""

NEUTRAL = ("backend", "is_local", "local_files_only", "model_max_length", "tokenizer_class")
"""Settings of transformers that change nothing about how a byte-level tokenizer works."""


def save_gguf_tokenizer(gguf: Path, folder: Path) -> None:
    """Write the tokenizer of `gguf`, chat template included, into `folder`.

    What transformers makes of a GGUF depends on its version. 5.17 takes Llama's bos for its eos and
    decodes byte-level text as if it were SentencePiece; before 5.23 no bos goes in front of a text
    where the file asks for one; 5.18 and later respell special tokens outside the byte alphabet,
    then add them once more, past the end of the embedding. So all the file says is written from it.
    Left to transformers are how text is split before merging, apart from `DIGITS_APART` (5.17 knows
    fewer splits), and the pieces, normalizer and decoder of tokenizers that are not byte-level.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    tokenizer.save_pretrained(folder)
    fields = _fields(gguf)
    special = {
        name: fields["tokens"][fields[key]] if key in fields else None
        for name, key in SPECIAL.items()
    }
    state = read_json(folder / "tokenizer.json")
    config = read_json(folder / "tokenizer_config.json")
    if fields["model"] == "gpt2":
        state.update(_byte_level(fields, special))
        config = {name: config[name] for name in NEUTRAL if name in config}
    else:
        _drop_invented(state, len(fields["tokens"]))
        for key in special:
            config.pop(f"{key}_id", None)
    if fields["model"] in {"gpt2", "llama"}:
        state["post_processor"] = _surround(fields, special)
    if fields.get("pre") in DIGITS_APART:
        state["pre_tokenizer"] = DIGIT_SPLIT
    config.update(special)
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _fields(gguf: Path) -> dict[str, Any]:
    prefix = "tokenizer.ggml."
    return {
        name.removeprefix(prefix): field.contents()
        for name, field in GGUFReader(gguf).fields.items()
        if name.startswith(prefix)
    }


def _byte_level(fields: dict[str, Any], special: dict[str, str | None]) -> dict[str, Any]:
    """The parts of tokenizer.json that are the same for every byte-level BPE, or in the file."""
    tokens = fields["tokens"]
    named = set(special.values())
    types = fields.get("token_type") or [TokenType.NORMAL] * len(tokens)
    added = [
        _added(index, token, special=token in named or kind == TokenType.CONTROL)
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if token in named or kind in {TokenType.CONTROL, TokenType.USER_DEFINED}
    ]
    return {
        "added_tokens": added,
        "normalizer": None,
        "decoder": DECODER,
        "model": {
            **MERGES_ALONE,
            "ignore_merges": fields.get("pre") in LIKE_LLAMA_3,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["merges"]],
        },
    }


def _added(index: int, token: str, special: bool) -> dict[str, Any]:
    strips = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": token, **strips, "special": special}


def _surround(fields: dict[str, Any], special: dict[str, str | None]) -> dict[str, Any]:
    """The bos and eos around a text, where the file asks for them; llama.cpp's defaults else."""
    usual = fields["model"] == "llama" or fields.get("pre") in LIKE_LLAMA_3
    bos = special["bos_token"] if fields.get("add_bos_token", usual) else None
    eos = special["eos_token"] if fields.get("add_eos_token", False) else None

    def around(text: str, kind: int) -> list[dict[str, Any]]:
        parts = [("SpecialToken", bos), ("Sequence", text), ("SpecialToken", eos)]
        return [{part: {"id": name, "type_id": kind}} for part, name in parts if name is not None]

    ids = {bos: fields.get("bos_token_id"), eos: fields.get("eos_token_id")}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [index], "tokens": [token]}
            for token, index in ids.items()
            if token is not None
        },
    }


def _drop_invented(state: dict[str, Any], tokens: int) -> None:
    """Drop special tokens that transformers adds by default; the model cannot embed them."""
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < tokens]
