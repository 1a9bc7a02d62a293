"""Sliding-window flash attention, forward (Dao 2023, arXiv:2307.08691): no score ever leaves the chip.

A program owns P = BM // G query positions of one KV head and all its G query heads side by side, so that a key
is loaded once for all of them and the tile is only P positions wide. It walks over the blocks of keys that
some row of the tile may see, in three loops: the left edge of the window, masked; the middle, where every row
sees every key and no mask is computed; the diagonal, masked. No other block of keys is touched.

Which keys a row sees is an interval, lo <= key < hi: worked out from window, causality and offset, or loaded
(``bounds``, see attention_bounds.py), which covers padding on either side and packed sequences alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_of_program(pairs, blocks, heads_per_group):
    """(batch * KV + head, block): heads_per_group heads side by side, whose keys share the L2 cache; within
    them the last blocks first, which see the most keys."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cast(blocks, tl.int64)
    group_size = heads_per_group * blocks
    first = (pid // group_size) * heads_per_group
    heads = tl.minimum(pairs - first, heads_per_group)
    rest = pid % group_size
    return first + rest % heads, (blocks - 1 - rest // heads).to(tl.int32)


@triton.jit
def interval_of_positions(s, T, window, offset, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The keys lo <= key < hi that query s sees, its own position being s + offset."""
    if CAUSAL:
        hi = tl.minimum(tl.maximum(s + offset + 1, 0), T)
    else:
        hi = s * 0 + T
    if WINDOWED:
        lo = tl.minimum(tl.maximum(s + offset - window + 1, 0), T)
    else:
        lo = s * 0
    return lo, hi


@triton.jit
def interval_of_rows(
    bounds_ptr, s, block, S, T, window, offset,
    P: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """lo and hi of each row; then the keys that any row sees, and those that all rows see, as four numbers."""
    if BOUNDED:
        lo = tl.load(bounds_ptr + s)
        hi = tl.load(bounds_ptr + S + s)
        empty = hi <= lo
        any_lo = tl.min(tl.where(empty, T, lo), 0)
        any_hi = tl.max(tl.where(empty, 0, hi), 0)
        all_lo = tl.max(lo, 0)
        all_hi = tl.min(hi, 0)
    else:
        lo, hi = interval_of_positions(s, T, window, offset, CAUSAL, WINDOWED)
        any_lo, all_hi = interval_of_positions(block * P, T, window, offset, CAUSAL, WINDOWED)
        end = tl.minimum(block * P + P, S) - 1
        all_lo, any_hi = interval_of_positions(end, T, window, offset, CAUSAL, WINDOWED)
    return lo, hi, any_lo, any_hi, all_lo, all_hi


@triton.jit
def three_loops(any_lo, any_hi, all_lo, all_hi, BN: tl.constexpr):
    """first <= left < right <= end in multiples of BN (end apart): blocks from left up to right need no mask."""
    first = any_lo // BN * BN
    end = tl.maximum(any_hi, first)
    left = tl.minimum((all_lo + BN - 1) // BN * BN, end)
    left = tl.maximum(left, first)
    right = tl.maximum(all_hi // BN * BN, left)
    return first, left, right, end


@triton.jit
def _attend(
    acc, m, l, q, k_ptr, v_ptr, skt, svt, lo, hi, any_lo, any_hi, first, end, qk_scale,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key blocks first, first + BN, ... below end; m and scores in powers of two."""
    n = tl.arange(0, BN)
    d = tl.arange(0, DP)
    k_in = n[:, None] * skt + d[None, :]
    v_in = n[:, None] * svt + d[None, :]
    for start in tl.range(first, end, BN, num_stages=STAGES):
        keys = start + n
        k_at = k_ptr + tl.cast(start, tl.int64) * skt + k_in
        v_at = v_ptr + tl.cast(start, tl.int64) * svt + v_in
        # a key that no row of the tile sees is not read, whatever lies there
        seen = (keys >= any_lo) & (keys < any_hi)
        if MASKED:
            k = tl.load(k_at, mask=seen[:, None] & (d < D)[None, :], other=0)
        elif D == DP:
            k = tl.load(k_at)
        else:
            k = tl.load(k_at, mask=(d < D)[None, :], other=0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            keep = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
            scores = tl.where(keep, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1) * qk_scale)
        base = m_new
        if MASKED:
            # a row without a key so far: -inf - -inf would be NaN
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores * qk_scale - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        if MASKED:
            v = tl.load(v_at, mask=seen[:, None] & (d < D)[None, :], other=0)
        elif D == DP:
            v = tl.load(v_at)
        else:
            v = tl.load(v_at, mask=(d < D)[None, :], other=0)
        acc = tl.dot(p.to(DTYPE), v, acc, input_precision="ieee")
        m = m_new
    return acc, m, l


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bounds_ptr, o_ptr, lse_ptr,
    sqb, sqs, sqh, skb, skt, skh, svb, svt, svh, sbb,
    pairs, KV, S, T, window, offset, qk_scale, heads_per_group,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """q [B, S, KV * G, D], k and v [B, T, KV, D] by their strides -> o contiguous like q, lse fp32 [B, S, KV * G].

    A row without a key gives 0 and lse -inf.
    """
    P: tl.constexpr = BM // G
    pair, block = tile_of_program(pairs, tl.cdiv(S, P), heads_per_group)
    batch = pair // KV
    head = pair % KV
    row = tl.arange(0, BM)
    d = tl.arange(0, DP)
    # rows beyond the last position repeat it, so that the interval of the tile is that of its real rows
    s = tl.minimum(block * P + tl.minimum(row // G, P - 1), S - 1)
    real = (row < P * G) & (block * P + row // G < S)
    lo, hi, any_lo, any_hi, all_lo, all_hi = interval_of_rows(
        bounds_ptr + batch * sbb, s, block, S, T, window, offset, P, CAUSAL, WINDOWED, BOUNDED
    )
    start = tl.cast(block, tl.int64) * P
    q_at = q_ptr + batch * sqb + head * G * sqh + start * sqs
    q_in = (row // G)[:, None] * sqs + (row % G).to(tl.int64)[:, None] * sqh + d[None, :]
    q = tl.load(q_at + q_in, mask=real[:, None] & (d < D)[None, :], other=0)

    k_at = k_ptr + batch * skb + head * skh
    v_at = v_ptr + batch * svb + head * svh
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)
    first, left, right, end = three_loops(any_lo, any_hi, all_lo, all_hi, BN)
    acc, m, l = _attend(
        acc, m, l, q, k_at, v_at, skt, svt, lo, hi, any_lo, any_hi, first, left, qk_scale,
        D, DP, BN, True, DTYPE, STAGES,
    )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q, k_at, v_at, skt, svt, lo, hi, any_lo, any_hi, left, right, qk_scale,
        D, DP, BN, False, DTYPE, STAGES,
    )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q, k_at, v_at, skt, svt, lo, hi, any_lo, any_hi, right, end, qk_scale,
        D, DP, BN, True, DTYPE, STAGES,
    )  # fmt: skip

    empty = l == 0
    total = tl.where(empty, 1.0, l)
    lse = tl.where(empty, float("-inf"), (m + tl.log2(total)) * LN2)
    out_row = (batch * S + start) * KV * G + head * G
    out_in = (row // G) * (KV * G) + row % G
    tl.store(lse_ptr + out_row + out_in, lse, mask=real)
    o = acc / total[:, None]
    tl.store(
        o_ptr + out_row * D + (out_in * D)[:, None] + d[None, :],
        o.to(o_ptr.dtype.element_ty),
        mask=real[:, None] & (d < D)[None, :],
    )
