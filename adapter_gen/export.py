"""Export of one cluster's update to the PEFT format, for PEFT and every server that reads it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from safetensors.torch import save
from torch import Tensor

from adapter_gen.hypernetwork import Generated
from adapter_gen.update import LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.errors import DeltaError, RequestError
from cluster_router.wire.forms import ExportForm

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
{base_remark}
## What this adapter carries

{carried}

- It stays as it is: the service generates the update again when its cluster moves.
- Do not merge it into the weights. The update of the LM head would change the input embedding too
  where the base model ties them, and a head without a bias has no place for the shift.
"""

_SHIFT = """\
- The shift s of the final hidden state adds the same vector W s to the logits at every position.
  Its size here: |s| = {norm:.6g}, largest |W s| = {largest:.6g}."""
_WITH_SHIFT = """\
- All of the update: PEFT computes the same logits.
{shift}
- The shift is the bias of the head's `lora_B` (`lora_bias`, PEFT 0.14 or later). A server that does
  not know `lora_bias`, as vLLM, takes the form `plain`, which leaves the shift out."""
_WITHOUT_SHIFT = """\
- All of the update but the shift of the final hidden state, which needs `lora_bias`.
{shift}"""
_LINEARS = """\
- The update of the linear layers. Left out is that of the final hidden state, its core and shift.
{shift}"""
_PAPER = "- All of the update: this form is a plain LoRA."

EXPORT_FORMS: tuple[ExportForm, ...] = get_args(ExportForm)
"""Every form."""

_CARRIED = {"whole": _WITH_SHIFT, "plain": _WITHOUT_SHIFT, "linears": _LINEARS}
_LEFT_OUT: dict[ExportForm, list[str]] = {
    "whole": [],
    "plain": ["head_shift"],
    "linears": ["head_core", "head_shift"],
}

MANIFEST = "export.json"
"""File of an export that says, for programs, what the adapter carries; PEFT does not read it."""


@dataclass(frozen=True)
class _Factors:
    """LoRA of one module: A [r, in], B [out, r], and the bias [out] of `lora_B`, None for zeros."""

    a: Tensor
    b: Tensor
    bias: Tensor | None = None


def export_peft(
    delta: LoraDelta,
    spec: UpdateSpec,
    bases: SharedBases,
    base_model: str,
    head_weight: Tensor,
    head_module: str = "lm_head",
    form: ExportForm = "whole",
    base_remark: str = "",
) -> dict[str, bytes]:
    """The files of a PEFT LoRA adapter, by name.

    A linear's update U (S0 + g dS) V is LoRA with A = V and B = U (S0 + g dS). On the final hidden
    state h it reaches the logits as W (h + s + U E V h): LoRA on the LM head with A = V, B = W U E
    and, since W s does not depend on h, a bias of `lora_B`. PEFT itself sets `fan_in_fan_out` for
    GPT-2's transposed layers, whose A and B have the shapes of any other's.

    Args:
        delta: the update, of any depth; a static one exports the shared part.
        spec: its shape.
        bases: what all clusters share.
        base_model: name or path under which PEFT finds the base model.
        head_weight: [vocab, hidden], weight W of the LM head.
        head_module: module path of the LM head.
        form: what the reader can take, see ExportForm. The paper's form has no shift, so it is
            whole without `lora_bias`.
        base_remark: what `README.md` says of the base model, one paragraph; nothing if empty.

    Returns:
        `adapter_config.json`, `adapter_model.safetensors`, `README.md` and `export.json`. The last
        two say what is carried and what is not; `adapter_gen.fidelity` measures it on text.

    Raises:
        DeltaError: `delta` or `head_weight` does not fit `spec`.
        RequestError: `form` leaves nothing of the update.
    """
    head = _checked_head(delta, spec, head_weight)
    if form == "linears" and spec.depth != "full":
        raise RequestError("These updates are in the head alone; choose another form.", "form")
    generated = Generated.of(delta)
    shift = None if spec.depth == "paper" else _Shift.of(generated, bases, head)
    lora_bias = form == "whole" and shift is not None
    if shift is None:
        factors, alpha = _paper_factors(generated, spec), spec.alpha
    else:
        bias = shift.logits if lora_bias else None
        factors = _core_factors(generated, spec, bases, head, head_module, bias)
        alpha = float(spec.rank)
    if form == "linears":
        del factors[head_module]
    return {
        "adapter_config.json": _config(base_model, list(factors), spec.rank, alpha, lora_bias),
        "adapter_model.safetensors": _weights(factors, lora_bias),
        "README.md": _card(delta, base_model, base_remark, shift, form),
        MANIFEST: _manifest(delta, base_model, shift, form),
    }


