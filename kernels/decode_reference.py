"""The plain torch oracle of decode attention over a ring cache; any device and dtype; never imports triton.

The ring of one layer holds position p in slot ``p % W``:

============  ==================  ============================================================================
keys, values  [B, KV, W, D]       in the dtype of the queries, or int8 codes
key_scales,   fp32 [B, KV, W]     with int8 codes only: one scale a token and head, ``value = code * scale``
value_scales
seen          int32/int64 [B]     positions each row has written, the queries' own included; 0: an empty row
start         int32/int64 [B]     the first position that counts (left padding lies before it); absent: 0
============  ==================  ============================================================================

The T queries of a row stand at positions seen - T .. seen - 1. A query at p sees the keys k with
``max(start, p - window + 1) <= k <= p`` that the ring still holds, those from seen - W on. One that sees no key gives
zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(seen: Tensor, start: Tensor | None, slots: int, queries: int, window: int | None) -> Tensor:
    """bool [B, T, W]: which slots each query sees."""
    newest = seen.long()[:, None] - 1
    slot = torch.arange(slots, device=seen.device)
    # what a slot holds is the newest position that is congruent to it
    position = (newest - (newest - slot) % slots)[:, None, :]
    query = (newest - torch.arange(queries - 1, -1, -1, device=seen.device))[:, :, None]
    first = 0 if start is None else start.long().clamp_min(0)[:, None, None]
    seen_by = (position >= first) & (position <= query)
    return seen_by if window is None else seen_by & (position > query - window)


def dequantize(codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A ring in ``dtype``, the product with the scales taken in fp32 (fp64 where asked for)."""
    if scales is None:
        return codes.to(dtype)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return (codes.to(work) * scales.to(work)[..., None]).to(dtype)


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
    """q [B, T, H, D] -> [B, T, H, D], the way eager code does it: scores in q's dtype, the softmax in fp32."""
    batch, queries, heads, width = q.shape
    groups, slots = keys.shape[1], keys.shape[2]
    mask = visible(seen, start, slots, queries, window)[:, None, None]
    k = dequantize(keys, key_scales, q.dtype)
    v = dequantize(values, value_scales, q.dtype)
    grouped = q.reshape(batch, queries, groups, heads // groups, width).permute(0, 2, 3, 1, 4)
    scores = (grouped @ k[:, :, None].transpose(-1, -2)) * scale
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = scores.to(work).masked_fill(~mask, float("-inf")).softmax(dim=-1)
    weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0).to(q.dtype)
    out = []
    for t in range(queries):
        # a slot that a query does not see may hold anything, nan too, and zero times nan is nan
        seen_by = v.masked_fill(~mask[:, :, 0, t, :, None], 0)
        out.append(weights[..., t, None, :] @ seen_by[:, :, None])
    return torch.cat(out, dim=3).permute(0, 3, 1, 2, 4).reshape(batch, queries, heads, width)
