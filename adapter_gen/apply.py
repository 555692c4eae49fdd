"""What an update means, in plain torch: the reference for training, engine and export.

Every function is differentiable and takes one update for all rows, or one per row or sequence.
Arithmetic runs in the update's dtype; results come back in the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapter_gen.hypernetwork import Generated
from adapter_gen.update import HEAD, SharedBases, UpdateSpec
from cluster_router.wire.errors import ConfigError


def init_bases(spec: UpdateSpec, seed: int) -> SharedBases:
    """Orthonormal U and V, zero S0 and shift: the static update starts at zero and can train.

    The paper's form shares nothing and gets empty bases.

    Raises:
        ConfigError: the rank exceeds a site's smaller side.
    """
    if spec.depth == "paper":
        return SharedBases(u=(), v=(), s0=torch.empty(0), shift=torch.empty(0))
    limit = min(min(site.in_features, site.out_features) for site in spec.sites)
    if spec.rank > limit:
        raise ConfigError(f"rank {spec.rank} exceeds the smallest layer size {limit}", "rank")
    random = torch.Generator().manual_seed(seed)

    def orthonormal(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, spec.rank, generator=random)).Q

    return SharedBases(
        u=tuple(orthonormal(site.out_features) for site in spec.sites),
        v=tuple(orthonormal(site.in_features).T.contiguous() for site in spec.sites),
        s0=torch.zeros(len(spec.sites), spec.rank, spec.rank),
        shift=torch.zeros(spec.hidden_size),
    )


def per_row(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply x [..., k] by one matrix, or by one for each entry of its first axis.

    Args:
        matrix: [m, k], or [N, m, k] with N equal to x's first axis or 1.
        x: [N, k] or [N, T, k].

    Returns:
        [N, m] or [N, T, m].
    """
    if matrix.ndim == 3 and x.ndim == 2:
        return (x[:, None] @ matrix.mT)[:, 0]
    return x @ matrix.mT


def adapted_linear(x: Tensor, y: Tensor, u: Tensor, v: Tensor, core: Tensor) -> Tensor:
    """Return y + U E V x for the effective core E = S0 + g dS.

    Args:
        x: [N, in] or [N, T, in], input of the layer.
        y: [N, out] or [N, T, out], its own output W x (+ bias).
        u: [out, r].
        v: [r, in].
        core: [r, r], or [N, r, r] for one core per row or sequence.
    """
    update = per_row(core, x.to(v.dtype) @ v.T) @ u.T
    return y + update.to(y.dtype)


def apply_head(
    h: Tensor, bases: SharedBases, core: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """Return h + s0 + g s + U (S0 + g dS) V h, on the final hidden state before the LM head.

    Args:
        h: [N, d] or [N, T, d].
        bases: shared parts; the head site is their last.
        core: g dS [r, r] or [N, r, r]; None for the static update.
        shift: g s [d] or [N, d]; None for the static update.
    """
    effective = bases.s0[-1] if core is None else bases.s0[-1] + core
    total = bases.shift if shift is None else bases.shift + shift
    if total.ndim == 2 and h.ndim == 3:
        total = total[:, None]
    return adapted_linear(h, h + total.to(h.dtype), bases.u[-1], bases.v[-1], effective)


def apply_paper(h: Tensor, logits: Tensor, lora_a: Tensor, lora_b: Tensor, alpha: float) -> Tensor:
    """Return logits + (alpha / r) B A h, the paper's form.

    Args:
        h: [N, d] or [N, T, d].
        logits: [N, vocab] or [N, T, vocab], of the unadapted head.
        lora_a: [r, d] or [N, r, d].
        lora_b: [vocab, r] or [N, vocab, r].
        alpha: the spec's alpha.
    """
    low = per_row(lora_a, h.to(lora_a.dtype))
    return logits + (alpha / lora_a.shape[-2] * per_row(lora_b, low)).to(logits.dtype)


@contextmanager
def adapted(
    model: nn.Module, spec: UpdateSpec, bases: SharedBases, generated: Generated
) -> Iterator[None]:
    """Run a transformers causal LM under an update, by hooks that leave its weights untouched.

    `generated` holds one update for the whole batch (B = 1) or one per sequence. Gradients reach
    it and `bases`. Leaving the context removes the hooks.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    with ExitStack() as hooks:
        if spec.depth == "paper":
            hooks.enter_context(head.register_forward_hook(_paper_hook(spec, generated)))
        else:
            hooks.enter_context(head.register_forward_pre_hook(_head_hook(bases, generated)))
        for index, site in enumerate(spec.sites):
            if site.name != HEAD and spec.depth != "paper":
                module = model.get_submodule(site.name)
                hook = _linear_hook(bases, generated, index)
                hooks.enter_context(module.register_forward_hook(hook))
        yield


def _linear_hook(bases: SharedBases, generated: Generated, index: int) -> Callable[..., Tensor]:
    assert generated.cores is not None
    core = bases.s0[index] + generated.cores[:, index]

    def hook(_module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        return adapted_linear(args[0], y, bases.u[index], bases.v[index], core)

    return hook


def _head_hook(bases: SharedBases, generated: Generated) -> Callable[..., tuple[Tensor]]:
    assert generated.cores is not None
    core, shift = generated.cores[:, -1], generated.shift

    def hook(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (apply_head(args[0], bases, core, shift),)

    return hook


def _paper_hook(spec: UpdateSpec, generated: Generated) -> Callable[..., Tensor]:
    a, b = generated.lora_a, generated.lora_b
    assert a is not None
    assert b is not None

    def hook(_module: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
        return apply_paper(args[0], logits, a, b, spec.alpha)

    return hook
