"""Where in a transformers model an update can act."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from adapter_gen.update import HEAD, Depth, Site, UpdateSpec
from cluster_router.wire.errors import ModelError


def discover_sites(model: nn.Module, depth: Depth, rank: int, alpha: float = 1.0) -> UpdateSpec:
    """The spec of an update of `model`, a transformers causal LM.

    `full` takes every linear of the decoder blocks in module order, then the final hidden state;
    `head` the final hidden state alone; `paper` the LM head. Works on the meta device.

    Raises:
        ModelError: the model has no LM head, or no decoder blocks with linears.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise ModelError(f"{type(model).__name__} has no LM head; load it as a causal LM")
    out_features, hidden = head.weight.shape
    if depth == "paper":
        name = next(name for name, module in model.named_modules() if module is head)
        sites: tuple[Site, ...] = (Site(name, hidden, out_features),)
    else:
        blocks = tuple(_block_linears(model)) if depth == "full" else ()
        sites = (*blocks, Site(HEAD, hidden, hidden))
    return UpdateSpec(depth=depth, rank=rank, hidden_size=hidden, sites=sites, alpha=alpha)


def _block_linears(model: nn.Module) -> Iterator[Site]:
    prefixes = tuple(f"{name}." for name in _block_lists(model))
    found = False
    for name, module in model.named_modules():
        if not name.startswith(prefixes):
            continue
        if isinstance(module, nn.Linear):
            found = True
            yield Site(name, module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found = True
            yield Site(name, module.nx, module.nf)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linears in its decoder blocks; use depth head"
        )


def _block_lists(model: nn.Module) -> list[str]:
    decoder = model.get_decoder()  # type: ignore[operator]
    lists = {id(child) for child in decoder.children() if isinstance(child, nn.ModuleList)}
    return [name for name, module in model.named_modules() if id(module) in lists]
