"""int8 x int8 products with one scale a token and one an output channel (LLM.int8, arXiv:2208.07339)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_tokens_kernel(
    x_ptr, outlier_ptr, q_ptr, scale_ptr, K, sxm, sxk, BLOCK: tl.constexpr, OUTLIERS: tl.constexpr
):
    """Row of x -> q int8 = round(x * 127 / absmax), scale fp32 = absmax / 127; outlier columns count as 0."""
    row = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for k0 in range(0, K, BLOCK):
        at = (k0 + ks).to(tl.int64)
        x = tl.load(x_ptr + row * sxm + at * sxk, mask=at < K, other=0).to(tl.float32)
        if OUTLIERS:
            x = tl.where(tl.load(outlier_ptr + at, mask=at < K, other=0) != 0, 0.0, x)
        largest = tl.maximum(largest, tl.abs(x))
        broken = tl.maximum(broken, (x != x).to(tl.int32))
    absmax = tl.max(largest, 0)
    # a maximum may pass over nan, which must not come back as a number
    absmax = tl.where(tl.max(broken, 0) > 0, float("nan"), absmax)
    # rounded to nearest like the oracle's: the fast division would send a tie to the other integer
    top = tl.full((1,), 127.0, tl.float32)
    absmax = tl.full((1,), 0.0, tl.float32) + absmax
    # below 2^-120 the reciprocal times 127 may be no finite number: such a token counts as zero
    tiny = absmax < 7.52316384526264e-37
    inverse = tl.where(tiny, 0.0, tl.div_rn(top, tl.where(tiny, 1.0, absmax)))
    tl.store(scale_ptr + row + tl.arange(0, 1), tl.div_rn(absmax, top))
    for k0 in range(0, K, BLOCK):
        at = (k0 + ks).to(tl.int64)
        x = tl.load(x_ptr + row * sxm + at * sxk, mask=at < K, other=0).to(tl.float32)
        if OUTLIERS:
            x = tl.where(tl.load(outlier_ptr + at, mask=at < K, other=0) != 0, 0.0, x)
        # adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even
        q = (x * inverse + 12582912.0) - 12582912.0
        tl.store(q_ptr + row * K + at, q.to(tl.int8), mask=at < K)


@triton.jit
def int8_dynamic_kernel(
    x_ptr, q_ptr, xs_ptr, outlier_ptr, w_ptr, ws_ptr, bias_ptr, y_ptr, M, N, K, sxm, sxk,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    OUTLIERS: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """y = (q @ (w - 128)^T) * xs * ws, exact in int32; plus the outlier columns of x in DTYPE where a block
    has any."""
    blocks_m = tl.cdiv(M, BM)
    rows = (tl.program_id(0) // blocks_m) * BN + tl.arange(0, BN)
    columns = (tl.program_id(0) % blocks_m) * BM + tl.arange(0, BM)
    in_rows, in_columns = rows < N, columns < M
    acc = tl.zeros((BN, BM), tl.int32)
    kept = tl.zeros((BN, BM), tl.float32)
    w_row = w_ptr + rows.to(tl.int64)[:, None] * K
    q_row = q_ptr + columns.to(tl.int64)[None, :] * K
    x_row = x_ptr + columns.to(tl.int64)[None, :] * sxm
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        ks = k0 + tl.arange(0, BK)
        w = tl.load(w_row + ks[None, :], mask=in_rows[:, None] & (ks < K)[None, :], other=128)
        q = tl.load(q_row + ks[:, None], mask=in_columns[None, :] & (ks < K)[:, None], other=0)
        signed = (w ^ 128).to(tl.int8, bitcast=True)
        acc = tl.dot(signed, q, acc, out_dtype=tl.int32)
        if OUTLIERS:
            outlier = tl.load(outlier_ptr + ks, mask=ks < K, other=0) != 0
            if tl.max(outlier.to(tl.int32), 0) > 0:
                mask = in_columns[None, :] & outlier[:, None]
                x = tl.load(x_row + ks.to(tl.int64)[:, None] * sxk, mask=mask, other=0)
                kept = tl.dot(signed.to(DTYPE), x.to(DTYPE), kept, input_precision="ieee")
    ws = tl.load(ws_ptr + rows, mask=in_rows, other=0)
    xs = tl.load(xs_ptr + columns, mask=in_columns, other=0)
    y = (acc.to(tl.float32) * xs[None, :] + kept) * ws[:, None]
    if BIAS:
        y += tl.load(bias_ptr + rows, mask=in_rows, other=0).to(tl.float32)[:, None]
    at = y_ptr + columns.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])
