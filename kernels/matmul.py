"""Dequant-matmul on one skeleton: y[M, N] = x[M, K] @ W[N, K]^T for 2- to 8-bit weights in the layout of
layout.py.

The operands are swapped: weights are the A operand of the matrix instruction, straight from registers, and
the tokens its narrow side, so 1 to 16 tokens cost the same. A program owns BN output channels and BM
tokens; splits of K meet in a workspace where the last one to arrive adds all in a fixed order, so the same
bits come out every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_asm import CODEBOOK_ASM, INT4_BF16, INT4_FP16, INT8_BF16, INT8_FP16

NF4_FP16 = tl.constexpr(CODEBOOK_ASM["nf4", "fp16"])
NF4_BF16 = tl.constexpr(CODEBOOK_ASM["nf4", "bf16"])
FP4_FP16 = tl.constexpr(CODEBOOK_ASM["fp4", "fp16"])
FP4_BF16 = tl.constexpr(CODEBOOK_ASM["fp4", "bf16"])
_INT4_FP16 = tl.constexpr(INT4_FP16)
_INT4_BF16 = tl.constexpr(INT4_BF16)
_INT8_FP16 = tl.constexpr(INT8_FP16)
_INT8_BF16 = tl.constexpr(INT8_BF16)
_PAIRS = tl.constexpr("=r,=r,=r,=r,r")
_QUADS = tl.constexpr("=r,=r,r")


@triton.jit
def _plane(w_ptr, tile, mask, BITS: tl.constexpr, NB: tl.constexpr, KB: tl.constexpr):
    """Codes of one plane, int32 [NB, KB, 32 lanes, 32], in stored order."""
    words = w_ptr.to(tl.pointer_type(tl.int32))
    word = tile[:, :, None] * (32 * BITS) + tl.arange(0, 32 * BITS)[None, None, :]
    w = tl.load(words + word, mask=mask[:, :, None], other=0)
    w = tl.reshape(w, (NB, KB, 32, BITS, 1))
    shift = tl.arange(0, 32 // BITS) * BITS
    w = (w >> shift[None, None, None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(w, (NB, KB, 32, 32))


@triton.jit
def _decode(
    w_ptr, plane_bytes, book_ptr, tile, mask,
    FORMAT: tl.constexpr, NB: tl.constexpr, KB: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Tiles int64 [NB, KB] -> [NB*16, KB*64] values: code - 2^(b-1) for integers, codebook values for nf4
    and fp4."""
    if ASM and (FORMAT == "int4" or FORMAT == "nf4" or FORMAT == "fp4"):
        at = w_ptr + tile[:, :, None] * 512 + tl.arange(0, 512)[None, None, :]
        b = tl.load(at, mask=mask[:, :, None], other=0)
        # four bytes at a time; the first result holds o = 0, the second o = 1, their elements (bhi, blo)
        if FORMAT == "int4":
            if DTYPE == tl.float16:  # noqa: SIM300
                lo, hi = tl.inline_asm_elementwise(
                    _INT4_FP16, _PAIRS, [b], (tl.float16, tl.float16), is_pure=True, pack=4
                )
            else:
                lo, hi = tl.inline_asm_elementwise(
                    _INT4_BF16, _PAIRS, [b], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
                )
        elif FORMAT == "nf4":
            if DTYPE == tl.float16:  # noqa: SIM300
                lo, hi = tl.inline_asm_elementwise(
                    NF4_FP16, _PAIRS, [b], (tl.float16, tl.float16), is_pure=True, pack=4
                )
            else:
                lo, hi = tl.inline_asm_elementwise(
                    NF4_BF16, _PAIRS, [b], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
                )
        else:
            if DTYPE == tl.float16:  # noqa: SIM300
                lo, hi = tl.inline_asm_elementwise(
                    FP4_FP16, _PAIRS, [b], (tl.float16, tl.float16), is_pure=True, pack=4
                )
            else:
                lo, hi = tl.inline_asm_elementwise(
                    FP4_BF16, _PAIRS, [b], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
                )
        w = tl.reshape(tl.join(lo, hi), (NB, KB, 8, 4, 4, 2, 2, 2))
        w = tl.permute(w, (0, 5, 2, 1, 4, 7, 3, 6))
    else:
        if ASM and FORMAT == "int8":
            at = w_ptr + tile[:, :, None] * 1024 + tl.arange(0, 1024)[None, None, :]
            b = tl.load(at, mask=mask[:, :, None], other=0)
            if DTYPE == tl.float16:  # noqa: SIM300
                v = tl.inline_asm_elementwise(_INT8_FP16, _QUADS, [b], tl.float16, is_pure=True, pack=4)
            else:
                v = tl.inline_asm_elementwise(_INT8_BF16, _QUADS, [b], tl.bfloat16, is_pure=True, pack=4)
        elif FORMAT == "int8":
            v = (_plane(w_ptr, tile, mask, 8, NB, KB) - 128).to(tl.float32).to(DTYPE)
        elif FORMAT == "int3":
            low = _plane(w_ptr, tile, mask, 2, NB, KB)
            v = (low + 4 * _plane(w_ptr + plane_bytes, tile, mask, 1, NB, KB) - 4).to(tl.float32).to(DTYPE)
        elif FORMAT == "int2":
            v = (_plane(w_ptr, tile, mask, 2, NB, KB) - 2).to(tl.float32).to(DTYPE)
        elif FORMAT == "int4":
            v = (_plane(w_ptr, tile, mask, 4, NB, KB) - 8).to(tl.float32).to(DTYPE)
        else:
            v = tl.load(book_ptr + _plane(w_ptr, tile, mask, 4, NB, KB)).to(DTYPE)
        if FORMAT == "int4":
            w = tl.reshape(v, (NB, KB, 8, 4, 4, 2, 2, 2))  # g, c, ks, blo, o, bhi
            w = tl.permute(w, (0, 7, 2, 1, 4, 6, 3, 5))
        else:
            w = tl.reshape(v, (NB, KB, 8, 4, 4, 2, 2, 2))  # g, c, ks, o, bhi, blo
            w = tl.permute(w, (0, 6, 2, 1, 4, 5, 3, 7))
    return tl.reshape(w, (NB * 16, KB * 64))


