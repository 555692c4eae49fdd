"""Take a transformers model over: replace its layers by ours, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cluster_router.wire.errors import DeltaError, ModelError
from lm_workers.adapters import AdapterBank, RowSlots
from lm_workers.attention import PAGED
from lm_workers.layers.body import StackBody, TransformersBody
from lm_workers.layers.decoder import DecoderLayer, is_family, is_family_config
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


def install(
    model: PreTrainedModel,
    layout: type[Product],
    kernels: Kernels,
    bank: AdapterBank | None,
    rows: RowSlots,
    embedding: Lookup | None = None,
) -> StackBody | TransformersBody:
    """Replace the decoder layers of families we know, and the linear layers of any other.

    `embedding` gives the same as the model's own, which takes its place where all is known.

    Returns:
        All but the head. The layers of a model that has no other ones are one `DecoderStack`.

    Raises:
        ModelError: the update names a layer that the model has not, or has in another size.
        DeltaError: the update's bases do not fit its spec.
    """
    installer = Installer(model, layout, kernels, bank, rows)
    for name in _names(model, is_family):
        installer.replace_layer(name)
    for name in _names(model, lambda module: isinstance(module, nn.Linear | Conv1D)):
        installer.replace_linear(name)
    model.set_attn_implementation(PAGED)
    base = model.base_model
    layers = getattr(base, "layers", ())
    if is_family_config(model.config) and all(isinstance(one, DecoderLayer) for one in layers):
        stack = DecoderStack(layers, rows, taped=layout.taped and kernels.taped)
        return StackBody(base, embedding or base.embed_tokens, stack, kernels)
    return TransformersBody(base, kernels)


class Installer:
    """Replaces modules of one model; see `install`."""

    def __init__(
        self,
        model: PreTrainedModel,
        layout: type[Product],
        kernels: Kernels,
        bank: AdapterBank | None,
        rows: RowSlots,
    ) -> None:
        self._model, self._layout, self._kernels = model, layout, kernels
        self._bank, self._rows = bank, rows
        self._sites = {} if bank is None else _sites(model, bank)

    def replace_layer(self, name: str) -> None:
        """Replace a decoder layer of a known family."""

        def group(names: Sequence[str]) -> LinearGroup:
            return self._group([f"{name}.{inner}" for inner in names])

        self._set(name, DecoderLayer(self._model.get_submodule(name), group, self._kernels))

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


def _names(model: PreTrainedModel, wanted: Callable[[nn.Module], bool]) -> list[str]:
    """The modules to replace, without the head. Names: what is replaced must not be held here."""
    head = model.get_output_embeddings()
    found = model.named_modules()
    return [name for name, module in found if wanted(module) and module is not head]


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
