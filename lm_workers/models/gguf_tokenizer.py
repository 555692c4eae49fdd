"""The tokenizer inside a GGUF file, saved so that it splits text as the model learned it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from transformers import AutoTokenizer

from lm_workers.models.weights import read_json

DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
"""Values of `tokenizer.ggml.pre` under which every digit is a piece of its own, as in llama.cpp.
transformers falls back to GPT-2's split, which cuts runs of spaces before numbers apart."""

DIGIT_SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def save_gguf_tokenizer(gguf: Path, folder: Path) -> None:
    """Write the tokenizer of `gguf`, chat template included, into `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    tokenizer.save_pretrained(folder)
    fields = GGUFReader(gguf).fields
    state = read_json(folder / "tokenizer.json")
    _drop_invented(state, len(fields["tokenizer.ggml.tokens"].data))
    split = fields.get("tokenizer.ggml.pre")
    if split is not None and split.contents() in DIGITS_APART:
        state["pre_tokenizer"] = DIGIT_SPLIT
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def _drop_invented(state: dict[str, Any], tokens: int) -> None:
    """Drop special tokens that transformers adds by default; the model cannot embed them."""
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < tokens]
