"""Decode attention on a CPU: batched products straight on the slots of the ring, of which nothing is copied.

All rows go together over the slots that any of them uses. A slot that a row has not written takes weight zero, and zero
times what lies there is zero, unless that is not finite. So a nan in the result sends the rows through again, each over
its own slots alone; that is also the batch-invariant way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decode_reference import visible

# slots of int8 codes turned into floats at a time
_SLOTS = 1024
# keys and values [N, n, D] and their scales [N, n]
_Segment = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


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
    batch_invariant: bool,
) -> Tensor:
    """q [B, T, H, D] over a ring [B, KV, W, D] -> [B, T, H, D]; see decode_reference.py."""
    counts = [max(0, count) for count in seen.tolist()]
    firsts = [0] * len(counts) if start is None else [max(0, first) for first in start.tolist()]
    ring = (keys, values, key_scales, value_scales)
    if not batch_invariant:
        out = _together(q, ring, seen, start, counts, firsts, window, scale)
        for b, (count, first) in enumerate(zip(counts, firsts)):
            if count <= first:
                out[b] = 0
        if not torch.isnan(out.sum()):
            return out
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    queries, slots = q.shape[1], keys.shape[2]
    for b, (count, first) in enumerate(zip(counts, firsts)):
        row = tuple(None if t is None else t[b] for t in ring)
        _alone(out[b], q[b], row, count, first, window, scale)
        if queries > 1 and torch.isnan(out[b].sum()):
            # what lies before it was overwritten by the newest position, also for the queries before that
            held = max(first, count - slots)
            for t in range(queries):
                upto = count - queries + 1 + t
                out[b, t] = 0
                _alone(out[b, t : t + 1], q[b, t : t + 1], row, upto, held, window, scale)
    return out


def _together(q, ring, seen, start, counts, firsts, window, scale) -> Tensor:
    batch, queries, heads, width = q.shape
    groups, slots = ring[0].shape[1:3]
    used = max(1, min(slots, max(counts)))
    hidden: Tensor | None = None
    one = queries == 1 and not any(firsts)
    if not (one and all(c == used or c >= slots for c in counts) and (window is None or window >= used)):
        if one and max(counts) <= slots and (window is None or window >= used):
            hidden = (torch.arange(used) >= seen[:, None])[:, None, None, None]
        else:
            hidden = ~visible(seen, start, slots, queries, window)[:, None, :, None, :used]
    flat = tuple(None if t is None else t[:, :, :used].flatten(0, 1) for t in ring)
    # [B, T, KV, G, D] -> rows (t, g) of each KV head
    rows = q.view(batch, queries, groups, heads // groups, width).transpose(1, 2).flatten(2, 3)
    out = _attend(rows.flatten(0, 1), _pieces(flat, 0, used), hidden, (batch, groups, queries), scale)
    return out.view(batch, groups, queries, -1, width).transpose(1, 2).reshape(q.shape)


def _alone(out: Tensor, q: Tensor, ring, count: int, first: int, window: int | None, scale: float) -> None:
    """One row into out [T, H, D], over its own slots in the order of their positions."""
    queries, heads, width = q.shape
    groups, slots = ring[0].shape[:2]
    lowest = max(first, count - slots, 0)
    if window is not None:
        lowest = max(lowest, count - queries + 1 - window)
    if lowest >= count:
        return
    begin, length = lowest % slots, count - lowest
    segments = _pieces(ring, begin, min(begin + length, slots))
    segments += _pieces(ring, 0, max(0, begin + length - slots))
    position = torch.arange(lowest, count)
    query = torch.arange(count - queries, count)[:, None]
    hidden = position > query
    if window is not None:
        hidden |= position <= query - window
    rows = q.view(queries, groups, heads // groups, width).transpose(0, 1).flatten(1, 2)
    found = _attend(rows, segments, hidden[None, None, :, None], (1, groups, queries), scale)
    found = found.view(groups, queries, -1, width).transpose(0, 1).reshape(q.shape)
    # a query that stands before the first key
    out.copy_(found.masked_fill(hidden.all(-1)[:, None, None], 0))


def _pieces(ring, begin: int, end: int) -> list[_Segment]:
    """Slots begin .. end - 1 of a ring [N, W, D]: one piece, or with codes several, as views."""
    step = max(1, end - begin) if ring[2] is None else _SLOTS
    cuts = [(c, min(c + step, end)) for c in range(begin, end, step)]
    return [tuple(None if t is None else t[:, a:b] for t in ring) for a, b in cuts]  # type: ignore[misc]


def _attend(q: Tensor, segments: list[_Segment], hidden: Tensor | None, grid, scale: float) -> Tensor:
    """q [N, R, D], N = B * KV, R = T * G; hidden [B, 1, T, 1, n], True where a query sees no key -> [N, R, D]."""
    # codes are multiplied in fp32, floats in their own dtype as eager code does
    work = q if segments[0][2] is None or q.dtype == torch.float64 else q.float()
    scores = []
    for k, _, k_scale, _ in segments:
        part = torch.baddbmm(work.new_empty(1), work, k.to(work.dtype).transpose(1, 2), beta=0, alpha=scale)
        scores.append(part if k_scale is None else part * k_scale[:, None])
    s = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    if hidden is not None:
        s.view(*grid, -1, s.shape[-1]).masked_fill_(hidden, float("-inf"))
    soft = torch.softmax(s, dim=-1, dtype=torch.float64 if s.dtype == torch.float64 else torch.float32)
    out: Tensor | None = None
    done = 0
    for _, v, _, v_scale in segments:
        weights = soft[..., done : done + v.shape[1]]
        done += v.shape[1]
        weights = weights.to(work.dtype) if v_scale is None else weights * v_scale[:, None].to(work.dtype)
        if out is None:
            out = torch.bmm(weights, v.to(work.dtype))
        else:
            out.baddbmm_(weights, v.to(work.dtype))
    assert out is not None
    return out.to(q.dtype)
