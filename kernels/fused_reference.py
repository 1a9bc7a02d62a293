"""The plain torch oracles of the fused ops, rounding where transformers' Mistral rounds; never imports triton."""

from __future__ import annotations

import torch
from torch import Tensor

# the smallest absmax whose reciprocal times 127 is a finite fp32 number; below it a token counts as zero
TINY = 2.0**-120


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D]: mean and root in fp32, rounded to x's dtype, then times the weight (as
    MistralRMSNorm)."""
    h = x if x.dtype == torch.float64 else x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients to x and to the weight, in fp32 (fp64 for fp64)."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    h, g = x.to(work), grad.to(work)
    root = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    normed = h * root
    inner = g * weight.to(work)
    dx = root * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    return dx, (g * normed).flatten(0, -2).sum(0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the first rounded before the product (Shazeer 2020, arXiv:2002.05202)."""
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to gate and up, rounded once."""
    work = torch.float64 if gate.dtype == torch.float64 else torch.float32
    g, a, b = grad.to(work), gate.to(work), up.to(work)
    s = torch.sigmoid(a)
    return (g * b * s * (1 + a * (1 - s))).to(gate.dtype), (g * a * s).to(up.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x [B, T, H, D] turned by cos and sin [B or 1, T, D]: element i with i + D/2 (Su et al. 2021,
    arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> int8 codes [..., D] and fp32 scales [...]: round(x * 127 / absmax), ties to even.

    What is not finite makes the scale so: it must not come back as a number.
    """
    absmax = x.abs().amax(dim=-1).float()
    # a division of tensors: torch computes number / tensor as a product with the reciprocal, one rounding more
    inverse = torch.where(absmax >= TINY, absmax.new_tensor(127.0) / absmax, 0.0)
    codes = (x.float() * inverse[..., None]).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
    return codes, torch.where(absmax < TINY, 0.0, absmax / 127.0)


def token_positions(positions: Tensor, tokens: int) -> Tensor:
    """int64 [B, T] of positions [B] (those of the first tokens; negative: none of the row) or [B, T]."""
    if positions.ndim == 2:
        return positions.long()
    first = positions.long()[:, None]
    steps = torch.arange(tokens, device=positions.device)
    return torch.where(first < 0, -1, first + steps)


def cache_write(
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """Put k and v [B, T, KV, D] into the rings [B, KV, W, D], position p into slot p % W.

    A negative position is not written, nor one that lies W or more behind the newest of its row.
    """
    slots = keys.shape[2]
    at = token_positions(positions, k.shape[1])
    kept = (at >= 0) & (at > at.amax(dim=1, keepdim=True) - slots)
    b, t = kept.nonzero(as_tuple=True)
    slot = at[b, t] % slots
    for states, ring, scales in ((k, keys, key_scales), (v, values, value_scales)):
        if scales is None:
            ring[b, :, slot] = states[b, t]
        else:
            codes, scale = quantize(states[b, t])
            ring[b, :, slot] = codes
            scales[b, :, slot] = scale
