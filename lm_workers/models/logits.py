"""Transformers' own logits for a few texts, which an engine must give too before it serves.

They are kept: transformers' classes, which take long to import and much memory, are needed only
where a model is started for the first time.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from transformers import PretrainedConfig

from lm_workers.models.kept import KeptFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXTS, _TOKENS = 4, 8
_NAME = "logits"


class TriedTexts(NamedTuple):
    """Texts, int64 [N, L], and the logits [N, L, vocab] that transformers gives for them."""

    tokens: torch.Tensor
    logits: torch.Tensor


class KeptLogits:
    """One model's, in a file of the cache.

    The file is named after the model's fingerprint, its config, how it is computed, and
    transformers' version: after a change of any of these they are computed anew.

    Args:
        fingerprint: the model's.
        config: the model's.
        dtype: that it is computed in.
        device: that it is computed on.
        cache_dir: default: see `resolve_model`.
    """

    def __init__(
        self,
        fingerprint: str,
        config: PretrainedConfig,
        dtype: torch.dtype,
        device: str,
        cache_dir: Path | None = None,
    ) -> None:
        self._vocab, self._device = config.vocab_size, device
        given = {key: one for key, one in config.to_dict().items() if key != "_name_or_path"}
        facts = (given, str(dtype), torch.device(device).type, transformers.__version__)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        name = f"{fingerprint}-{digest.hexdigest()[:16]}.safetensors"
        self._file = KeptFile(_NAME, name, cache_dir)

    def get(self, load: Callable[[], PreTrainedModel]) -> TriedTexts:
        """The kept ones; where there are none, those of the model that `load` gives, kept now."""
        found = self._read()
        if found is None:
            found = compute_logits(load())
            data = save({_NAME: found.logits.contiguous()})
            # Not by safetensors, whose files only their owner can read: a cache may be shared.
            self._file.write(lambda file: file.write_bytes(data))
            gc.collect()  # transformers' modules refer to each other
            if torch.device(self._device).type == "cuda":
                torch.cuda.empty_cache()
        return found

    def forget(self) -> None:
        """Compute them anew next time."""
        self._file.forget()

    def _read(self) -> TriedTexts | None:
        try:
            logits = load_file(self._file.path, device=self._device)[_NAME]
        except (OSError, SafetensorError, KeyError):
            return None
        tokens = tried_tokens(self._vocab, self._device)
        whole = logits.shape == (*tokens.shape, self._vocab)
        return TriedTexts(tokens, logits) if whole else None


@torch.inference_mode()
def compute_logits(model: PreTrainedModel) -> TriedTexts:
    """What transformers gives."""
    tokens = tried_tokens(model.config.vocab_size, str(model.device))
    return TriedTexts(tokens, model(input_ids=tokens, use_cache=False).logits)


def widened(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Let a model of the family compute in `dtype`, whatever its matrices are stored in.

    A linear layer's weight is converted when it is its turn: of no other is there a copy.
    """
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.to(dtype)
    model.get_input_embeddings().register_forward_hook(lambda _, __, found: found.to(dtype))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(_product, module, dtype)  # type: ignore[method-assign]
    return model


def _product(linear: nn.Linear, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, linear.weight.to(dtype), linear.bias)


def tried_tokens(vocab: int, device: str) -> torch.Tensor:
    """The texts, spread over the vocabulary.

    What it begins with often never occurred in training, and such tokens magnify what rounding
    changes.
    """
    count = _TEXTS * _TOKENS
    tokens = torch.arange(1, count + 1, device=device) * max(1, vocab // (count + 1)) % vocab
    return tokens.view(_TEXTS, _TOKENS)
