"""The plain torch oracles of the products with epilogues, rounding where eager code does; never imports triton.

``sums`` fp32 (fp64 for fp64) [ceil(N / 64), M] are the squares of a stream h [M, N], summed over each 64 channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused_reference

SUM_BLOCK = 64


def square_sums(h: Tensor) -> Tensor:
    """h [M, N] -> [ceil(N / 64), M]."""
    wide = h if h.dtype == torch.float64 else h.float()
    squares = torch.nn.functional.pad(wide.square(), (0, -h.shape[1] % SUM_BLOCK))
    return squares.view(h.shape[0], squares.shape[1] // SUM_BLOCK, SUM_BLOCK).sum(-1).T.contiguous()


def product(x: Tensor, dense: Tensor, batch_invariant: bool) -> Tensor:
    """x [M, K] @ W^T; ``batch_invariant``: each row alone."""
    rows = x.split(1 if batch_invariant else max(1, x.shape[0]))
    return torch.cat([torch.nn.functional.linear(row, dense) for row in rows])


def rooted(y: Tensor, sums: Tensor | None, width: int, eps: float) -> Tensor:
    """y [M, N] times 1 / sqrt(mean of squares + eps) of each token, whose stream is ``width`` wide; without sums y."""
    if sums is None:
        return y
    root = torch.rsqrt(sums.T.contiguous().sum(-1) / width + eps)[:, None]
    return (y.to(root.dtype) * root).to(y.dtype)


def residual(y: Tensor, stream: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """h = stream + y; with a norm's weight [N] also h * weight and the sums of h, else empty tensors."""
    h = stream + y
    work = torch.float64 if h.dtype == torch.float64 else torch.float32
    if norm is None:
        return h, h.new_empty(0), h.new_empty(0, dtype=work)
    return h, (h.to(work) * norm.to(work)).to(h.dtype), square_sums(h)


def swiglu(y: Tensor) -> Tensor:
    """y [M, N], the gate, then up -> [M, N / 2]."""
    return fused_reference.swiglu(*y.chunk(2, dim=-1)).contiguous()


def rope_cache_write(
    y: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """y [B * T, N], the heads of queries, keys, values -> q [B * T, H, D], and the rings written."""
    tokens, groups, width = cos.shape[1], keys.shape[1], keys.shape[3]
    heads = y.view(positions.shape[0], tokens, -1, width)
    q, k, v = heads.split([heads.shape[2] - 2 * groups, groups, groups], dim=2)
    k = fused_reference.rotate(k, cos, sin)
    fused_reference.cache_write(k, v, positions, keys, values, None, None)
    return fused_reference.rotate(q, cos, sin).flatten(0, 1)
