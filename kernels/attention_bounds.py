"""Which keys a query sees, as an interval: lo <= key < hi. Window, causality, padding on either side and packed
sequences all come down to it, so kernels know no other form.
"""

from __future__ import annotations

import torch
from torch import Tensor


def key_bounds(
    queries: int,
    keys: int,
    *,
    device: torch.device,
    window: int | None,
    causal: bool,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    offset: int | Tensor | None = None,
) -> Tensor:
    """int32 [B or 1, 2, S]: lo and hi of each of ``queries`` = S rows among ``keys`` = T keys.

    Never beyond 0 .. T, and hi >= lo; equal where a row sees no key. For the arguments see
    :func:`.attention_ops.sliding_attention`.
    """
    index = torch.arange(queries, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    if cu_seqlens is not None:
        ends_q = cu_seqlens.to(torch.int64)
        ends_k = ends_q if cu_seqlens_k is None else cu_seqlens_k.to(torch.int64)
        # the sequence of each query; those before the first or behind the last belong to none
        sequence = torch.searchsorted(ends_q, index, right=True) - 1
        inside = (sequence >= 0) & (sequence < ends_q.shape[0] - 1)
        sequence = sequence.clamp(0, max(ends_q.shape[0] - 2, 0))
        begin, end = ends_k[sequence], ends_k[(sequence + 1).clamp(max=ends_k.shape[0] - 1)]
        end = torch.where(inside, end, begin)
        position = end - (ends_q[(sequence + 1).clamp(max=ends_q.shape[0] - 1)] - index)
        position, begin, end = position[None], begin[None], end[None]
    else:
        shift = keys - queries if offset is None else offset
        position = index[None] + (shift.to(torch.int64)[:, None] if isinstance(shift, Tensor) else shift)
        begin = zero[None, None] if starts is None else starts.to(torch.int64)[:, None]
        end = zero[None, None] + keys if lengths is None else begin + lengths.to(torch.int64)[:, None]
    begin, end = begin.clamp(0, keys), end.clamp(0, keys)
    end = torch.maximum(begin, end)
    lo = position - window + 1 if window is not None else torch.zeros_like(position)
    hi = position + 1 if causal else torch.full_like(position, keys)
    lo, hi = torch.broadcast_tensors(lo.clamp(begin, end), hi.clamp(begin, end))
    return torch.stack((lo, torch.maximum(lo, hi)), dim=1).to(torch.int32)


def query_ranges(bounds: Tensor, keys: int, block_keys: int, block_queries: int) -> Tensor:
    """Turned around, for a gradient to the keys: which blocks of queries may see a block of keys.

    Args:
        bounds: int32 [B, 2, S], of any shape: an interval need not move on with its row.
        block_keys, block_queries: sizes of the blocks.
    Returns:
        int32 [B, ceil(keys / block_keys), 2]: the first block of queries, and the one behind the last.
    """
    lo, hi = bounds[:, 0], bounds[:, 1]
    empty = hi <= lo
    # monotone, so that they can be searched: the most any row so far sees, the least any row from here on sees
    most = torch.where(empty, 0, hi).cummax(1).values
    least = torch.where(empty, keys, lo).flip(1).cummin(1).values.flip(1)
    begin = torch.arange(0, keys, block_keys, device=bounds.device, dtype=torch.int32)
    begin = begin.expand(bounds.shape[0], -1).contiguous()
    end = (begin + block_keys).clamp(max=keys)
    first = torch.searchsorted(most.contiguous(), begin, right=True)
    last = torch.searchsorted(least.contiguous(), end, right=False)
    ranges = torch.stack((first // block_queries, -(-last // block_queries)), dim=-1)
    return torch.where((last > first)[..., None], ranges, 0).to(torch.int32)
