"""Attention written out, in plain torch and any floating point dtype: the oracle of the kernels.

Every score of every pair is made, [B, H, S, T], so it is for small shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    batch: int,
    queries: int,
    keys: int,
    *,
    window: int | None,
    causal: bool,
    starts: list[int] | None = None,
    lengths: list[int] | None = None,
    cu_seqlens: list[int] | None = None,
    cu_seqlens_k: list[int] | None = None,
    offset: int | list[int] | None = None,
) -> Tensor:
    """Boolean [B, S, T], True where a query sees a key: the definition, one pair at a time.

    Slow and plain on purpose: what :func:`.attention_bounds.key_bounds` works out at once is held against it.
    """
    seen = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for s in range(queries):
            begin, end = 0, keys
            if cu_seqlens is not None:
                ends_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
                inside = [i for i in range(len(cu_seqlens) - 1) if cu_seqlens[i] <= s < cu_seqlens[i + 1]]
                if not inside:
                    continue
                begin, end = ends_k[inside[0]], ends_k[inside[0] + 1]
                position = end - (cu_seqlens[inside[0] + 1] - s)
            else:
                shift = keys - queries if offset is None else offset
                position = s + (shift[b] if isinstance(shift, list) else shift)
                begin = 0 if starts is None else starts[b]
                end = keys if lengths is None else begin + lengths[b]
            for t in range(begin, end):
                seen[b, s, t] = (not causal or t <= position) and (window is None or t > position - window)
    return seen


def visible_in(bounds: Tensor, keys: int) -> Tensor:
    """Boolean [B, S, T] of bounds int32 [B, 2, S]."""
    key = torch.arange(keys, device=bounds.device)
    return (key >= bounds[:, 0, :, None]) & (key < bounds[:, 1, :, None])


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v over the keys seen.

    Args:
        q: [B, S, H, D]; k, v: [B, T, KV, D], H a multiple of KV; seen: boolean [B or 1, S, T].
    Returns:
        [B, S, H, D] in q's dtype, 0 for a query that sees no key; log of the softmax's denominator [B, S, H],
        -inf for such a one, fp32 (fp64 for fp64 inputs). The softmax is taken in that dtype too.
    """
    k, v = _seen_by_some(k, seen), _seen_by_some(v, seen)
    weights, lse = _weights(q, k, seen, scale)
    groups = q.shape[2] // k.shape[2]
    out = torch.einsum("bhst,bthd->bshd", weights.to(v.dtype), v.repeat_interleave(groups, dim=2))
    return out, lse


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention` to q, k and v, worked out by hand (custom ops record none)."""
    k, v = _seen_by_some(k, seen), _seen_by_some(v, seen)
    groups = q.shape[2] // k.shape[2]
    weights, _ = _weights(q, k, seen, scale)
    dweights = torch.einsum("bshd,bthd->bhst", dout, v.repeat_interleave(groups, dim=2)).to(weights.dtype)
    mean = (weights * dweights).sum(-1, keepdim=True)
    if dlse is not None:
        mean = mean - dlse.transpose(1, 2)[..., None].to(mean.dtype)
    dscores = (weights * (dweights - mean) * scale).to(q.dtype)
    dq = torch.einsum("bhst,bthd->bshd", dscores, k.repeat_interleave(groups, dim=2))
    dk = torch.einsum("bhst,bshd->bthd", dscores, q)
    dv = torch.einsum("bhst,bshd->bthd", weights.to(v.dtype), dout)
    heads = (k.shape[2], groups)
    return dq, dk.unflatten(2, heads).sum(3), dv.unflatten(2, heads).sum(3)


def _seen_by_some(x: Tensor, seen: Tensor) -> Tensor:
    """x [B, T, KV, D] with zeros where no query looks: what padding holds may be NaN, and 0 * NaN is NaN."""
    return x.masked_fill(~seen.any(1)[..., None, None], 0)


def _weights(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Probabilities [B, H, S, T] and lse [B, S, H], fp32 or fp64."""
    groups = q.shape[2] // k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("bshd,bthd->bhst", q, k.repeat_interleave(groups, dim=2)).to(wide) * scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None])
    return weights, lse.transpose(1, 2)
