"""Export of one cluster's update to the PEFT format, for PEFT and every server that reads it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from adapter_gen.hypernetwork import Generated
from adapter_gen.update import LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.errors import DeltaError

_CARD = """\
---
base_model: {base_model}
library_name: peft
tags: [lora, chameleon-llm]
---

# LoRA adapter of {cluster}

Exported by ChameleonLLM from update `{key}` of base model `{base_model}`. The evidence gate is
applied and the part that all clusters share is included: nothing else is needed to load it.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base_model}"), ".")
```

## What this adapter does not carry

{missing}

- It stays as it is: the service generates the update again when its cluster moves.
- Where the base model ties its LM head to its input embedding, do not merge the adapter into the
  weights: that would change the embedding too.
"""

_SHIFT = """\
- The shift of the final hidden state, which adds the same vector W s to the logits at every
  position. LoRA is a product with the hidden state and has no place for a constant.
  Its size here: |s| = {norm:.6g}, largest |W s| = {largest:.6g}."""


def export_peft(
    delta: LoraDelta,
    spec: UpdateSpec,
    bases: SharedBases,
    base_model: str,
    head_weight: Tensor,
    head_module: str = "lm_head",
) -> dict[str, bytes]:
    """The files of a PEFT LoRA adapter, by name.

    A linear's update U (S0 + g dS) V is LoRA with A = V and B = U (S0 + g dS). On the final hidden
    state h it reaches the logits as W (h + U E V h), which is LoRA on the LM head with A = V and
    B = W U E. The head shift has no LoRA form; the README states its size. PEFT itself sets
    `fan_in_fan_out` for GPT-2's transposed layers, whose A and B have the shapes of any other's.

    Args:
        delta: the update, of any depth; a static one exports the shared part.
        spec: its shape.
        bases: what all clusters share.
        base_model: name or path under which PEFT finds the base model.
        head_weight: [vocab, hidden], weight W of the LM head.
        head_module: module path of the LM head.

    Raises:
        DeltaError: `delta` or `head_weight` does not fit `spec`.
    """
    delta.check(spec)
    if head_weight.ndim != 2 or head_weight.shape[1] != spec.hidden_size:
        raise DeltaError(
            f"head_weight must be [vocab, {spec.hidden_size}], got {tuple(head_weight.shape)}"
        )
    head = head_weight.detach().to("cpu", torch.float32)
    generated = Generated.of(delta)
    if spec.depth == "paper":
        factors = _paper_factors(generated, spec)
        alpha, missing = spec.alpha, "- Nothing of the update: this form is a plain LoRA."
    else:
        factors = _core_factors(generated, spec, bases, head, head_module)
        alpha, missing = float(spec.rank), _describe_shift(generated, bases, head)
    cluster = delta.key.cluster
    return {
        "adapter_config.json": _config(base_model, list(factors), spec.rank, alpha),
        "adapter_model.safetensors": _weights(factors),
        "README.md": _CARD.format(
            base_model=base_model,
            cluster="the static update" if cluster is None else f"cluster {cluster}",
            key=delta.key.id,
            missing=missing,
        ).encode(),
    }


def zip_files(files: Mapping[str, bytes]) -> bytes:
    """The files as one zip archive; equal files give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            # A ZipInfo carries a fixed date, where a bare name would carry today's.
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _paper_factors(generated: Generated, spec: UpdateSpec) -> dict[str, tuple[Tensor, Tensor]]:
    assert generated.lora_a is not None
    assert generated.lora_b is not None
    return {spec.sites[0].name: (generated.lora_a[0], generated.lora_b[0])}


def _core_factors(
    generated: Generated, spec: UpdateSpec, bases: SharedBases, head: Tensor, head_module: str
) -> dict[str, tuple[Tensor, Tensor]]:
    assert generated.cores is not None
    factors = {}
    for index, site in enumerate(spec.sites):
        b = bases.u[index].detach() @ (bases.s0[index].detach() + generated.cores[0, index])
        if index == spec.head:
            factors[head_module] = (bases.v[index].detach(), head @ b)
        else:
            factors[site.name] = (bases.v[index].detach(), b)
    return factors


def _describe_shift(generated: Generated, bases: SharedBases, head: Tensor) -> str:
    assert generated.shift is not None
    shift = bases.shift.detach() + generated.shift[0]
    return _SHIFT.format(norm=float(shift.norm()), largest=float((head @ shift).abs().max()))


def _weights(factors: Mapping[str, tuple[Tensor, Tensor]]) -> bytes:
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    return save(tensors, metadata={"format": "pt"})


def _config(base_model: str, modules: list[str], rank: int, alpha: float) -> bytes:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": modules,
        "modules_to_save": None,
    }
    return (json.dumps(config, indent=2) + "\n").encode()
