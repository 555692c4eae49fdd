"""The kernels for a GPU: those that decode, in Triton; the rest is torch's."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lm_workers.layers import triton_kernels as source
from lm_workers.layers.kernels import HeadNorms, LateUpdate
from lm_workers.layers.paged import PagedStep
from lm_workers.layers.reference import ReferenceKernels, prefill

_PROGRAMS = 264
"""Programs that keep a GPU busy: two for each multiprocessor of a large one."""
_SHARE = 256
"""Tokens of context that are not worth reading in more than one program."""
_TOKENS, _BYTES = 128, 2**15
"""The most tokens that a program reads at a time, and the most bytes of their keys."""
_ROWS, _COLUMNS = 16, 128
"""Of a tile that a program computes; rows are what a product of matrices has at least."""

_PARTS, _SCAN = 32, 1024
"""Parts of a row in which a largest number is looked for, and columns looked at together."""

_NO_TARGETS = {"TARGETS": 0, "PLACES": (), "RANK": 0, "RANKS": _ROWS}


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


class GpuKernels(ReferenceKernels):
    """See `Kernels`. Rows that decode are Triton's, as is all that is done row by row; prompts are
    left to torch's attention.
    """

    late_rank: ClassVar[int] = 32  # cores of 16 rows are held in registers
    most_context: ClassVar[int | None] = None

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels`."""
        return _norm(x, None, weight, eps)

    def add(self, residual: torch.Tensor, x: torch.Tensor, late: LateUpdate | None) -> None:
        """See `Kernels`."""
        rows, size = x.shape
        grid = (-(-rows // _ROWS), -(-size // _COLUMNS))
        source.add_kernel[grid](
            residual, residual.stride(0), x, x.stride(0), rows, size, **_late(late, x),
            ROWS=_ROWS, BLOCK=_COLUMNS, PRECISION=_precision(x),
        )  # fmt: skip

    def add_rms_norm(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        late: LateUpdate | None = None,
    ) -> torch.Tensor:
        """See `Kernels`."""
        if late is None:
            return _norm(x, residual, weight, eps)
        self.add(residual, x, late)
        return _norm(residual, None, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor, late: LateUpdate | None = None) -> torch.Tensor:
        """See `Kernels`."""
        rows, size = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        grid = (-(-rows // _ROWS), -(-size // _COLUMNS))
        source.silu_mul_kernel[grid](
            gate_up, gate_up.stride(0), out, rows, size, **_late(late, gate_up),
            ROWS=_ROWS, BLOCK=_COLUMNS, PRECISION=_precision(gate_up),
        )  # fmt: skip
        return out

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        norms: HeadNorms | None,
        paged: PagedStep,
        layer: int,
        late: LateUpdate | None = None,
    ) -> torch.Tensor:
        """See `Kernels`. The queries stay where they are in `qkv`."""
        keys, values = paged.cache.keys[layer], paged.cache.values[layer]
        _, kv_heads, size = keys.shape
        rows, stride = len(qkv), qkv.stride(0)
        heads = qkv.shape[1] // size - 2 * kv_heads
        cosine, sine = (one.contiguous() for one in rotary)
        source.rotate_and_store_kernel[(rows, heads + 2 * kv_heads)](
            qkv, stride, cosine, sine,
            qkv if norms is None else norms.query,
            qkv if norms is None else norms.key,
            0.0 if norms is None else norms.eps,
            paged.write_slots, keys, values, heads, kv_heads, size, **_late(late, qkv),
            NORM=norms is not None, HALF=_power_of_two(size // 2), num_warps=1,
        )  # fmt: skip
        return qkv.as_strided((rows, heads, size), (stride, size, 1), qkv.storage_offset())

    def attend(
        self,
        query: torch.Tensor,
        paged: PagedStep,
        layer: int,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """See `Kernels`."""
        spans = paged.spans.tolist()
        decoding = sum(stop - start == 1 for start, stop, _ in spans)
        out = query.new_empty(query.shape)
        if decoding:
            _decode(query, paged, layer, scaling, window, decoding, out)
        for number, (start, stop, length) in enumerate(spans[decoding:], decoding):
            slots = paged.slots_of(number, length)
            keys, values = paged.cache.read(layer, slots)
            out[start:stop] = prefill(query[start:stop], keys, values, length, scaling, window)
        return out

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """See `Kernels`. A NaN is not a number that could be largest."""
        rows, size = x.shape
        share = -(-size // (_PARTS * _SCAN)) * _SCAN
        tops = torch.empty(rows, _PARTS, dtype=torch.float32, device=x.device)
        places = torch.empty(rows, _PARTS, dtype=torch.int32, device=x.device)
        out = torch.empty(rows, dtype=torch.int64, device=x.device)
        source.argmax_kernel[(rows, _PARTS)](
            x, x.stride(0), size, share, tops, places, PARTS=_PARTS, BLOCK=_SCAN
        )
        source.first_of_kernel[(rows,)](tops, places, out, PARTS=_PARTS, num_warps=1)
        return out

    def update(self, y: torch.Tensor, late: LateUpdate) -> None:
        """See `Kernels`."""
        if late.cores.shape[-1] > self.late_rank:
            super().update(y, late)
            return
        given = _late(late, y)
        rank, places = given["RANK"], given.pop("PLACES")
        for target in range(given.pop("TARGETS")):
            place = places[3 * target : 3 * target + 3]
            one = {"low": late.low[:, target * rank :], "site_of": late.targets.sites[target:]}
            source.update_kernel[(-(-len(y) // _ROWS), -(-place[1] // _COLUMNS))](
                y, y.stride(0), len(y), **{**given, **one}, PLACES=place,
                ROWS=_ROWS, BLOCK=_COLUMNS, PRECISION=_precision(y),
            )  # fmt: skip


def _late(late: LateUpdate | None, y: torch.Tensor) -> dict[str, Any]:
    """A late update of the outputs y as the kernels take it."""
    names = ("low", "cores", "u", "slots", "site_of")
    if late is None:
        nothing = dict.fromkeys(names, y)
        return {**nothing, "low_stride": 0, "u_stride": 0, "sites": 0, **_NO_TARGETS}
    targets, (_, sites, rank, _) = late.targets, late.cores.shape
    tensors = (late.low, late.cores, targets.u, late.slots, targets.sites)
    return {
        **dict(zip(names, tensors, strict=True)),
        "low_stride": late.low.stride(0),
        "u_stride": targets.u.stride(0),
        "sites": sites,
        "TARGETS": len(targets.targets),
        "PLACES": targets.places,
        "RANK": rank,
        "RANKS": max(_ROWS, _power_of_two(rank)),
    }


def _norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    rows, size = x.shape
    out = x.new_empty(rows, size)
    target = x if residual is None else residual
    block = _power_of_two(size)
    source.norm_kernel[(rows,)](
        x, x.stride(0), target, target.stride(0), weight, out, size, eps,
        ADD=residual is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out


def _precision(like: torch.Tensor) -> str:
    """Products of float32 in full: TF32 keeps no more digits than float16."""
    return "ieee" if like.dtype == torch.float32 else "tf32"


def _decode(
    query: torch.Tensor,
    paged: PagedStep,
    layer: int,
    scaling: float,
    window: int | None,
    count: int,
    out: torch.Tensor,
) -> None:
    """Attention of the first `count` rows, which are spans of their own, into `out`."""
    _, heads, size = query.shape
    keys, values = paged.cache.keys[layer], paged.cache.values[layer]
    kv_heads = keys.shape[1]
    # Of the largest that the step may be, not of what it is: a recorded step does not change.
    longest = int(paged.spans[:count, 2].max())
    longest = longest if window is None else min(longest, window)
    splits = min(-(-longest // _SHARE), max(1, _PROGRAMS // (count * kv_heads)))
    splits = _power_of_two(splits)
    padded, device = max(_ROWS, _power_of_two(size)), query.device
    parts = torch.empty(count * heads * splits * size, dtype=torch.float32, device=device)
    sums = torch.empty(count * heads * splits, dtype=torch.float32, device=device)
    source.decode_kernel[(count, kv_heads, splits)](
        query, query.stride(0), keys, values, out, parts, sums, paged.lengths,
        paged.tables, paged.tables.stride(0), paged.tables.stride(1),
        kv_heads, size, paged.block_size, window or 0, scaling,
        SHARED=heads // kv_heads, HEADS=max(_ROWS, _power_of_two(heads // kv_heads)),
        SIZE=padded, TOKENS=min(_TOKENS, _BYTES // (padded * query.element_size())), SPLITS=splits,
        WINDOW=window is not None, PRECISION=_precision(query), num_stages=2,
    )  # fmt: skip
    if splits > 1:
        source.combine_kernel[(count * heads,)](
            parts, sums, out, size, SPLITS=splits, SIZE=_power_of_two(size)
        )
