"""The kernels for a GPU, in Triton; `gpu.py` starts them.

Every kernel rounds to the model's dtype where the reference does. Sizes that are no power of two
are padded with masked lanes. Row strides are in elements; inner dimensions are contiguous.

A late update comes as `low` [T, G * r], `cores` [slots, sites, r, r], `u` [r, columns], `slots`
[T], `site_of` [G], and three numbers for each target in PLACES: its first column in the outputs,
its columns, and the first of them in `u`. With no targets (TARGETS 0) none of them is read. These
kernels are so short that the order of their loads is most of their time: none waits for another
but the core for its slot.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN202, ANN201 - Triton compiles these functions, whose arguments are its own

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rounded(wide, like):
    """`wide`, float32, with the precision of `like`, as float32 again."""
    return wide.to(like.dtype).to(tl.float32)


@triton.jit
def norm_kernel(
    x, x_stride, residual, residual_stride, weight, out, size, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: add x to the residual, if ADD, and norm the sum."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(x + row * x_stride + column, mask=inside, other=0)
    if ADD:
        place = residual + row * residual_stride + column
        before = tl.load(place, mask=inside, other=0)
        value = (before.to(tl.float32) + value.to(tl.float32)).to(before.dtype)
        tl.store(place, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / size + eps)
    by = tl.load(weight + column, mask=inside, other=0)
    normed = by.to(tl.float32) * _rounded(wide * scale, value)
    tl.store(out + row * size + column, normed.to(value.dtype), mask=inside)


@triton.jit
def _turned(
    low, low_stride, cores, slot, row, rows, target, site, sites, RANK, RANKS: tl.constexpr
):  # fmt: skip
    """core (V x) of rows [R] for one target, float32 [R, RANKS]; zeros in slot 0."""
    inner, outer = tl.arange(0, RANKS), tl.arange(0, RANKS)
    narrow = tl.load(
        low + row[:, None] * low_stride + target * RANK + inner[None, :],
        mask=(row < rows)[:, None] & (inner < RANK)[None, :],
        other=0,
    )
    core = tl.load(
        cores
        + ((slot * sites + site) * RANK * RANK)[:, None, None]
        + outer[None, :, None] * RANK
        + inner[None, None, :],
        mask=(outer < RANK)[None, :, None] & (inner < RANK)[None, None, :],
        other=0,
    )
    turned = tl.sum(core.to(tl.float32) * narrow.to(tl.float32)[:, None, :], 2)
    return tl.where((slot != 0)[:, None], turned, 0)


@triton.jit
def _is_within(column, first, columns):
    return (column >= first) & (column < first + columns)


@triton.jit
def _changed(
    y, base, low, low_stride, cores, u, u_stride, slot, row, rows, site_of, sites,
    TARGETS: tl.constexpr, PLACES: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [ROWS, BLOCK], outputs from column `base` on, all of one target or of none, updated."""
    change = tl.zeros((ROWS, BLOCK), tl.float32)
    for target in tl.static_range(TARGETS):
        if _is_within(base, PLACES[3 * target], PLACES[3 * target + 1]):
            column = base - PLACES[3 * target] + tl.arange(0, BLOCK)
            rank = tl.arange(0, RANKS)
            wide = tl.load(
                u + rank[:, None] * u_stride + PLACES[3 * target + 2] + column[None, :],
                mask=(rank < RANK)[:, None] & (column < PLACES[3 * target + 1])[None, :],
                other=0,
            )
            site = tl.load(site_of + target)
            turned = _turned(
                low, low_stride, cores, slot, row, rows, target, site, sites, RANK, RANKS
            )
            change = tl.dot(turned.to(wide.dtype), wide, input_precision=PRECISION)
    return (y.to(tl.float32) + _rounded(change, y)).to(y.dtype)


