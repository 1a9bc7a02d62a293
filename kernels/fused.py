"""RMSNorm with its residual, SwiGLU, and RoPE with the write into the ring cache: one launch each.

All arithmetic is fp32, rounded to the dtype of the inputs where transformers' eager code rounds, so that the results
are those of the model as it is without the kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning_decode
from .launch import DTYPES


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, D, eps, sx, sr,
    BLOCK: tl.constexpr, ONE: tl.constexpr, ADD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A row a program; ONE: the row fits the block and is read once. ADD: x + residual is normed, and stored."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    h = tl.zeros((BLOCK,), tl.float32)
    for c0 in range(0, D, BLOCK):
        at = c0 + column
        h = _sum(x_ptr + row * sx + at, residual_ptr + row * sr + at, at < D, ADD, DTYPE)
        if ADD:
            tl.store(sum_ptr + row * D + at, h.to(DTYPE), mask=at < D)
        squares += h * h
    root = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    for c0 in range(0, D, BLOCK):
        at = c0 + column
        if not ONE:
            h = _sum(x_ptr + row * sx + at, residual_ptr + row * sr + at, at < D, ADD, DTYPE)
        weight = tl.load(weight_ptr + at, mask=at < D, other=0).to(tl.float32)
        normed = (h * root).to(DTYPE).to(tl.float32)
        tl.store(out_ptr + row * D + at, (weight * normed).to(out_ptr.dtype.element_ty), mask=at < D)


@triton.jit
def _sum(x_at, residual_at, mask, ADD: tl.constexpr, DTYPE: tl.constexpr):
    x = tl.load(x_at, mask=mask, other=0).to(tl.float32)
    if ADD:
        x = (x + tl.load(residual_at, mask=mask, other=0).to(tl.float32)).to(DTYPE).to(tl.float32)
    return x


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, D, sg, su, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Grid (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * sg + column, mask=column < D, other=0).to(tl.float32)
    up = tl.load(up_ptr + row * su + column, mask=column < D, other=0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    tl.store(out_ptr + row * D + column, (silu * up).to(DTYPE), mask=column < D)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, position_ptr, keys_ptr, values_ptr, ks_ptr, vs_ptr, qo_ptr, ko_ptr,
    T, H, KV, W, sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, scb, sct,
    sKb, sKh, sKw, sVb, sVh, sVw, ssb, ssh,
    D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr,
    EACH: tl.constexpr, INT8: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (B * T, blocks of query, key and value heads). BD: half of D, rounded up. EACH: positions are [B, T]."""
    token = tl.program_id(0)
    b = (token // T).to(tl.int64)
    t = (token % T).to(tl.int64)
    blocks_q = tl.cdiv(H, BH)
    blocks_k = tl.cdiv(KV, BH)
    part = tl.program_id(1)
    d = tl.arange(0, BD)[None, :]
    half = D // 2
    in_half = d < half
    if part < blocks_q:
        head = part * BH + tl.arange(0, BH)[:, None]
        mask = (head < H) & in_half
        low, high = _load(q_ptr + b * sqb + t * sqt + head.to(tl.int64) * sqh + d, mask, half)
        low, high = _turn(low, high, cos_ptr, sin_ptr, b * scb + t * sct + d, in_half, half, DTYPE)
        out_at = qo_ptr + (token.to(tl.int64) * H + head) * D + d
        tl.store(out_at, low.to(DTYPE), mask=mask)
        tl.store(out_at + half, high.to(DTYPE), mask=mask)
    else:
        if EACH:
            p = tl.load(position_ptr + token).to(tl.int64)
            newest = p
            for t0 in range(0, T, BT):
                step = t0 + tl.arange(0, BT)
                row = tl.load(position_ptr + b * T + step, mask=step < T, other=-1).to(tl.int64)
                newest = tl.maximum(newest, tl.max(row, 0))
        else:
            first = tl.load(position_ptr + b).to(tl.int64)
            p = tl.where(first < 0, -1, first + t)
            newest = first + T - 1
        # of positions that share a slot only the newest can be in the ring; a negative one is padding
        write = (p >= 0) & (p > newest - W)
        slot = tl.maximum(p, 0) % W
        if part < blocks_q + blocks_k:
            head = (part - blocks_q) * BH + tl.arange(0, BH)[:, None]
            mask = (head < KV) & in_half
            low, high = _load(k_ptr + b * skb + t * skt + head.to(tl.int64) * skh + d, mask, half)
            low, high = _turn(low, high, cos_ptr, sin_ptr, b * scb + t * sct + d, in_half, half, DTYPE)
            out_at = ko_ptr + (token.to(tl.int64) * KV + head) * D + d
            tl.store(out_at, low.to(DTYPE), mask=mask)
            tl.store(out_at + half, high.to(DTYPE), mask=mask)
            ring_at = keys_ptr + b * sKb + head.to(tl.int64) * sKh + slot * sKw + d
            scale_at = ks_ptr + b * ssb + head.to(tl.int64) * ssh + slot
            _write(low, high, ring_at, scale_at, mask & write, (head < KV) & write, half, INT8)
        else:
            head = (part - blocks_q - blocks_k) * BH + tl.arange(0, BH)[:, None]
            mask = (head < KV) & in_half
            low, high = _load(v_ptr + b * svb + t * svt + head.to(tl.int64) * svh + d, mask, half)
            ring_at = values_ptr + b * sVb + head.to(tl.int64) * sVh + slot * sVw + d
            scale_at = vs_ptr + b * ssb + head.to(tl.int64) * ssh + slot
            _write(low, high, ring_at, scale_at, mask & write, (head < KV) & write, half, INT8)


@triton.jit
def _load(at, mask, half):
    low = tl.load(at, mask=mask, other=0).to(tl.float32)
    return low, tl.load(at + half, mask=mask, other=0).to(tl.float32)


@triton.jit
def _turn(low, high, cos_ptr, sin_ptr, at, in_half, half, DTYPE: tl.constexpr):
    """x * cos + rotate_half(x) * sin, each product and the sum rounded as eager code does."""
    cos_low, cos_high = _load(cos_ptr + at, in_half, half)
    sin_low, sin_high = _load(sin_ptr + at, in_half, half)
    a = (low * cos_low).to(DTYPE).to(tl.float32) - (high * sin_low).to(DTYPE).to(tl.float32)
    c = (high * cos_high).to(DTYPE).to(tl.float32) + (low * sin_high).to(DTYPE).to(tl.float32)
    return a.to(DTYPE).to(tl.float32), c.to(DTYPE).to(tl.float32)


@triton.jit
def _write(low, high, ring_at, scale_at, mask, mask_scale, half, INT8: tl.constexpr):
    """Two halves of heads [BH, BD] into the ring, as they are or as int8 codes with a scale a head."""
    if INT8:
        size = tl.maximum(tl.abs(low), tl.abs(high))
        absmax = tl.max(size, 1)[:, None]
        # a maximum may pass over nan, which must not come back as a number
        broken = tl.max(((low != low) | (high != high)).to(tl.int32), 1)[:, None] > 0
        top = tl.full(absmax.shape, 127.0, tl.float32)
        tiny = absmax < 7.52316384526264e-37
        inverse = tl.where(tiny, 0.0, tl.div_rn(top, tl.where(tiny, 1.0, absmax)))
        scale = tl.where(tiny, 0.0, tl.div_rn(absmax, top))
        tl.store(scale_at, tl.where(broken, float("nan"), scale), mask=mask_scale)
        # adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even
        low = (low * inverse + 12582912.0) - 12582912.0
        high = (high * inverse + 12582912.0) - 12582912.0
    tl.store(ring_at, low.to(ring_at.dtype.element_ty), mask=mask)
    tl.store(ring_at + half, high.to(ring_at.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> Tensor:
    """[..., D] as rows [M, D] whose elements lie side by side; a copy only where the strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., D] (+ residual) normed, and the sum (an empty tensor where there is no residual)."""
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.result_type(x, weight), device=x.device)
    total = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out, total
    rows = _rows(x)
    other = rows if residual is None else _rows(residual)
    block = min(triton.next_power_of_2(width), tuning_decode.NORM_BLOCK)
    rms_norm_kernel[(rows.shape[0],)](
        rows, other, weight.contiguous(), out, total, width, eps, rows.stride(0), other.stride(0),
        BLOCK=block, ONE=width <= block, ADD=residual is not None, DTYPE=DTYPES[x.dtype],
        num_warps=tuning_decode.norm_warps(block),
    )  # fmt: skip
    return out, total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., I] -> [..., I]."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    a, b, block = _rows(gate), _rows(up), tuning_decode.SWIGLU_BLOCK
    swiglu_kernel[(a.shape[0], triton.cdiv(a.shape[1], block))](
        a, b, out, a.shape[1], a.stride(0), b.stride(0), BLOCK=block, DTYPE=DTYPES[gate.dtype], num_warps=4
    )
    return out


def rope_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D], k and v [B, T, KV, D] -> q and k rotated; k and v go into the rings."""
    batch, tokens, heads, width = q.shape
    groups = k.shape[2]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if q_out.numel() == 0:
        return q_out, k_out
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin = cos.contiguous(), sin.contiguous()
    half = max(1, triton.next_power_of_2(width // 2))
    block = max(1, min(16, tuning_decode.ROPE_BLOCK // half))
    scales = (0, 0) if key_scales is None else key_scales.stride()[:2]
    grid = (batch * tokens, triton.cdiv(heads, block) + 2 * triton.cdiv(groups, block))
    rope_kernel[grid](
        q, k, v, cos, sin, positions, keys, values,
        # a pointer is needed even where no scale is stored
        keys if key_scales is None else key_scales, values if value_scales is None else value_scales, q_out, k_out,
        tokens, heads, groups, keys.shape[2], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1),
        *keys.stride()[:3], *values.stride()[:3], *scales,
        D=width, BD=half, BH=block, BT=min(1024, triton.next_power_of_2(tokens)),
        EACH=positions.ndim == 2, INT8=key_scales is not None, DTYPE=DTYPES[q.dtype], num_warps=2,
    )  # fmt: skip
    return q_out, k_out
