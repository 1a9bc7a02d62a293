"""The products of a decode step with what follows them in their epilogues: the residual, SwiGLU, RoPE with the write
into the ring. The main loop is that of matmul.py.

A norm is cut in two, so that no product has to wait for a whole row. The kernel that makes the stream h also stores
g = h * weight of the next norm, and the squares of h summed over every 64 channels. The next product takes g as it
comes and multiplies its sums by rsqrt(mean of h^2 + eps), which is the same for all channels of a token. The squares
are added in one order, without atomics, so the same bits come out every run.

g is as large as the stream, hundreds of times what a norm would give: fp16, which ends at 65504 and has few bits near
zero, is no dtype for it. bf16 and fp32 are; see model/fused_step.py, which decides.

SwiGLU needs gate and up of a channel, and RoPE the two halves of a head, in one program. The layout of the weights
knows nothing of it: half of a program's tiles are simply those that lie a fixed distance behind the other half.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .matmul import accumulate, meet

# channels whose squares are one partial sum: the fewest rows of a program
_SUM_BLOCK = tl.constexpr(64)


@triton.jit
def _squares(sums_ptr, columns, in_columns, M, K, PARTS: tl.constexpr):
    """The partial sums of squares of these tokens, [PARTS, BM]; asked for before the main loop, used behind it."""
    part = tl.arange(0, PARTS)
    mask = (part * _SUM_BLOCK < K)[:, None] & in_columns[None, :]
    return tl.load(sums_ptr + part.to(tl.int64)[:, None] * M + columns[None, :], mask=mask, other=0)


@triton.jit
def _halves(acc, BN: tl.constexpr, BM: tl.constexpr):
    """[BN, BM] -> its upper and its lower half."""
    return tl.split(tl.permute(tl.reshape(acc, (2, BN // 2, BM)), (1, 2, 0)))


@triton.jit
def matmul_residual_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, absmax_ptr, offset_ptr, map_ptr, book_ptr, work_ptr, lock_ptr,
    M, N, K, G, sxm, sxk, plane_bytes, residual_ptr, norm_ptr, h_ptr, g_ptr, sums_ptr, srm,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, DOUBLE: tl.constexpr, NORM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """h [M, N] = residual + x @ W^T, rounded once; NORM: also g [M, N] and sums fp32 [ceil(N / 64), M]."""
    NB: tl.constexpr = BN // 16
    blocks_m = tl.cdiv(M, BM)
    pid_m = tl.program_id(0) % blocks_m
    pid_n = tl.program_id(0) // blocks_m
    pid_k = tl.program_id(1)
    rows = pid_n * BN + tl.arange(0, BN)
    columns = pid_m * BM + tl.arange(0, BM)
    tile_n = pid_n * NB + tl.arange(0, NB)
    in_rows = rows < N
    in_columns = columns < M
    acc = accumulate(
        x_ptr, w_ptr, s_ptr, z_ptr, absmax_ptr, offset_ptr, map_ptr, book_ptr, tile_n, rows, in_rows, columns,
        in_columns, pid_k, N, K, G, sxm, sxk, plane_bytes, FORMAT, GROUP, ZERO, DOUBLE, BN, BK, BM, SPLIT, STAGES,
        EVEN, DTYPE, ASM,
    )  # fmt: skip
    acc, last = meet(acc, work_ptr, lock_ptr, pid_k, BN, BM, SPLIT)
    if last:
        mask = in_columns[None, :] & in_rows[:, None]
        token = columns.to(tl.int64)[None, :]
        at = token * N + rows[:, None]
        residual = tl.load(residual_ptr + token * srm + rows[:, None], mask=mask, other=0).to(tl.float32)
        h = (acc + residual).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at, h, mask=mask)
        if NORM:
            PARTS: tl.constexpr = BN // _SUM_BLOCK
            h = h.to(tl.float32)
            weight = tl.load(norm_ptr + rows, mask=in_rows, other=0).to(tl.float32)
            tl.store(g_ptr + at, (h * weight[:, None]).to(g_ptr.dtype.element_ty), mask=mask)
            squares = tl.where(mask, h * h, 0.0)
            squares = tl.sum(tl.reshape(squares, (PARTS, _SUM_BLOCK, BM)), 1)
            part = pid_n * PARTS + tl.arange(0, PARTS)
            kept = (part * _SUM_BLOCK < N)[:, None] & in_columns[None, :]
            tl.store(sums_ptr + part.to(tl.int64)[:, None] * M + columns[None, :], squares, mask=kept)


@triton.jit
def matmul_swiglu_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, absmax_ptr, offset_ptr, map_ptr, book_ptr, work_ptr, lock_ptr,
    M, N, K, G, sxm, sxk, plane_bytes, sums_ptr, y_ptr, eps,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, DOUBLE: tl.constexpr, PARTS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y [M, N / 2] = silu(gate) * up, the gate in the first N / 2 rows of W, up in the others. PARTS: 0, or room for
    the partial sums of a norm."""
    BH: tl.constexpr = BN // 2
    TH: tl.constexpr = BN // 32
    width = N // 2
    blocks_m = tl.cdiv(M, BM)
    pid_m = tl.program_id(0) % blocks_m
    pid_n = tl.program_id(0) // blocks_m
    pid_k = tl.program_id(1)
    row, tile = tl.arange(0, BN), tl.arange(0, BN // 16)
    # sixteen neighbours at a time, which the compiler cannot see by itself
    rows = pid_n * BH + tl.where(row < BH, row, row - BH + width)
    rows = tl.max_contiguous(tl.multiple_of(rows, 16), 16)
    tile_n = pid_n * TH + tl.where(tile < TH, tile, tile - TH + width // 16)
    columns = pid_m * BM + tl.arange(0, BM)
    in_columns = columns < M
    if PARTS > 0:
        squares = _squares(sums_ptr, columns, in_columns, M, K, PARTS)
    acc = accumulate(
        x_ptr, w_ptr, s_ptr, z_ptr, absmax_ptr, offset_ptr, map_ptr, book_ptr, tile_n, rows, rows < N, columns,
        in_columns, pid_k, N, K, G, sxm, sxk, plane_bytes, FORMAT, GROUP, ZERO, DOUBLE, BN, BK, BM, SPLIT, STAGES,
        EVEN, DTYPE, ASM,
    )  # fmt: skip
    acc, last = meet(acc, work_ptr, lock_ptr, pid_k, BN, BM, SPLIT)
    if last:
        if PARTS > 0:
            acc *= tl.rsqrt(tl.sum(squares, 0) / K + eps)[None, :]
        gate, up = _halves(acc, BN, BM)
        channel = pid_n * BH + tl.arange(0, BH)
        mask = (channel < width)[:, None] & in_columns[None, :]
        at = y_ptr + columns.to(tl.int64)[None, :] * width + channel[:, None]
        tl.store(at, (gate / (1.0 + tl.exp(-gate)) * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def matmul_rope_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, absmax_ptr, offset_ptr, map_ptr, book_ptr, work_ptr, lock_ptr,
    M, N, K, G, sxm, sxk, plane_bytes, sums_ptr, cos_ptr, sin_ptr, position_ptr, q_ptr, keys_ptr, values_ptr, eps,
    T, H, KV, W, scb, sct, skb, skh, skw, svb, svh, svw,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, DOUBLE: tl.constexpr, PARTS: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """W holds H heads of queries, KV of keys and KV of values, D rows each, D a multiple of 32: q [M, H, D] rotated,
    k rotated and v into slot p % W of the rings. M is B * T; positions [B] are those of the first of T <= W tokens."""
    BH: tl.constexpr = BN // 2
    TH: tl.constexpr = BN // 32
    HALF: tl.constexpr = D // 2
    TILES: tl.constexpr = D // 32
    blocks_m = tl.cdiv(M, BM)
    pid_m = tl.program_id(0) % blocks_m
    pid_n = tl.program_id(0) // blocks_m
    pid_k = tl.program_id(1)
    row, tile = tl.arange(0, BN), tl.arange(0, BN // 16)
    pairs, tiles = pid_n * BH + row % BH, pid_n * TH + tile % TH
    rows = pairs // HALF * D + pairs % HALF + row // BH * HALF
    rows = tl.max_contiguous(tl.multiple_of(rows, 16), 16)
    tile_n = tiles // TILES * (2 * TILES) + tiles % TILES + tile // TH * TILES
    columns = pid_m * BM + tl.arange(0, BM)
    in_columns = columns < M
    if PARTS > 0:
        squares = _squares(sums_ptr, columns, in_columns, M, K, PARTS)
    acc = accumulate(
        x_ptr, w_ptr, s_ptr, z_ptr, absmax_ptr, offset_ptr, map_ptr, book_ptr, tile_n, rows, rows < N, columns,
        in_columns, pid_k, N, K, G, sxm, sxk, plane_bytes, FORMAT, GROUP, ZERO, DOUBLE, BN, BK, BM, SPLIT, STAGES,
        EVEN, DTYPE, ASM,
    )  # fmt: skip
    acc, last = meet(acc, work_ptr, lock_ptr, pid_k, BN, BM, SPLIT)
    if last:
        if PARTS > 0:
            acc *= tl.rsqrt(tl.sum(squares, 0) / K + eps)[None, :]
        low, high = _halves(acc, BN, BM)
        pair = pid_n * BH + tl.arange(0, BH)
        head = (pair // HALF)[:, None]
        d = (pair % HALF)[:, None]
        b, t = (columns // T).to(tl.int64), (columns % T).to(tl.int64)

        turns = (head < H + KV) & in_columns[None, :]
        angle = (b * scb + t * sct)[None, :] + d
        cos_low, cos_high = _pair(cos_ptr + angle, turns, HALF)
        sin_low, sin_high = _pair(sin_ptr + angle, turns, HALF)
        turned_low, turned_high = low * cos_low - high * sin_low, high * cos_high + low * sin_high
        low, high = tl.where(turns, turned_low, low), tl.where(turns, turned_high, high)

        q_at = q_ptr + (columns.to(tl.int64)[None, :] * H + head) * D + d
        _store(q_at, low, high, (head < H) & in_columns[None, :], HALF)
        first = tl.load(position_ptr + b, mask=in_columns, other=-1).to(tl.int64)
        # a row whose position is negative rests
        write = (first >= 0)[None, :]
        slot = (tl.maximum(first, 0) + t) % W
        key = (head - H).to(tl.int64)
        key_at = keys_ptr + (b * skb + slot * skw)[None, :] + key * skh + d
        _store(key_at, low, high, write & (head >= H) & (head < H + KV), HALF)
        value_at = values_ptr + (b * svb + slot * svw)[None, :] + (key - KV) * svh + d
        _store(value_at, low, high, write & (head >= H + KV) & (head < H + 2 * KV), HALF)


@triton.jit
def _pair(at, mask, HALF: tl.constexpr):
    low = tl.load(at, mask=mask, other=0).to(tl.float32)
    return low, tl.load(at + HALF, mask=mask, other=0).to(tl.float32)


@triton.jit
def _store(at, low, high, mask, HALF: tl.constexpr):
    tl.store(at, low.to(at.dtype.element_ty), mask=mask)
    tl.store(at + HALF, high.to(at.dtype.element_ty), mask=mask)
