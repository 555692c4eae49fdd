"""How close an exported adapter comes, in PEFT, to the update it was made from; on given text."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from adapter_gen.apply import adapted
from adapter_gen.hypernetwork import Generated
from adapter_gen.update import LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Fidelity:
    """An update and its export on the same text.

    Attributes:
        tokens: how many tokens were predicted.
        base_loss: mean next-token loss of the base model, in nats.
        update_loss: the same under the update.
        export_loss: the same under the exported adapter.
        largest_logit: largest difference of a logit between update and export.
        divergence: mean KL(update || export), in nats.
    """

    tokens: int
    base_loss: float
    update_loss: float
    export_loss: float
    largest_logit: float
    divergence: float


@torch.no_grad()
def measure_export(
    files: Mapping[str, bytes],
    delta: LoraDelta,
    spec: UpdateSpec,
    bases: SharedBases,
    model: PreTrainedModel,
    tokens: Tensor,
) -> Fidelity:
    """Compare `files`, loaded by PEFT, with the update `delta` itself.

    Args:
        files: what `export_peft` made of `delta`.
        delta: the update.
        spec: its shape.
        bases: what all clusters share.
        model: the base model, on the CPU and in eval mode; as it was when this returns.
        tokens: int64 [B, T], text without padding, T at least 2.

    Raises:
        ConfigError: PEFT is not installed, or there is no token to predict.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ConfigError(f"tokens must be [B, T] with T at least 2, got {tuple(tokens.shape)}")
    base = model(tokens).logits.float()
    with adapted(model, spec, bases, Generated.of(delta)):
        update = model(tokens).logits.float()
    export = _peft_logits(files, model, tokens).float()
    target = update.log_softmax(-1)
    divergence = (target.exp() * (target - export.log_softmax(-1))).sum(-1).mean()
    return Fidelity(
        tokens=tokens[:, 1:].numel(),
        base_loss=_loss(base, tokens),
        update_loss=_loss(update, tokens),
        export_loss=_loss(export, tokens),
        largest_logit=float((update - export).abs().max()),
        divergence=float(divergence),
    )


def _peft_logits(files: Mapping[str, bytes], model: PreTrainedModel, tokens: Tensor) -> Tensor:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError("an export is measured in PEFT; run `pip install peft`") from error
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        loaded = PeftModel.from_pretrained(model, folder).eval()
    try:
        logits: Tensor = loaded(tokens).logits
    finally:
        loaded.unload()
    return logits


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
