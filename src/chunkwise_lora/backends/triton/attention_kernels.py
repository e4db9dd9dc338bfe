"""GPU kernels for the attention of one token per sequence: see `attention`. Importing this module needs Triton.

On CPU tensors they run in Triton's interpreter, for tests.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chunkwise_lora.backends.triton.kernels import dot


@triton.jit
def fold(scores, values, value_scales, highest, total, sums, WIDEN: tl.constexpr):
    """Add one block of slots to a running softmax: scores (heads, slots), -inf where unseen; values (slots, width)."""
    peak = tl.maximum(highest, tl.max(scores, 1))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    shares = tl.exp(scores - shift[:, None])
    fade = tl.exp(highest - shift)
    total = total * fade + tl.sum(shares, 1)
    weighted = (shares * value_scales[None, :]).to(values.dtype)
    sums = dot(weighted, values, sums * fade[:, None], WIDEN)
    return peak, total, sums


@triton.jit
def seen_slots(slot, end, mask, sequence, mask_stride):
    """Return which slots of a block a sequence sees: those before `end` that its row of the mask shows, if any."""
    seen = slot < end
    if mask != 0:
        row = mask.to(tl.pointer_type(tl.uint8)) + sequence * mask_stride
        seen = seen & (tl.load(row + slot, mask=seen, other=0) != 0)
    return seen


@triton.jit
def attend_kernel(
    query,  # (batch, HEADS * GROUP, 1, WIDTH)
    partial,  # (batch, HEADS * GROUP, SPLITS, WIDTH) float32
    norms,  # (batch, HEADS * GROUP, SPLITS, 2) float32: highest score and sum of the softmax
    pools,  # (POOLS,)
    step,  # (STEP,)
    scaling,
    sequence_stride,
    head_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attention of the query heads of one KV head of one sequence to one split of the slots."""
    sequence, head, split = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS, tl.program_id(1)
    sequence = sequence.to(tl.int64)
    cold, hot = tl.load(step), tl.load(step + 1)
    mask, mask_stride = tl.load(step + 2), tl.load(step + 3)
    size = tl.cdiv(tl.cdiv(cold + hot, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * size
    end = tl.minimum(begin + size, cold + hot)

    dtype: tl.constexpr = query.dtype.element_ty
    member, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    in_group, in_width = member < GROUP, column < WIDTH
    q_rows = query + sequence * sequence_stride + (head * GROUP + member)[:, None] * head_stride
    q = tl.load(q_rows + column[None, :], mask=in_group[:, None] & in_width[None, :], other=0.0)
    highest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    sums = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    nothing = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    ones = tl.full((BLOCK_N,), 1.0, tl.float32)

    cold_end = tl.minimum(end, cold)
    if begin < cold_end:
        room, int8_heads = tl.load(pools + 9), tl.load(pools + 10)
        place = tl.load(tl.load(pools + 11).to(tl.pointer_type(tl.int32)) + head)
        if place >= 0:
            first = (sequence * int8_heads + place) * room
            key_codes = tl.load(pools + 3).to(tl.pointer_type(tl.int8)) + first * WIDTH
            key_scales = tl.load(pools + 4).to(tl.pointer_type(tl.bfloat16)) + first
            value_codes = tl.load(pools + 6).to(tl.pointer_type(tl.int8)) + first * WIDTH
            value_scales = tl.load(pools + 7).to(tl.pointer_type(tl.bfloat16)) + first
            for start in range(begin, cold_end, BLOCK_N):
                slot = start + tl.arange(0, BLOCK_N)
                seen = seen_slots(slot, cold_end, mask, sequence, mask_stride)
                place_of = slot[:, None] * WIDTH + column[None, :]
                both = seen[:, None] & in_width[None, :]
                keys = tl.load(key_codes + place_of, mask=both, other=0).to(tl.float32).to(dtype)
                values = tl.load(value_codes + place_of, mask=both, other=0).to(tl.float32).to(dtype)
                scale = tl.load(key_scales + slot, mask=seen, other=0.0).to(tl.float32) * scaling
                scores = dot(q, tl.trans(keys), nothing, WIDEN) * scale[None, :]
                scores = tl.where(seen[None, :], scores, float("-inf"))
                scale = tl.load(value_scales + slot, mask=seen, other=0.0).to(tl.float32)
                highest, total, sums = fold(scores, values, scale, highest, total, sums, WIDEN)
        else:
            first = (sequence * (HEADS - int8_heads) - 1 - place) * room * WIDTH
            other_keys = tl.load(pools + 5).to(tl.pointer_type(dtype)) + first
            other_values = tl.load(pools + 8).to(tl.pointer_type(dtype)) + first
            for start in range(begin, cold_end, BLOCK_N):
                slot = start + tl.arange(0, BLOCK_N)
                seen = seen_slots(slot, cold_end, mask, sequence, mask_stride)
                place_of = slot[:, None] * WIDTH + column[None, :]
                both = seen[:, None] & in_width[None, :]
                keys = tl.load(other_keys + place_of, mask=both, other=0.0)
                values = tl.load(other_values + place_of, mask=both, other=0.0)
                scores = dot(q, tl.trans(keys), nothing, WIDEN) * scaling
                scores = tl.where(seen[None, :], scores, float("-inf"))
                highest, total, sums = fold(scores, values, ones, highest, total, sums, WIDEN)

    first = (sequence * HEADS + head) * tl.load(pools + 2) * WIDTH
    hot_keys = tl.load(pools).to(tl.pointer_type(dtype)) + first
    hot_values = tl.load(pools + 1).to(tl.pointer_type(dtype)) + first
    for start in range(tl.maximum(begin, cold), end, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        seen = seen_slots(slot, end, mask, sequence, mask_stride)
        place_of = (slot - cold)[:, None] * WIDTH + column[None, :]
        both = seen[:, None] & in_width[None, :]
        keys = tl.load(hot_keys + place_of, mask=both, other=0.0)
        values = tl.load(hot_values + place_of, mask=both, other=0.0)
        scores = dot(q, tl.trans(keys), nothing, WIDEN) * scaling
        scores = tl.where(seen[None, :], scores, float("-inf"))
        highest, total, sums = fold(scores, values, ones, highest, total, sums, WIDEN)

    place = (sequence * HEADS + head) * GROUP * SPLITS + member * SPLITS + split
    tl.store(partial + place[:, None] * WIDTH + column[None, :], sums, mask=in_group[:, None] & in_width[None, :])
    tl.store(norms + place * 2, highest, mask=in_group)
    tl.store(norms + place * 2 + 1, total, mask=in_group)


@triton.jit
def combine_kernel(partial, norms, output, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Join the splits of one query head of one sequence: output (batch, 1, heads, WIDTH). Zero if it sees no slot."""
    head = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    in_width = column < WIDTH
    highest = tl.load(norms + (head * SPLITS + split) * 2)
    total = tl.load(norms + (head * SPLITS + split) * 2 + 1)
    peak = tl.max(highest, 0)
    share = tl.exp(highest - tl.where(peak == float("-inf"), 0.0, peak))
    places = (head * SPLITS + split)[:, None] * WIDTH + column[None, :]
    sums = tl.sum(tl.load(partial + places, mask=in_width[None, :], other=0.0) * share[:, None], 0)
    norm = tl.sum(total * share, 0)
    result = sums / tl.where(norm == 0.0, 1.0, norm)
    tl.store(output + head * WIDTH + column, result.to(output.dtype.element_ty), mask=in_width)


@triton.jit
def append_kernel(
    keys,  # (batch, HEADS, 1, WIDTH)
    values,
    pools,
    step,
    key_sequence_stride,
    key_head_stride,
    value_sequence_stride,
    value_head_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write one head of a sequence's new token into the last hot slot in use."""
    sequence, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    sequence = sequence.to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    in_width = column < WIDTH
    place = ((sequence * HEADS + head) * tl.load(pools + 2) + tl.load(step + 1) - 1) * WIDTH + column
    dtype: tl.constexpr = keys.dtype.element_ty
    key = tl.load(keys + sequence * key_sequence_stride + head * key_head_stride + column, mask=in_width)
    value = tl.load(values + sequence * value_sequence_stride + head * value_head_stride + column, mask=in_width)
    tl.store(tl.load(pools).to(tl.pointer_type(dtype)) + place, key, mask=in_width)
    tl.store(tl.load(pools + 1).to(tl.pointer_type(dtype)) + place, value, mask=in_width)