@triton.jit
def _scales(s_ptr, absmax_ptr, offset_ptr, map_ptr, row, group, mask, N, G, DOUBLE: tl.constexpr):
    """fp32 scales of rows at groups (they broadcast), double quantization undone."""
    at = group.to(tl.int64) * N + row
    s = tl.load(s_ptr + at, mask=mask, other=0)
    if DOUBLE:
        block = (row.to(tl.int64) * G + group) // 256
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
        return tl.load(map_ptr + s.to(tl.int32)) * absmax + tl.load(offset_ptr)
    return s.to(tl.float32)


@triton.jit
def accumulate(
    x_ptr, w_ptr, s_ptr, z_ptr, absmax_ptr, offset_ptr, map_ptr, book_ptr, tile_n, rows, in_rows, columns,
    in_columns, pid_k, N, K, G, sxm, sxk, plane_bytes,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, DOUBLE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Split ``pid_k`` of the sums, fp32 [BN, BM]: BN rows of the weight by BM tokens. ``tile_n`` [BN / 16] are the
    tiles of ``rows``, which need not be neighbours; see :func:`matmul_kernel` for the rest."""
    KB: tl.constexpr = BK // 64
    tiles_n = tl.cdiv(N, 16)
    tiles_k = tl.cdiv(K, 64)
    x_row = x_ptr + columns.to(tl.int64)[None, :] * sxm
    acc = tl.zeros((BN, BM), tl.float32)
    sums = tl.zeros((BN, BM), tl.float32)
    steps = tl.cdiv(tl.cdiv(K, BK), SPLIT)
    first = pid_k * steps * BK
    last = tl.minimum(K, first + steps * BK)
    for k0 in tl.range(first, last, BK, num_stages=STAGES):
        ks = k0 + tl.arange(0, BK)
        tile_k = k0 // 64 + tl.arange(0, KB)
        tile = tile_n.to(tl.int64)[:, None] * tiles_k + tile_k[None, :]
        if EVEN:
            x = tl.load(x_row + ks.to(tl.int64)[:, None] * sxk, mask=in_columns[None, :], other=0)
            w_mask = tile >= 0
        else:
            x = tl.load(
                x_row + ks.to(tl.int64)[:, None] * sxk, mask=in_columns[None, :] & (ks < K)[:, None], other=0
            )
            w_mask = (tile_n < tiles_n)[:, None] & (tile_k < tiles_k)[None, :]
        w = _decode(w_ptr, plane_bytes, book_ptr, tile, w_mask, FORMAT, BN // 16, KB, DTYPE, ASM)
        x = x.to(DTYPE)
        if GROUP == 0:
            acc = tl.dot(w, x, acc, input_precision="ieee")
            if ZERO:
                sums = tl.dot(tl.full((BN, BK), 1.0, DTYPE), x, sums, input_precision="ieee")
        elif GROUP < 64:
            R: tl.constexpr = BK // GROUP
            group = k0 // GROUP + tl.arange(0, R)[None, :]
            s_mask = in_rows[:, None] & (group < G)
            s = _scales(s_ptr, absmax_ptr, offset_ptr, map_ptr, rows[:, None], group, s_mask, N, G, DOUBLE)
            w = tl.reshape(w, (BN, R, GROUP))
            if ZERO:
                z = tl.load(z_ptr + group.to(tl.int64) * N + rows[:, None], mask=s_mask, other=0)
                w = w - _centred(z, FORMAT).to(DTYPE)[:, :, None]
            w = tl.reshape(w * s.to(DTYPE)[:, :, None], (BN, BK))
            acc = tl.dot(w, x, acc, input_precision="ieee")
        else:
            # the scale is that of the whole block: on the sums it costs BM products a row, on the weights BK
            part = tl.dot(w, x, input_precision="ieee")
            group = k0 // GROUP
            if ZERO:
                z = tl.load(z_ptr + tl.cast(group, tl.int64) * N + rows, mask=in_rows, other=0)
                # sums of x as a product with ones: they come out in the accumulator's own layout
                ones = tl.dot(tl.full((BN, BK), 1.0, DTYPE), x, input_precision="ieee")
                part -= ones * _centred(z, FORMAT)[:, None]
            s = _scales(s_ptr, absmax_ptr, offset_ptr, map_ptr, rows, rows * 0 + group, in_rows, N, G, DOUBLE)
            acc += part * s[:, None]
    if GROUP == 0:
        s = _scales(s_ptr, absmax_ptr, offset_ptr, map_ptr, rows, rows * 0, in_rows, N, G, DOUBLE)
        if ZERO:
            acc -= sums * _centred(tl.load(z_ptr + rows, mask=in_rows, other=0), FORMAT)[:, None]
        acc = acc * s[:, None]
    return acc


@triton.jit
def meet(acc, work_ptr, lock_ptr, pid_k, BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr):
    """(the sums of all splits, whether this program is the one that goes on with them)."""
    if SPLIT == 1:
        total = acc
        last = True
    else:
        place = tl.program_id(0).to(tl.int64) * SPLIT
        inside = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(work_ptr + (place + pid_k) * (BN * BM) + inside, acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(lock_ptr + tl.program_id(0), 1, sem="acq_rel")
        last = arrived == SPLIT - 1
        total = tl.zeros((BN, BM), tl.float32)
        if last:
            for split in range(SPLIT):
                total += tl.load(work_ptr + (place + split) * (BN * BM) + inside, cache_modifier=".cg")
            tl.store(lock_ptr + tl.program_id(0), 0)
    return total, last


@triton.jit
def matmul_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, absmax_ptr, offset_ptr, map_ptr, book_ptr, bias_ptr, y_ptr, work_ptr,
    lock_ptr, M, N, K, G, sxm, sxk, plane_bytes,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, DOUBLE: tl.constexpr, BIAS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """GROUP is 0 for one scale a row, else a power of two below 64 or a multiple of BK. EVEN: BN divides N,
    BK K."""
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

    y_at = y_ptr + columns.to(tl.int64)[None, :] * N + rows[:, None]
    y_mask = in_columns[None, :] & in_rows[:, None]
    acc, last = meet(acc, work_ptr, lock_ptr, pid_k, BN, BM, SPLIT)
    if last:
        _store(acc, y_at, y_mask, bias_ptr, rows, in_rows, BIAS)


@triton.jit
def _centred(z, FORMAT: tl.constexpr):
    """Zero points relative to the middle code, which _decode has already subtracted."""
    if FORMAT == "int8":
        return z.to(tl.float32) - 128.0
    elif FORMAT == "int4":
        return z.to(tl.float32) - 8.0
    elif FORMAT == "int3":
        return z.to(tl.float32) - 4.0
    else:
        return z.to(tl.float32) - 2.0


@triton.jit
def _store(acc, at, mask, bias_ptr, rows, in_rows, BIAS: tl.constexpr):
    if BIAS:
        acc += tl.load(bias_ptr + rows, mask=in_rows, other=0).to(tl.float32)[:, None]
    tl.store(at, acc.to(at.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_kernel(
    w_ptr, s_ptr, z_ptr, absmax_ptr, offset_ptr, map_ptr, book_ptr, y_ptr, N, K, G, plane_bytes,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, DOUBLE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Tiles -> dense [N, K] of y's dtype; codes are decoded in DTYPE (exact, or rounded once for nf4 and
    fp4)."""
    NB: tl.constexpr = BN // 16
    KB: tl.constexpr = BK // 64
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    ks = tl.program_id(1) * BK + tl.arange(0, BK)
    tile_n = tl.program_id(0) * NB + tl.arange(0, NB)
    tile_k = tl.program_id(1) * KB + tl.arange(0, KB)
    tile = tile_n.to(tl.int64)[:, None] * tl.cdiv(K, 64) + tile_k[None, :]
    w_mask = (tile_n < tl.cdiv(N, 16))[:, None] & (tile_k < tl.cdiv(K, 64))[None, :]
    w = _decode(w_ptr, plane_bytes, book_ptr, tile, w_mask, FORMAT, NB, KB, DTYPE, ASM).to(tl.float32)
    mask = (rows < N)[:, None] & (ks < K)[None, :]
    if GROUP == 0:
        group = ks * 0
    else:
        group = ks // GROUP
    if ZERO:
        z = tl.load(z_ptr + group.to(tl.int64)[None, :] * N + rows[:, None], mask=mask, other=0)
        w = w - _centred(z, FORMAT)
    s = _scales(s_ptr, absmax_ptr, offset_ptr, map_ptr, rows[:, None], group[None, :], mask, N, G, DOUBLE)
    tl.store(
        y_ptr + rows.to(tl.int64)[:, None] * K + ks[None, :], (w * s).to(y_ptr.dtype.element_ty), mask=mask
    )
