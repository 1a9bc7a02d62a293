"""Attention block by block in plain torch, on any device: what a CPU runs, and what a GPU runs where the Triton
kernels do not go (float32 and float64).

A block of queries meets only the keys that some of its rows see, so the cost is S x W, and memory that of one
block of scores. Sums are taken in float32 (float64 for float64), so half precision loses less than in eager code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# elements of one block of scores, and the fewest queries of a block: each block reads its window's keys anew
_SCORES = 1 << 22
_QUERIES = 8


_Block = tuple[slice, slice, Tensor | None, Tensor | None]


def _blocks(bounds: Tensor, batch: int, heads: int) -> Iterator[_Block]:
    """(queries, keys, mask, hidden) of each block that sees anything.

    The mask [B, 1, queries, 1, keys] is None where all is seen; hidden [B, 1, keys, 1] are the keys that no query of
    their row sees, beside those of other rows or between those of packed sequences, None where there is no such:
    padding may hold anything, NaN too.
    """
    if not bounds.numel():
        return
    lo, hi = bounds[:, 0], bounds[:, 1]
    rows = lo.shape[1]
    widest = int((hi - lo).max())
    count = max(_QUERIES, _SCORES // max(batch * heads * (widest + _QUERIES), 1))
    starts = range(0, rows, count)
    # one trip to the device for all blocks, not one each
    limits = [
        torch.stack((low.min(), low.max(), high.min(), high.max()))
        for low, high in ((lo[:, s : s + count], hi[:, s : s + count]) for s in starts)
    ]
    for start, (first, last_lo, least_hi, last) in zip(starts, torch.stack(limits).tolist()):
        if last <= first:
            continue
        queries, keys = slice(start, min(start + count, rows)), slice(first, last)
        mask = hidden = None
        if last_lo > first or least_hi < last:
            key = torch.arange(first, last, device=bounds.device, dtype=bounds.dtype)
            seen = (key >= lo[:, queries, None]) & (key < hi[:, queries, None])
            mask = seen[:, None, :, None]
            unseen = ~seen.any(1)
            # asked on a CPU alone: a GPU would stall
            if not unseen.is_cpu or bool(unseen.any()):
                hidden = unseen[:, None, :, None]
        yield queries, keys, mask, hidden


def _wide(x: Tensor, part: slice, hidden: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [B, N, KV, D] -> [B, KV, part, D] in ``dtype``, hidden keys as zeros."""
    x = x[:, part].transpose(1, 2).to(dtype)
    return x if hidden is None else x.masked_fill(hidden, 0)


def _rows(x: Tensor, part: slice, kv: int, dtype: torch.dtype) -> Tensor:
    """x [B, S, H, D] -> [B, KV, part * G, D]: the G heads of a KV head are rows beside one another."""
    x = x[:, part].unflatten(2, (kv, -1)).permute(0, 2, 1, 3, 4)
    return x.to(dtype).flatten(2, 3)


def _unrows(x: Tensor, groups: int) -> Tensor:
    """Back: [B, KV, part * G, D] -> [B, part, H, D]."""
    return x.unflatten(2, (-1, groups)).permute(0, 2, 1, 3, 4).flatten(2, 3)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, groups: int, scale: float) -> Tensor:
    """[B, KV, queries * G, keys]."""
    scores = torch.matmul(q * scale, k.transpose(2, 3))
    if mask is not None:
        scores = scores.unflatten(2, (-1, groups)).masked_fill_(~mask, float("-inf")).flatten(2, 3)
    return scores


def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As :func:`.attention_reference.attention`, the keys given as bounds int32 [B or 1, 2, S]."""
    batch, _, heads, _ = q.shape
    kv = k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
    for queries, keys, mask, hidden in _blocks(bounds, batch, heads):
        keyed, valued = (_wide(x, keys, hidden, wide) for x in (k, v))
        scores = _scores(_rows(q, queries, kv, wide), keyed, mask, heads // kv, scale)
        top = torch.logsumexp(scores, dim=-1, keepdim=True)
        weights = scores.sub_(torch.where(top == float("-inf"), 0.0, top)).exp_()
        out[:, queries] = _unrows(torch.matmul(weights, valued), heads // kv).to(q.dtype)
        lse[:, queries] = _unrows(top, heads // kv)[..., 0]
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v; those to k and v are summed in the wide dtype and rounded once."""
    kv, heads = k.shape[2], q.shape[2]
    groups, wide = heads // kv, lse.dtype
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=wide, device=q.device)
    dv = torch.zeros(v.shape, dtype=wide, device=q.device)
    for queries, keys, mask, hidden in _blocks(bounds, q.shape[0], heads):
        rows = _rows(q, queries, kv, wide)
        keyed, valued = (_wide(x, keys, hidden, wide) for x in (k, v))
        top = _rows(lse[..., None], queries, kv, wide)
        weights = _scores(rows, keyed, mask, groups, scale)
        weights = weights.sub_(torch.where(top == float("-inf"), 0.0, top)).exp_()
        grad = _rows(dout, queries, kv, wide)
        mean = (_rows(out, queries, kv, wide) * grad).sum(-1, keepdim=True)
        if dlse is not None:
            mean = mean - _rows(dlse[..., None], queries, kv, wide)
        dscores = torch.matmul(grad, valued.transpose(2, 3)).sub_(mean).mul_(weights).mul_(scale)
        dq[:, queries] = _unrows(torch.matmul(dscores, keyed), groups).to(q.dtype)
        dk[:, keys] += torch.matmul(dscores.transpose(2, 3), rows).transpose(1, 2)
        dv[:, keys] += torch.matmul(weights.transpose(2, 3), grad).transpose(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
