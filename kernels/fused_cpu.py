"""The fused ops on a CPU, where an operator called costs more than what it does to one token: as few as possible."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D]: the reference to the bit; torch's own operator where nothing is rounded in between."""
    if x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    return fused_reference.rms_norm(x, weight, eps)


def rope_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D], k and v [B, T, KV, D] -> q and k rotated; k and v go into the rings."""
    q_out, k_out = _rotate(q, cos, sin), _rotate(k, cos, sin)
    tokens, slots = k.shape[1], keys.shape[2]
    first = positions[:, 0] if positions.ndim == 2 else positions
    same = (positions.ndim == 1 or tokens == 1) and bool((first == first[0]).all())
    if not same or key_scales is not None:
        fused_reference.cache_write(k_out, v, positions, keys, values, key_scales, value_scales)
    elif (position := int(first[0])) >= 0:
        # the same consecutive positions in every row: at most two spans of slots
        skipped = max(0, tokens - slots)
        slot = (position + skipped) % slots
        until_end = min(tokens - skipped, slots - slot)
        for states, ring in ((k_out, keys), (v, values)):
            kept = states[:, skipped:].transpose(1, 2)
            ring[:, :, slot : slot + until_end] = kept[:, :, :until_end]
            if until_end < tokens - skipped:
                ring[:, :, : tokens - skipped - until_end] = kept[:, :, until_end:]
    return q_out, k_out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the reference, to the bit; the turned half is made by the signs of sin, not of x."""
    half = x.shape[-1] // 2
    turned = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    return turned.mul_(signed[:, :, None]).add_(x * cos[:, :, None])
