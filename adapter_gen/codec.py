"""The parts of a bundle as tensors in files, each checked when it is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adapter_gen import storage
from adapter_gen.hypernetwork import Hypernetwork
from adapter_gen.storage import Manifest
from adapter_gen.update import HEAD, LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.errors import BundleError, ConfigError, DeltaError
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import AdapterKey, FloatArray

_MAX_RANK = 4096
_MAX_FEATURES = 2**24
_DRAWING = (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_)


def stored_dtype(shape: tuple[int, ...]) -> torch.dtype:
    """Matrices are stored in float16; vectors are few, and keep float32."""
    return torch.float16 if len(shape) >= 2 else torch.float32


def stored(name: str, tensor: Tensor) -> Tensor:
    """The tensor as the file holds it.

    Raises:
        BundleError: a number is NaN or infinite, or too large for float16.
    """
    rounded = tensor.detach().to("cpu", stored_dtype(tuple(tensor.shape))).contiguous()
    if not torch.isfinite(rounded).all():
        raise BundleError(f"{name} holds NaN, infinity or a number beyond float16")
    return rounded


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """One safetensors file of the tensors as `stored`."""
    return save({name: stored(name, tensor) for name, tensor in tensors.items()})


def _decode_tensors(
    data: bytes, file: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Float32 tensors of a file that `encode_tensors` wrote.

    Args:
        data: content of the file.
        file: its name, for messages.
        shapes: the shape that every tensor must have; no other tensor may be there.

    Raises:
        BundleError: not a safetensors file; a tensor is missing, unknown, misshapen, of another
            dtype, or not finite.
    """
    try:
        tensors = load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise BundleError(f"{file} is not a safetensors file: {error}") from None
    _check_names(file, tensors.keys(), shapes.keys())
    for name, shape in shapes.items():
        tensor, dtype = tensors[name], stored_dtype(shape)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise BundleError(
                f"{file}: {name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise BundleError(f"{file}: {name} holds NaN or infinity")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _check_names(file: str, found: Any, expected: Any) -> None:
    """Raise BundleError unless `file` holds exactly the expected tensors."""
    if missing := sorted(set(expected) - set(found)):
        raise BundleError(f"{file} lacks {missing[0]}")
    if unknown := sorted(set(found) - set(expected)):
        raise BundleError(f"{file} holds {unknown[0]}, which does not belong there")


def check_spec(spec: UpdateSpec) -> None:
    """Raise BundleError unless sizes are plausible and the sites make an update of their depth."""
    sizes = [spec.hidden_size]
    for site in spec.sites:
        sizes += [site.in_features, site.out_features]
    if not (1 <= spec.rank <= _MAX_RANK and all(1 <= size <= _MAX_FEATURES for size in sizes)):
        raise BundleError("spec: rank and layer sizes must be positive and of a plausible size")
    names = [site.name for site in spec.sites]
    if len(set(names)) != len(names):
        raise BundleError("spec: site names repeat")
    if spec.depth == "full":
        fits = bool(names) and names[-1] == HEAD
    else:
        fits = len(names) == 1 and (names[0] == HEAD) == (spec.depth == "head")
    if not fits:
        raise BundleError(f"spec: these sites do not make an update of depth {spec.depth}")


def check_token_weights(weights: FloatArray | None) -> None:
    """Raise BundleError unless the weights are float32 [vocab], finite and not negative."""
    if weights is None:
        return
    if weights.ndim != 1 or weights.dtype != np.float32:
        raise BundleError(
            f"token_weights must be float32 [vocab], got {weights.dtype} {weights.shape}"
        )
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise BundleError("token_weights must be finite and not negative")


def base_tensors(bases: SharedBases) -> dict[str, Tensor]:
    """The bases under the names they have in a file: u.0, v.0, ..., s0, shift."""
    named = {"s0": bases.s0, "shift": bases.shift}
    named |= {f"u.{index}": tensor for index, tensor in enumerate(bases.u)}
    return named | {f"v.{index}": tensor for index, tensor in enumerate(bases.v)}


def _base_shapes(spec: UpdateSpec) -> dict[str, tuple[int, ...]]:
    if spec.depth == "paper":
        return {"s0": (0,), "shift": (0,)}
    shapes: dict[str, tuple[int, ...]] = {
        "s0": (len(spec.sites), spec.rank, spec.rank),
        "shift": (spec.hidden_size,),
    }
    for index, site in enumerate(spec.sites):
        shapes[f"u.{index}"] = (site.out_features, spec.rank)
        shapes[f"v.{index}"] = (spec.rank, site.in_features)
    return shapes


def _make_bases(tensors: Mapping[str, Tensor]) -> SharedBases:
    count = sum(name.startswith("u.") for name in tensors)
    return SharedBases(
        u=tuple(tensors[f"u.{index}"] for index in range(count)),
        v=tuple(tensors[f"v.{index}"] for index in range(count)),
        s0=tensors["s0"],
        shift=tensors["shift"],
    )


def rounded_bases(bases: SharedBases, spec: UpdateSpec) -> SharedBases:
    """The bases as a file would give them back; BundleError unless they fit `spec`."""
    tensors, shapes = base_tensors(bases), _base_shapes(spec)
    _check_names("bases", tensors, shapes)
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise BundleError(f"bases: {name} must be {shape}, got {tuple(tensors[name].shape)}")
    return _make_bases({name: stored(name, t).float() for name, t in tensors.items()})


def rounded_module(module: Hypernetwork) -> Hypernetwork:
    """A frozen copy of `module` with weights as a file would give them back."""
    rounded = copy.deepcopy(module).to("cpu").eval().requires_grad_(False)
    state = rounded.state_dict()
    rounded.load_state_dict({name: stored(name, t).float() for name, t in state.items()})
    return rounded


class _Undrawn(TorchFunctionMode):
    """Weights are not initialised: on the meta device that would import torch's compiler."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Leave out what would draw random numbers."""
        return None if func in _DRAWING else func(*args, **(kwargs or {}))


def decode_hypernetwork(data: bytes, manifest: Manifest, snapshot: ClusterSnapshot) -> Hypernetwork:
    """Build the module that the manifest describes and fill it; BundleError if it does not fit."""
    try:
        # On the meta device: no random numbers drawn, no memory for weights about to be replaced.
        with torch.device("meta"), _Undrawn():
            module = manifest.hypernetwork.build(manifest.spec, snapshot.conditioning.shape[1])
    except ConfigError as error:
        raise BundleError(f"{storage.MANIFEST}: {error.message}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    tensors = _decode_tensors(data, storage.HYPERNETWORK, shapes)
    module.load_state_dict(tensors, assign=True)
    return module


def decode_bases(data: bytes, spec: UpdateSpec) -> SharedBases:
    """Inverse of `encode_tensors(base_tensors(...))`; BundleError if it does not fit `spec`."""
    return _make_bases(_decode_tensors(data, storage.BASES, _base_shapes(spec)))


def encode_delta(delta: LoraDelta) -> bytes:
    """One safetensors file of an update."""
    return safetensors.numpy.save(delta.arrays())


def decode_delta(data: bytes, key: AdapterKey, spec: UpdateSpec) -> LoraDelta:
    """Inverse of `encode_delta`, under the name `key`; BundleError if it does not fit `spec`."""
    file = f"update {key.id}"
    arrays = _decode_arrays(data, file)
    _check_names(file, arrays, LoraDelta.static(key, spec).arrays())
    delta = LoraDelta(key, **arrays)
    try:
        delta.check(spec)
    except DeltaError as error:
        raise BundleError(error.message) from None
    return delta


def encode_snapshot(snapshot: ClusterSnapshot) -> bytes:
    """One safetensors file; BundleError if a field has a dtype that could not be read back."""
    arrays = snapshot.arrays()
    _check_snapshot(arrays)
    return safetensors.numpy.save(arrays)


def decode_snapshot(data: bytes) -> ClusterSnapshot:
    """Inverse of `encode_snapshot`; BundleError if a field is missing, unknown or malformed."""
    arrays = _decode_arrays(data, storage.SNAPSHOT)
    # Bundles of before embeddings were centred have no centre, and are looked at from the origin.
    _check_names(storage.SNAPSHOT, arrays.keys() | {"centre"}, ClusterSnapshot.__dataclass_fields__)
    _check_snapshot(arrays)
    return ClusterSnapshot.from_arrays(arrays)


def _check_snapshot(arrays: dict[str, Any]) -> None:
    integers = {"version", "ids", "sizes", "versions"}
    for name, array in arrays.items():
        dtype = np.dtype(np.int64 if name in integers else np.float32)
        if array.dtype != dtype:
            raise BundleError(f"{storage.SNAPSHOT}: {name} must be {dtype}, got {array.dtype}")
    for name in ("version", "threshold"):
        if arrays[name].shape != (1,) or not np.isfinite(arrays[name]).all():
            raise BundleError(f"{storage.SNAPSHOT}: {name} must be one finite number")


def decode_token_weights(data: bytes | None) -> FloatArray | None:
    """The weights [vocab] of a file, None without one; BundleError if it holds anything else."""
    if data is None:
        return None
    arrays = _decode_arrays(data, storage.TOKEN_WEIGHTS)
    _check_names(storage.TOKEN_WEIGHTS, arrays, ("weights",))
    return arrays["weights"]


def _decode_arrays(data: bytes, file: str) -> dict[str, Any]:
    try:
        return safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{file} is not a safetensors file of plain numbers: {error}") from None


def decode_evaluation(data: bytes | None) -> dict[str, Any] | None:
    """The JSON object of a file, None without one; BundleError if it is none."""
    if data is None:
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{storage.EVALUATION} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BundleError(f"{storage.EVALUATION} must hold one JSON object")
    return value
