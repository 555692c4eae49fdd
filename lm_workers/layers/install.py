"""Take a model over: lay its weights out for the engine, and put ours where it computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cluster_router.wire.errors import DeltaError, ModelError
from lm_workers.adapters import AdapterBank, RowSlots
from lm_workers.layers.body import StackBody, TransformersBody
from lm_workers.layers.decoder import DecoderLayer
from lm_workers.layers.kernels import Kernels
from lm_workers.layers.linear import (
    LinearGroup,
    Lookup,
    PlainProduct,
    Product,
    RowUpdate,
    weight_of,
)
from lm_workers.layers.stack import DecoderStack
from lm_workers.models.family import FamilyModel, Layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def install(
    model: FamilyModel | PreTrainedModel,
    layout: type[Product],
    kernels: Kernels,
    bank: AdapterBank | None,
    rows: RowSlots,
    dtype: torch.dtype,
    embedding: Lookup | None = None,
) -> StackBody | TransformersBody:
    """Lay the weights of a model out for the engine, one after the other.

    Args:
        model: gives its weights away.
        layout: of the weights.
        kernels: compute everything else.
        bank: resident updates; None serves the base model alone.
        rows: the step's adapter slots.
        dtype: to compute in.
        embedding: gives the same as the model's own, whose place it takes where it can.

    Returns:
        All but the head.

    Raises:
        ModelError: the update names a layer that the model has not, or has in another size.
        DeltaError: the update's bases do not fit its spec.
    """
    installer = Installer(model, layout, kernels, bank, rows)
    if isinstance(model, FamilyModel):
        layers = [installer.take_layer(index) for index in range(len(model.model.layers))]
        stack = DecoderStack(layers, rows, taped=layout.taped and kernels.taped)
        return StackBody(model, embedding or model.get_input_embeddings(), stack, kernels, dtype)
    for name in _linears(model):
        installer.replace_linear(name)
    from lm_workers.attention import PAGED  # imports transformers' model classes

    model.set_attn_implementation(PAGED)
    return TransformersBody(model.base_model, kernels)


class Installer:
    """Replaces modules of one model; see `install`."""

    def __init__(
        self,
        model: nn.Module,
        layout: type[Product],
        kernels: Kernels,
        bank: AdapterBank | None,
        rows: RowSlots,
    ) -> None:
        self._model, self._layout, self._kernels = model, layout, kernels
        self._bank, self._rows = bank, rows
        self._sites = {} if bank is None else _sites(model, bank)

    def take_layer(self, index: int) -> DecoderLayer:
        """A layer of a `FamilyModel`, which has it no more."""
        name = f"model.layers.{index}"

        def group(names: Sequence[str]) -> LinearGroup:
            return self._group([f"{name}.{inner}" for inner in names])

        layer = self._model.get_submodule(name)
        assert isinstance(layer, Layer)
        taken = DecoderLayer(layer, group, self._kernels)
        self._model.set_submodule(name, nn.Identity())
        return taken

    def replace_linear(self, name: str) -> None:
        """Replace one linear layer, if that changes anything."""
        if name in self._sites or self._layout is not PlainProduct:
            self._set(name, self._group([name]))

    def _set(self, name: str, module: nn.Module) -> None:
        self._model.set_submodule(name, module)

    def _group(self, names: Sequence[str]) -> LinearGroup:
        members = [self._model.get_submodule(name) for name in names]
        return LinearGroup(members, self._layout, self._update(names, members))

    def _update(self, names: Sequence[str], members: Sequence[nn.Module]) -> RowUpdate | None:
        targets, column = [], 0
        for name, member in zip(names, members, strict=True):
            width = len(weight_of(member))
            if name in self._sites:
                targets.append((self._sites[name], column, width))
            column += width
        if not targets or self._bank is None:
            return None
        return RowUpdate(self._bank, self._rows, self._kernels, self._bank.targets(targets))


def _linears(model: PreTrainedModel) -> list[str]:
    """The linear layers, without the head. Names: what is replaced must not be held here."""
    head = model.get_output_embeddings()
    found = model.named_modules()
    return [name for name, one in found if isinstance(one, nn.Linear | Conv1D) and one is not head]


def _sites(model: nn.Module, bank: AdapterBank) -> dict[str, int]:
    """Index of each linear layer that the update names.

    Raises: see `install`.
    """
    if bank.spec.depth == "paper":
        return {}
    if len(bank.u) != len(bank.spec.sites) or len(bank.v) != len(bank.spec.sites):
        raise DeltaError(f"the bundle's bases cover {len(bank.u)} of {len(bank.spec.sites)} sites")
    found = {}
    for index, site in enumerate(bank.spec.sites):
        if index == bank.spec.head:
            continue
        try:
            module = model.get_submodule(site.name)
        except AttributeError:
            raise ModelError(f"the update names {site.name}, which this model lacks") from None
        shape = tuple(weight_of(module).shape)
        if shape != (site.out_features, site.in_features):
            raise ModelError(
                f"{site.name} is {shape[1]} -> {shape[0]}, the update expects "
                f"{site.in_features} -> {site.out_features}"
            )
        found[site.name] = index
    return found
