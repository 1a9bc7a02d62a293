"""Decode attention: the queries of a few positions over a ring cache, split over the keys (flash decoding).

One program takes one KV head of one row: its query heads are the rows of one tile, so every key is read once. The keys
are cut into chunks by their position from the row's start, and each chunk is a program. The last program of a row to
arrive adds up all of them in order: no atomic goes into the output, and the same bits come out every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning_decode
from .launch import DTYPES, counters


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, seen_ptr, start_ptr, out_ptr, acc_ptr, stat_ptr, lock_ptr,
    scale, T, KV, W, window, sqb, sqt, sqh, skb, skh, skw, svb, svh, svw, ssb, ssh,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, INT8: tl.constexpr, START: tl.constexpr, SEVERAL: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (B * KV * blocks of rows, splits). G query heads a KV head; ``scale`` is log2(e) times the scale; SEVERAL
    is T > 1."""
    rows_all = T * G
    blocks = tl.cdiv(rows_all, BR)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % KV
    b = (tl.program_id(0) // blocks // KV).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)

    # an empty row may come with any count of padding, and with a negative count of positions
    seen = tl.maximum(tl.load(seen_ptr + b), 0).to(tl.int32)
    if START:
        start = tl.minimum(tl.maximum(tl.load(start_ptr + b), 0).to(tl.int32), seen)
    else:
        start = seen * 0
    oldest = seen - T + 1 - window
    lowest = tl.maximum(tl.maximum(oldest, seen - W), start)
    first = start + (lowest - start) // CHUNK * CHUNK
    # whole turns of the ring are left out of the count: near 2^31 no sum of positions would fit 32 bits
    turns = first // W * W
    lowest -= turns
    seen -= turns
    first -= turns
    # programs beyond the last chunk have nothing to do; an empty row still needs its zeros
    active = tl.maximum(tl.cdiv(seen - first, CHUNK), 1)

    if split < active:
        row = block * BR + tl.arange(0, BR)
        d = tl.arange(0, BD)
        in_rows = row < rows_all
        t = row // G
        group = head * G + row % G
        mask_d = (d < D)[None, :]
        q_at = (
            q_ptr + b * sqb + t.to(tl.int64)[:, None] * sqt + group.to(tl.int64)[:, None] * sqh + d[None, :]
        )
        q = tl.load(q_at, mask=in_rows[:, None] & mask_d, other=0).to(DTYPE)
        query = seen - T + t
        k_row = k_ptr + b * skb + head.to(tl.int64) * skh + d[None, :]
        v_row = v_ptr + b * svb + head.to(tl.int64) * svh + d[None, :]
        s_row = b * ssb + head.to(tl.int64) * ssh

        origin = first + split * CHUNK
        # whole steps that lie before the window are left out, without moving the others
        begin = origin + tl.maximum(lowest - origin, 0) // BN * BN
        end = tl.minimum(origin + CHUNK, seen)
        m, l, acc = _over_keys(
            q, query, k_row, v_row, s_row, ks_ptr, vs_ptr, mask_d, scale, begin, end, lowest, seen, W, window, skw, svw,
            BR, BD, BN, INT8, False, STAGES, DTYPE,
        )  # fmt: skip
        if SEVERAL:  # noqa: SIM102 (one is known when compiled)
            # rare, so the loop above does not look for it; in narrow steps, which take no registers from that one
            if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) > 0:
                m, l, acc = _over_keys(
                    q, query, k_row, v_row, s_row, ks_ptr, vs_ptr, mask_d, scale, begin, end, lowest, seen, W, window,
                    skw, svw, BR, BD, 16, INT8, True, 1, DTYPE,
                )  # fmt: skip

        mask = in_rows[:, None] & mask_d
        H = KV * G
        out_at = out_ptr + ((b * T + t) * H + group)[:, None] * D + d[None, :]
        if active == 1:
            _store(acc, l, out_at, mask)
        else:
            place = (b * KV + head) * splits
            at = (place + split) * rows_all + row
            tl.store(acc_ptr + at[:, None] * D + d[None, :], acc, mask=mask)
            tl.store(stat_ptr + at * 2, m, mask=in_rows)
            tl.store(stat_ptr + at * 2 + 1, l, mask=in_rows)
            tl.debug_barrier()
            arrived = tl.atomic_add(lock_ptr + tl.program_id(0), 1, sem="acq_rel")
            if arrived == active - 1:
                m = tl.full((BR,), float("-inf"), tl.float32)
                l = tl.zeros((BR,), tl.float32)
                acc = tl.zeros((BR, BD), tl.float32)
                for i in range(active):
                    at = (place + i) * rows_all + row
                    m_part = tl.load(stat_ptr + at * 2, mask=in_rows, other=0, cache_modifier=".cg")
                    l_part = tl.load(stat_ptr + at * 2 + 1, mask=in_rows, other=0, cache_modifier=".cg")
                    part = tl.load(
                        acc_ptr + at[:, None] * D + d[None, :], mask=mask, other=0, cache_modifier=".cg"
                    )
                    m_new = tl.maximum(m, m_part)
                    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
                    alpha, beta = tl.exp2(m - shift), tl.exp2(m_part - shift)
                    l = l * alpha + l_part * beta
                    acc = acc * alpha[:, None] + part * beta[:, None]
                    m = m_new
                tl.store(lock_ptr + tl.program_id(0), 0)
                _store(acc, l, out_at, mask)