@triton.jit(do_not_specialize=["rows"])
def silu_mul_kernel(
    x, x_stride, out, rows, size, low, low_stride, cores, u, u_stride, slots, site_of, sites,
    TARGETS: tl.constexpr, PLACES: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows by BLOCK columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    base = tl.program_id(1) * BLOCK
    column = base + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    place = x + row[:, None] * x_stride + column[None, :]
    gate = tl.load(place, mask=inside, other=0)
    up = tl.load(place + size, mask=inside, other=0)
    if TARGETS > 0:
        slot = tl.load(slots + row, mask=row < rows, other=0)
        gate = _changed(
            gate, base, low, low_stride, cores, u, u_stride, slot, row, rows, site_of, sites,
            TARGETS, PLACES, RANK, RANKS, ROWS, BLOCK, PRECISION,
        )  # fmt: skip
        up = _changed(
            up, base + size, low, low_stride, cores, u, u_stride, slot, row, rows, site_of, sites,
            TARGETS, PLACES, RANK, RANKS, ROWS, BLOCK, PRECISION,
        )  # fmt: skip
    wide = gate.to(tl.float32)
    silu = _rounded(wide / (1 + tl.exp(-wide)), gate)
    target = out + row[:, None] * size + column[None, :]
    tl.store(target, (silu * up.to(tl.float32)).to(gate.dtype), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def add_kernel(
    into, into_stride, x, x_stride, rows, size,
    low, low_stride, cores, u, u_stride, slots, site_of, sites,
    TARGETS: tl.constexpr, PLACES: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows by BLOCK columns of into += x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    base = tl.program_id(1) * BLOCK
    column = base + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0)
    if TARGETS > 0:
        slot = tl.load(slots + row, mask=row < rows, other=0)
        value = _changed(
            value, base, low, low_stride, cores, u, u_stride, slot, row, rows, site_of, sites,
            TARGETS, PLACES, RANK, RANKS, ROWS, BLOCK, PRECISION,
        )  # fmt: skip
    place = into + row[:, None] * into_stride + column[None, :]
    before = tl.load(place, mask=inside, other=0)
    tl.store(place, (before.to(tl.float32) + value.to(tl.float32)).to(before.dtype), mask=inside)


@triton.jit
def _head_change(
    base, half, low, low_stride, cores, u, u_stride, slot, row, site_of, sites,
    TARGETS: tl.constexpr, PLACES: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """What to add to each half of a row's outputs from column `base` on, float32 [HALF]."""
    left, right = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    for target in tl.static_range(TARGETS):
        if _is_within(base, PLACES[3 * target], PLACES[3 * target + 1]):
            site = tl.load(site_of + target)
            inner, outer = tl.arange(0, RANKS), tl.arange(0, RANKS)
            narrow = tl.load(
                low + row * low_stride + target * RANK + inner, mask=inner < RANK, other=0
            )
            core = tl.load(
                cores
                + (slot * sites + site) * RANK * RANK
                + outer[:, None] * RANK
                + inner[None, :],
                mask=(outer < RANK)[:, None] & (inner < RANK)[None, :],
                other=0,
            )
            turned = tl.sum(core.to(tl.float32) * narrow.to(tl.float32)[None, :], 1)
            turned = tl.where(slot != 0, _rounded(turned, narrow), 0)
            column = tl.arange(0, HALF)
            place = (
                u
                + outer[:, None] * u_stride
                + PLACES[3 * target + 2]
                + (base - PLACES[3 * target] + column)[None, :]
            )
            inside = (outer < RANK)[:, None] & (column < half)[None, :]
            wide = tl.load(place, mask=inside, other=0)
            left = tl.sum(turned[:, None] * wide.to(tl.float32), 0)
            wide = tl.load(place + half, mask=inside, other=0)
            right = tl.sum(turned[:, None] * wide.to(tl.float32), 0)
    return left, right


@triton.jit
def rotate_and_store_kernel(
    qkv, stride, cosine, sine, query_norm, key_norm, eps, write_slots, keys, values,
    heads, kv_heads, size, low, low_stride, cores, u, u_stride, slots, site_of, sites,
    TARGETS: tl.constexpr, PLACES: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    NORM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head of a row: queries stay where they are, keys and values go into the cache."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = size // 2
    lower = tl.arange(0, HALF)
    upper = lower + half
    inside = lower < half
    source = qkv + row * stride + head * size
    left = tl.load(source + lower, mask=inside, other=0)
    right = tl.load(source + upper, mask=inside, other=0)
    if TARGETS > 0:
        slot = tl.load(slots + row)
        to_left, to_right = _head_change(
            head * size, half, low, low_stride, cores, u, u_stride, slot, row, site_of, sites,
            TARGETS, PLACES, RANK, RANKS, HALF,
        )  # fmt: skip
        left = (left.to(tl.float32) + _rounded(to_left, left)).to(left.dtype)
        right = (right.to(tl.float32) + _rounded(to_right, right)).to(right.dtype)
    place = tl.load(write_slots + row)
    if head >= heads + kv_heads:
        target = values + (place * kv_heads + head - heads - kv_heads) * size
        tl.store(target + lower, left, mask=inside)
        tl.store(target + upper, right, mask=inside)
    else:
        if NORM:
            norm = query_norm
            if head >= heads:
                norm = key_norm
            wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
            squares = tl.sum(wide_left * wide_left) + tl.sum(wide_right * wide_right)
            scale = tl.rsqrt(squares / size + eps)
            by_left = tl.load(norm + lower, mask=inside, other=0).to(tl.float32)
            by_right = tl.load(norm + upper, mask=inside, other=0).to(tl.float32)
            left = (by_left * _rounded(wide_left * scale, left)).to(left.dtype)
            right = (by_right * _rounded(wide_right * scale, right)).to(right.dtype)
        cosine += row * size
        sine += row * size
        x, y = left.to(tl.float32), right.to(tl.float32)
        cos_left = tl.load(cosine + lower, mask=inside, other=0).to(tl.float32)
        cos_right = tl.load(cosine + upper, mask=inside, other=0).to(tl.float32)
        sin_left = tl.load(sine + lower, mask=inside, other=0).to(tl.float32)
        sin_right = tl.load(sine + upper, mask=inside, other=0).to(tl.float32)
        turned_left = _rounded(x * cos_left, left) - _rounded(y * sin_left, left)
        turned_right = _rounded(y * cos_right, left) + _rounded(x * sin_right, left)
        target = source
        if head >= heads:
            target = keys + (place * kv_heads + head - heads) * size
        tl.store(target + lower, turned_left.to(left.dtype), mask=inside)
        tl.store(target + upper, turned_right.to(left.dtype), mask=inside)


@triton.jit(do_not_specialize=["table_row", "table_column"])
def decode_kernel(
    query, query_stride, keys, values, out, parts, sums, lengths, tables, table_row, table_column,
    kv_heads, size, block_size, window, scaling,
    SHARED: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one row's SHARED query heads over one KV head, in one of SPLITS parts of it.

    With several parts each leaves its result, float32, in `parts` [rows, heads, SPLITS, size], and
    the logarithm of its weights' sum in `sums` [rows, heads, SPLITS], for `combine_kernel`.
    """
    row, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    heads = kv_heads * SHARED
    length = tl.load(lengths + row)
    first = length * 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), TOKENS) * TOKENS
    begin = first + part * share
    end = tl.minimum(begin + share, length)

    member, column = tl.arange(0, HEADS), tl.arange(0, SIZE)
    head = kv_head * SHARED + member
    wanted = (member < SHARED)[:, None] & (column < size)[None, :]
    place = query + row * query_stride + head[:, None] * size + column[None, :]
    asked = tl.load(place, mask=wanted, other=0)
    largest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    mixed = tl.zeros((HEADS, SIZE), tl.float32)
    for start in range(begin, end, TOKENS):
        position = start + tl.arange(0, TOKENS)
        seen = position < end
        block = tl.load(
            tables + row * table_row + position // block_size * table_column, mask=seen, other=0
        )
        slot = block * block_size + position % block_size
        kept = (slot * kv_heads + kv_head)[:, None] * size + column[None, :]
        there = seen[:, None] & (column < size)[None, :]
        key = tl.load(keys + kept, mask=there, other=0)
        value = tl.load(values + kept, mask=there, other=0)
        score = tl.dot(asked, tl.trans(key), input_precision=PRECISION) * scaling
        score = tl.where(seen[None, :], score, float("-inf"))
        above = tl.maximum(largest, tl.max(score, 1))
        shrink = tl.exp(largest - above)
        weight = tl.exp(score - above[:, None])
        total = total * shrink + tl.sum(weight, 1)
        mixed = mixed * shrink[:, None]
        mixed += tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        largest = above
    total = tl.maximum(total, 1e-30)  # a part beyond a short row's end has no weights
    result = mixed / total[:, None]
    if SPLITS == 1:
        target = out + row * heads * size + head[:, None] * size + column[None, :]
        tl.store(target, result.to(asked.dtype), mask=wanted)
    else:
        place = (row * heads + head) * SPLITS + part
        tl.store(parts + place[:, None] * size + column[None, :], result, mask=wanted)
        tl.store(sums + place, largest + tl.log(total), mask=member < SHARED)


@triton.jit
def combine_kernel(parts, sums, out, size, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """One head of a row, from its parts."""
    head = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, SPLITS), tl.arange(0, SIZE)
    inside = column < size
    weights = tl.load(sums + head * SPLITS + part)
    weights = tl.exp(weights - tl.max(weights))
    place = parts + (head * SPLITS + part)[:, None] * size + column[None, :]
    found = tl.load(place, mask=inside[None, :], other=0)
    mixed = tl.sum(found * (weights / tl.sum(weights))[:, None], 0)
    tl.store(out + head * size + column, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def update_kernel(
    y, y_stride, rows, low, low_stride, cores, u, u_stride, slots, site_of, sites,
    PLACES: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows by BLOCK columns of one target of the outputs y, in place."""
    start = tl.program_id(1) * BLOCK
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = start + tl.arange(0, BLOCK)
    slot = tl.load(slots + row, mask=row < rows, other=0)
    inside = (slot != 0)[:, None] & (column < PLACES[1])[None, :]
    place = y + row[:, None] * y_stride + PLACES[0] + column[None, :]
    before = tl.load(place, mask=inside, other=0)
    after = _changed(
        before, PLACES[0] + start, low, low_stride, cores, u, u_stride, slot, row, rows, site_of,
        sites, 1, PLACES, RANK, RANKS, ROWS, BLOCK, PRECISION,
    )  # fmt: skip
    tl.store(place, after, mask=inside)


@triton.jit
def argmax_kernel(x, x_stride, size, share, tops, places, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest number in a part of a row, `share` columns, and its first column."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), 0, tl.int32) + part * share
    for start in range(part * share, (part + 1) * share, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * x_stride + column, mask=column < size, other=float("-inf"))
        above = value.to(tl.float32) > best
        best = tl.where(above, value.to(tl.float32), best)
        where = tl.where(above, column, where)
    top = tl.max(best, 0)
    tl.store(tops + row * PARTS + part, top)
    tl.store(places + row * PARTS + part, tl.min(tl.where(best == top, where, size), 0))


@triton.jit
def first_of_kernel(tops, places, out, PARTS: tl.constexpr):
    """The first column of a row's largest number, from those of its parts."""
    row, part = tl.program_id(0), tl.arange(0, PARTS)
    best = tl.load(tops + row * PARTS + part)
    where = tl.load(places + row * PARTS + part)
    found = tl.min(tl.where(best == tl.max(best, 0), where, 2147483647), 0)
    tl.store(out + row, found.to(tl.int64))