def head_shift(
    delta: LoraDelta, spec: UpdateSpec, bases: SharedBases, head_weight: Tensor
) -> Tensor | None:
    """W s, float32 [vocab]: what the shift adds to the logits; None if the form has no shift.

    Raises:
        DeltaError: `delta` or `head_weight` does not fit `spec`.
    """
    head = _checked_head(delta, spec, head_weight)
    return None if spec.depth == "paper" else _Shift.of(Generated.of(delta), bases, head).logits


def zip_files(files: Mapping[str, bytes]) -> bytes:
    """The files as one zip archive; equal files give equal bytes.

    Stored as they are: random-looking numbers shrink by a fifth, which takes seconds of a core.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            # A ZipInfo carries a fixed date, where a bare name would carry today's.
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def _checked_head(delta: LoraDelta, spec: UpdateSpec, head_weight: Tensor) -> Tensor:
    """The LM head's weight, float32 on the CPU, once it and `delta` fit `spec`."""
    delta.check(spec)
    if head_weight.ndim != 2 or head_weight.shape[1] != spec.hidden_size:
        raise DeltaError(
            f"head_weight must be [vocab, {spec.hidden_size}], got {tuple(head_weight.shape)}"
        )
    return head_weight.detach().to("cpu", torch.float32)


@dataclass(frozen=True)
class _Shift:
    """The head shift: its length |s|, and W s [vocab], what it adds to every position's logits."""

    norm: float
    logits: Tensor

    @classmethod
    def of(cls, generated: Generated, bases: SharedBases, head: Tensor) -> _Shift:
        assert generated.shift is not None
        shift = bases.shift.detach() + generated.shift[0]
        return cls(float(shift.norm()), head @ shift)

    @property
    def largest(self) -> float:
        """The most it moves a logit."""
        return float(self.logits.abs().max())


def _paper_factors(generated: Generated, spec: UpdateSpec) -> dict[str, _Factors]:
    assert generated.lora_a is not None
    assert generated.lora_b is not None
    return {spec.sites[0].name: _Factors(generated.lora_a[0], generated.lora_b[0])}


def _core_factors(
    generated: Generated,
    spec: UpdateSpec,
    bases: SharedBases,
    head: Tensor,
    head_module: str,
    head_bias: Tensor | None,
) -> dict[str, _Factors]:
    assert generated.cores is not None
    factors = {}
    for index, site in enumerate(spec.sites):
        a = bases.v[index].detach()
        b = bases.u[index].detach() @ (bases.s0[index].detach() + generated.cores[0, index])
        if index == spec.head:
            factors[head_module] = _Factors(a, head @ b, head_bias)
        else:
            factors[site.name] = _Factors(a, b)
    return factors


def _weights(factors: Mapping[str, _Factors], lora_bias: bool) -> bytes:
    tensors = {}
    for module, one in factors.items():
        prefix = f"base_model.model.{module}.lora"
        tensors[f"{prefix}_A.weight"] = one.a.contiguous()
        tensors[f"{prefix}_B.weight"] = one.b.contiguous()
        if lora_bias:
            # PEFT gives a bias to every module or to none, and wants each of them in the file.
            bias = one.b.new_zeros(len(one.b)) if one.bias is None else one.bias
            tensors[f"{prefix}_B.bias"] = bias
    return save(tensors, metadata={"format": "pt"})


def _config(base_model: str, modules: list[str], rank: int, alpha: float, lora_bias: bool) -> bytes:
    return _json(
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "lora_bias": lora_bias,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": modules,
            "modules_to_save": None,
        }
    )


def _card(
    delta: LoraDelta, base_model: str, base_remark: str, shift: _Shift | None, form: ExportForm
) -> bytes:
    cluster = delta.key.cluster
    carried = _PAPER
    if shift is not None:
        size = _SHIFT.format(norm=shift.norm, largest=shift.largest)
        carried = _CARRIED[form].format(shift=size)
    return _CARD.format(
        base_model=base_model,
        base_remark=f"\n{base_remark}\n" if base_remark else "",
        cluster="the static update" if cluster is None else f"cluster {cluster}",
        key=delta.key.id,
        carried=carried,
    ).encode()


def _manifest(delta: LoraDelta, base_model: str, shift: _Shift | None, form: ExportForm) -> bytes:
    left_out = [] if shift is None else _LEFT_OUT[form]
    sizes = None if shift is None else {"norm": shift.norm, "largest_logit": shift.largest}
    return _json(
        {
            "base_model": base_model,
            "base_fingerprint": delta.key.base,
            "update": delta.key.id,
            "cluster": delta.key.cluster,
            "not_carried": left_out,
            "needs": ["lora_bias"] if form == "whole" and shift is not None else [],
            "head_shift": sizes,
        }
    )


def _json(value: dict[str, object]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