@triton.jit
def _over_keys(
    q, query, k_row, v_row, s_row, ks_ptr, vs_ptr, mask_d, scale, begin, end, lowest, seen, W, window, skw, svw,
    BR: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, INT8: tl.constexpr, CAREFUL: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Positions begin .. end - 1: largest score, sum of weights, and weighted sum of the values.

    CAREFUL: a value that is not finite makes those queries nan that see its key, and no other: zero times nan is nan.
    """
    m = tl.full((BR,), float("-inf"), tl.float32)
    l = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, BD), tl.float32)
    for p0 in tl.range(begin, end, BN, num_stages=STAGES):
        p = p0 + tl.arange(0, BN)
        held = (p >= lowest) & (p < seen)
        slot = (p % W).to(tl.int64)
        load = held[:, None] & mask_d
        k = tl.load(k_row + slot[:, None] * skw, mask=load, other=0)
        s = tl.dot(q, tl.trans(k.to(DTYPE)), input_precision="ieee") * scale
        if INT8:
            # the codes are exact in the dtype of q; the scale of a key goes to its scores
            s *= tl.load(ks_ptr + s_row + slot, mask=held, other=0)[None, :]
        keep = held[None, :] & (p[None, :] <= query[:, None]) & (p[None, :] > (query - window)[:, None])
        s = tl.where(keep, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # a row that has seen no key yet: any finite number keeps -inf - m from being nan
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(m - shift)
        v = tl.load(v_row + slot[:, None] * svw, mask=load, other=0)
        if INT8:
            v = v.to(tl.float32) * tl.load(vs_ptr + s_row + slot, mask=held, other=0)[:, None]
        if CAREFUL:
            number = v.to(tl.float32)
            broken = tl.max((number - number != 0).to(tl.int32), 1) > 0
            v = tl.where(broken[:, None], 0, v)
            weight = tl.where(keep & broken[None, :], float("nan"), weight)
        l = l * alpha + tl.sum(weight, 1)
        acc = tl.dot(weight.to(DTYPE), v.to(DTYPE), acc * alpha[:, None], input_precision="ieee")
        m = m_new
    return m, l, acc


@triton.jit
def _store(acc, l, at, mask):
    """acc / l, and zeros where no key was visible; l is nan where something was."""
    out = acc / tl.where(l == 0, 1.0, l)[:, None]
    tl.store(at, out.to(at.dtype.element_ty), mask=mask)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    start: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """q [B, T, H, D] over a ring [B, KV, W, D]; see decode_reference.py."""
    batch, queries, heads, width = q.shape
    groups, slots = keys.shape[1], keys.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q = q if q.stride(3) == 1 else q.contiguous()
    span = slots if window is None else min(window, slots)
    rows = queries * heads // groups
    tile = tuning_decode.rows_of(rows, q.element_size())
    config = tuning_decode.decode_config(width, q.element_size(), tile)
    splits = tuning_decode.splits_of(span, queries)
    programs = batch * groups * triton.cdiv(rows, tile)
    parts = batch * groups * splits * rows
    sums = torch.empty(parts * width, dtype=torch.float32, device=q.device)
    stats = torch.empty(parts * 2, dtype=torch.float32, device=q.device)
    scales = (0, 0) if key_scales is None else key_scales.stride()[:2]
    decode_kernel[(programs, splits)](
        q, keys, values, key_scales, value_scales, seen, start, out, sums, stats, counters(q.device, programs),
        scale * 1.4426950408889634, queries, groups, slots,
        # the ring holds nothing that is farther away
        slots if window is None else window,
        q.stride(0), q.stride(1), q.stride(2), *keys.stride()[:3], *values.stride()[:3], *scales,
        G=heads // groups, D=width, BD=max(16, triton.next_power_of_2(width)), BR=tile, BN=config.bn,
        CHUNK=tuning_decode.chunk_of(span), INT8=key_scales is not None, START=start is not None,
        SEVERAL=queries > 1, STAGES=config.stages, DTYPE=DTYPES[q.dtype], num_warps=config.warps,
    )  # fmt: skip
    return out
