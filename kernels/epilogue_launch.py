"""Launches of the products with epilogues. Imported only when one is launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .epilogue_reference import SUM_BLOCK
from .launch import plan
from .matmul_epilogue import matmul_residual_kernel, matmul_rope_kernel, matmul_swiglu_kernel

Tensors = Sequence[Tensor | None]


def parts_of(width: int) -> int:
    """Room for the partial sums of a row's squares: a power of two."""
    return int(triton.next_power_of_2(triton.cdiv(width, SUM_BLOCK)))


def residual(
    x: Tensor, fmt: str, n: int, t: Tensors, stream: Tensor, norm: Tensor | None, batch_invariant: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] and the stream [M, N] -> h, and g and its sums (empty tensors where there is no norm)."""
    m = x.shape[0]
    h = torch.empty(m, n, dtype=x.dtype, device=x.device)
    shapes = ((0,), (0,)) if norm is None else ((m, n), (triton.cdiv(n, SUM_BLOCK), m))
    g = torch.empty(shapes[0], dtype=x.dtype, device=x.device)
    sums = torch.empty(shapes[1], dtype=torch.float32, device=x.device)
    if h.numel() == 0:
        return h, g, sums
    stream = stream if stream.stride(1) == 1 else stream.contiguous()
    how = plan(x, fmt, n, t, batch_invariant)
    matmul_residual_kernel[how.grid](
        x, *how.weight, how.work, how.locks, *how.sizes, stream, norm, h, g, sums, stream.stride(0),
        NORM=norm is not None, **how.options,
    )  # fmt: skip
    return h, g, sums


def swiglu(
    x: Tensor, fmt: str, n: int, t: Tensors, sums: Tensor | None, eps: float, batch_invariant: bool
) -> Tensor:
    """x [M, K] -> [M, N / 2]."""
    y = torch.empty(x.shape[0], n // 2, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    how = plan(x, fmt, n, t, batch_invariant)
    matmul_swiglu_kernel[how.grid](
        x, *how.weight, how.work, how.locks, *how.sizes, sums, y, eps,
        PARTS=0 if sums is None else parts_of(x.shape[1]), **how.options,
    )  # fmt: skip
    return y


def rope_cache_write(
    x: Tensor,
    fmt: str,
    n: int,
    t: Tensors,
    sums: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    batch_invariant: bool,
) -> Tensor:
    """x [B * T, K], cos and sin [B or 1, T, D] -> q [B * T, H, D]; k and v go into the rings."""
    m, tokens = x.shape[0], cos.shape[1]
    groups, slots, width = keys.shape[1:]
    heads = n // width - 2 * groups
    q = torch.empty(m, heads, width, dtype=x.dtype, device=x.device)
    if m == 0:
        return q
    cos, sin = cos.contiguous(), sin.contiguous()
    how = plan(x, fmt, n, t, batch_invariant)
    matmul_rope_kernel[how.grid](
        x, *how.weight, how.work, how.locks, *how.sizes, sums, cos, sin, positions, q, keys, values, eps,
        tokens, heads, groups, slots, 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1),
        *keys.stride()[:3], *values.stride()[:3],
        PARTS=0 if sums is None else parts_of(x.shape[1]), D=width, **how.options,
    )  # fmt: skip
    return q
