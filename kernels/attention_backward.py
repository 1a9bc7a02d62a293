"""The gradients of sliding-window attention: two kernels, no atomics, so the same bits every run.

dq walks over keys as the forward does; on the way it works out delta = sum(out * dout) of its rows, which the
other reads. dk and dv walk over the queries that may see a block of keys, all G heads of a KV head in one
program, so that their sum needs no second pass. (Dao 2023, arXiv:2307.08691, algorithm 2.)

An out that was rounded puts delta off by some e, and dq by e times the mean key of its row (mean by weight): in 16
bits, where keys and values have a mean, ten times what all other rounding does. But it is known what a row's ds add
up to, and what they miss it by is e: delta is put right for dk, and dq by e times a mean key, in fp32 that of the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import LOG2E, interval_of_positions, interval_of_rows, three_loops, tile_of_program


@triton.jit
def _dq_loop(
    dq, rest, mean, q, do, lse, delta, k_ptr, v_ptr, skt, svt, lo, hi, any_lo, any_hi, first, end, qk_scale,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BN)
    d = tl.arange(0, DP)
    k_in = n[:, None] * skt + d[None, :]
    v_in = n[:, None] * svt + d[None, :]
    for start in tl.range(first, end, BN, num_stages=STAGES):
        keys = start + n
        k_at = k_ptr + tl.cast(start, tl.int64) * skt + k_in
        v_at = v_ptr + tl.cast(start, tl.int64) * svt + v_in
        seen = (keys >= any_lo) & (keys < any_hi)
        if MASKED:
            k = tl.load(k_at, mask=seen[:, None] & (d < D)[None, :], other=0)
            v = tl.load(v_at, mask=seen[:, None] & (d < D)[None, :], other=0)
        elif D == DP:
            k = tl.load(k_at)
            v = tl.load(v_at)
        else:
            k = tl.load(k_at, mask=(d < D)[None, :], other=0)
            v = tl.load(v_at, mask=(d < D)[None, :], other=0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.exp2(scores * qk_scale - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        if MASKED:
            keep = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
            ds = tl.where(keep, ds, 0.0)
            p = tl.where(keep, p, 0.0)  # where it is used
        dq = tl.dot(ds.to(DTYPE), k, dq, input_precision="ieee")
        rest += tl.sum(ds, 1)
        if DTYPE == tl.float32:  # noqa: SIM300
            mean = tl.dot(p, k, mean, input_precision="ieee")
    return dq, rest, mean


@triton.jit
def _mean_key(k_ptr, skt, any_lo, any_hi, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr):
    """fp32 [DP], of the BN keys in the middle of those that some row sees; 0 where none does."""
    d = tl.arange(0, DP)
    first = any_lo + tl.maximum(any_hi - any_lo - BN, 0) // 2
    total = tl.zeros((DP,), tl.float32)
    # a few at a time: the registers are full of dq
    for start in tl.range(0, BN, 16, num_stages=1):
        keys = first + start + tl.arange(0, 16)
        k_at = k_ptr + keys.to(tl.int64)[:, None] * skt + d[None, :]
        k = tl.load(k_at, mask=((keys >= any_lo) & (keys < any_hi))[:, None] & (d < D)[None, :], other=0)
        total += tl.sum(k.to(tl.float32), 0)
    return total / tl.maximum(tl.minimum(any_hi - first, BN), 1)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, bounds_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
    sqb, sqs, sqh, skb, skt, skh, svb, svt, svh, sdb, sds, sdh, sbb,
    pairs, KV, S, T, window, offset, scale, qk_scale, heads_per_group,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr, DLSE: tl.constexpr,
    DTYPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq contiguous like o [B, S, KV * G, D]; delta fp32 [B, S, KV * G], less the gradient of lse where there is
    one: lse enters each score's gradient with the same weight p."""
    P: tl.constexpr = BM // G
    pair, block = tile_of_program(pairs, tl.cdiv(S, P), heads_per_group)
    batch = pair // KV
    head = pair % KV
    row = tl.arange(0, BM)
    d = tl.arange(0, DP)
    s = tl.minimum(block * P + tl.minimum(row // G, P - 1), S - 1)
    real = (row < P * G) & (block * P + row // G < S)
    lo, hi, any_lo, any_hi, all_lo, all_hi = interval_of_rows(
        bounds_ptr + batch * sbb, s, block, S, T, window, offset, P, CAUSAL, WINDOWED, BOUNDED
    )
    start = tl.cast(block, tl.int64) * P
    inside = real[:, None] & (d < D)[None, :]
    heads = (row % G).to(tl.int64)[:, None]
    q_at = q_ptr + batch * sqb + head * G * sqh + start * sqs
    q = tl.load(q_at + (row // G)[:, None] * sqs + heads * sqh + d[None, :], mask=inside, other=0)
    do_at = do_ptr + batch * sdb + head * G * sdh + start * sds
    do = tl.load(do_at + (row // G)[:, None] * sds + heads * sdh + d[None, :], mask=inside, other=0)
    out_row = (batch * S + start) * KV * G + head * G
    out_in = (row // G) * (KV * G) + row % G
    o_in = (out_in * D)[:, None] + d[None, :]
    o = tl.load(o_ptr + out_row * D + o_in, mask=inside, other=0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    rest = tl.zeros((BM,), tl.float32)
    if DLSE:
        dlse = tl.load(dlse_ptr + out_row + out_in, mask=real, other=0)
        delta -= dlse
        rest -= dlse
    lse = tl.load(lse_ptr + out_row + out_in, mask=real, other=float("inf")) * LOG2E
    # no key, no weight: exp2(x - inf) = 0
    lse = tl.where(lse == float("-inf"), float("inf"), lse)

    k_at = k_ptr + batch * skb + head * skh
    v_at = v_ptr + batch * svb + head * svh
    dq = tl.zeros((BM, DP), tl.float32)
    mean = dq
    first, left, right, end = three_loops(any_lo, any_hi, all_lo, all_hi, BN)
    dq, rest, mean = _dq_loop(
        dq, rest, mean, q, do, lse, delta, k_at, v_at, skt, svt, lo, hi, any_lo, any_hi, first, left, qk_scale,
        D, DP, BN, True, DTYPE, STAGES,
    )  # fmt: skip
    dq, rest, mean = _dq_loop(
        dq, rest, mean, q, do, lse, delta, k_at, v_at, skt, svt, lo, hi, any_lo, any_hi, left, right, qk_scale,
        D, DP, BN, False, DTYPE, STAGES,
    )  # fmt: skip
    dq, rest, mean = _dq_loop(
        dq, rest, mean, q, do, lse, delta, k_at, v_at, skt, svt, lo, hi, any_lo, any_hi, right, end, qk_scale,
        D, DP, BN, True, DTYPE, STAGES,
    )  # fmt: skip
    rest = tl.where(lse == float("inf"), 0.0, rest)
    tl.store(delta_ptr + out_row + out_in, delta + rest, mask=real)
    if DTYPE == tl.float32:  # noqa: SIM300
        dq -= rest[:, None] * mean
    else:
        dq -= rest[:, None] * _mean_key(k_at, skt, any_lo, any_hi, D, DP, BN)[None, :]
    tl.store(dq_ptr + out_row * D + o_in, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dkdv_loop(
    dk, dv, k, v, keys, q_ptr, do_ptr, lse_ptr, delta_ptr, bounds_ptr, sqs, sqh, sds, sdh, KV, S, T,
    window, offset, qk_scale, first, end,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Over the blocks first .. end - 1 of P = BM // G query positions each."""
    P: tl.constexpr = BM // G
    row = tl.arange(0, BM)
    d = tl.arange(0, DP)
    heads = (row % G).to(tl.int64)[:, None]
    q_in = (row // G)[:, None] * sqs + heads * sqh + d[None, :]
    do_in = (row // G)[:, None] * sds + heads * sdh + d[None, :]
    row_in = (row // G) * (KV * G) + row % G
    for block in tl.range(first, end, 1, num_stages=STAGES):
        start = tl.cast(block, tl.int64) * P
        s = block * P + row // G
        real = (row < P * G) & (s < S)
        inside = real[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + start * sqs + q_in, mask=inside, other=0)
        lse = tl.load(lse_ptr + start * KV * G + row_in, mask=real, other=float("inf")) * LOG2E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.exp2(scores * qk_scale - lse[None, :])
        if MASKED:
            if BOUNDED:
                lo = tl.load(bounds_ptr + s, mask=real, other=0)
                hi = tl.load(bounds_ptr + S + s, mask=real, other=0)
            else:
                lo, hi = interval_of_positions(s, T, window, offset, CAUSAL, WINDOWED)
            keep = (keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :])
            p = tl.where(keep, p, 0.0)
        do = tl.load(do_ptr + start * sds + do_in, mask=inside, other=0)
        dv = tl.dot(p.to(DTYPE), do, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + start * KV * G + row_in, mask=real, other=0)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(DTYPE), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, bounds_ptr, ranges_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    sqb, sqs, sqh, skb, skt, skh, svb, svt, svh, sdb, sds, sdh, sbb, srb,
    pairs, KV, S, T, window, offset, scale, qk_scale, heads_per_group,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv contiguous [B, T, KV, D].

    ``ranges`` int32 [B or 1, blocks of keys, 2]: with bounds, the first block of queries that may see the
    block of keys, and the one behind the last.
    """
    P: tl.constexpr = BM // G
    blocks = tl.cdiv(T, BN)
    pair, block = tile_of_program(pairs, blocks, heads_per_group)
    # without a window the first keys are seen most: they start first
    tile = blocks - 1 - block
    batch = pair // KV
    head = pair % KV
    n = tl.arange(0, BN)
    d = tl.arange(0, DP)
    keys = tile * BN + n
    inside = (keys < T)[:, None] & (d < D)[None, :]
    start = tl.cast(tile, tl.int64) * BN
    k_at = k_ptr + batch * skb + head * skh + start * skt
    k = tl.load(k_at + n[:, None] * skt + d[None, :], mask=inside, other=0)
    v_at = v_ptr + batch * svb + head * svh + start * svt
    v = tl.load(v_at + n[:, None] * svt + d[None, :], mask=inside, other=0)

    q_blocks = tl.cdiv(S, P)
    if BOUNDED:
        at = ranges_ptr + batch * srb + tile * 2
        first = tl.load(at)
        end = tl.maximum(tl.load(at + 1), first)
        left = end
        right = end
    else:
        # positions j0 .. that see some key of the block, j1 .. that see its last (causal); up to the last that
        # sees some, and the last that sees the first (window)
        j0 = tile * BN - offset
        j1 = tl.minimum(tile * BN + BN, T) - offset
        first = q_blocks * 0
        left = first
        end = q_blocks
        right = q_blocks
        if CAUSAL:
            first = tl.minimum(tl.maximum(j0, 0) // P, q_blocks)
            left = (tl.maximum(j1 - 1, 0) + P - 1) // P
        if WINDOWED:
            end = tl.minimum((tl.maximum(j1 + window - 1, 0) + P - 1) // P, q_blocks)
            right = tl.maximum(j0 + window, 0) // P
        end = tl.maximum(end, first)
        left = tl.minimum(tl.maximum(left, first), end)
        right = tl.minimum(tl.maximum(right, left), end)

    q_at = q_ptr + batch * sqb + head * G * sqh
    do_at = do_ptr + batch * sdb + head * G * sdh
    lse_at = lse_ptr + batch * S * KV * G + head * G
    delta_at = delta_ptr + batch * S * KV * G + head * G
    bounds_at = bounds_ptr + batch * sbb
    dk = tl.zeros((BN, DP), tl.float32)
    dv = tl.zeros((BN, DP), tl.float32)
    dk, dv = _dkdv_loop(
        dk, dv, k, v, keys, q_at, do_at, lse_at, delta_at, bounds_at, sqs, sqh, sds, sdh, KV, S, T,
        window, offset, qk_scale, first, left,
        G, D, DP, BM, CAUSAL, WINDOWED, BOUNDED, True, DTYPE, STAGES,
    )  # fmt: skip
    if not BOUNDED:
        dk, dv = _dkdv_loop(
            dk, dv, k, v, keys, q_at, do_at, lse_at, delta_at, bounds_at, sqs, sqh, sds, sdh, KV, S, T,
            window, offset, qk_scale, left, right,
            G, D, DP, BM, CAUSAL, WINDOWED, BOUNDED, False, DTYPE, STAGES,
        )  # fmt: skip
        if WINDOWED:
            dk, dv = _dkdv_loop(
                dk, dv, k, v, keys, q_at, do_at, lse_at, delta_at, bounds_at, sqs, sqh, sds, sdh, KV, S, T,
                window, offset, qk_scale, right, end,
                G, D, DP, BM, CAUSAL, WINDOWED, BOUNDED, True, DTYPE, STAGES,
            )  # fmt: skip
    out = ((batch * T + start) * KV + head) * D
    out_in = (n * KV * D)[:, None] + d[None, :]
    tl.store(dk_ptr + out + out_in, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + out + out_in, dv.to(dv_ptr.dtype.element_ty), mask=inside)
