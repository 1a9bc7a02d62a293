"""Launches of the attention kernels: grids, configurations, workspaces. Imported only when one is launched."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from . import tuning_attention as tuning
from .attention import forward_kernel
from .attention_backward import dkdv_kernel, dq_kernel
from .attention_bounds import query_ranges
from .launch import DTYPES

_LOG2E = 1.4426950408889634


@lru_cache(maxsize=16)
def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def configs(q: Tensor) -> tuning.AttentionConfigs:
    """What tuning_attention.py has for this device, head_dim and dtype."""
    return tuning.configs(_arch(q.device), q.shape[-1], q.element_size())


def _shape(q: Tensor, k: Tensor, config: tuning.AttentionConfig) -> dict[str, Any]:
    """Compile-time arguments that follow from shapes."""
    groups, head_dim = q.shape[2] // k.shape[2], q.shape[3]
    if groups > config.bm:
        raise ValueError(
            f"impl='triton' takes up to {config.bm} query heads a KV head at head_dim {head_dim}, got {groups}: "
            "use impl='reference' or repeat the KV heads"
        )
    return {
        "G": groups,
        "D": head_dim,
        "DP": triton.next_power_of_2(head_dim),
        "BM": config.bm,
        "BN": config.bn,
        "DTYPE": DTYPES[q.dtype],
        "STAGES": config.stages,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _visibility(
    q: Tensor, k: Tensor, bounds: Tensor | None, window: int, causal: bool, offset: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """(window, offset) and the compile-time flags; a window that reaches over everything is none."""
    windowed = bounds is None and 0 < window < q.shape[1] + offset
    flags = {"CAUSAL": bounds is None and causal, "WINDOWED": windowed, "BOUNDED": bounds is not None}
    return (window if windowed else 0, offset if bounds is None else 0), flags


def _side_by_side(q: Tensor, k: Tensor, window: int) -> int:
    in_sight = min(k.shape[1], window) if window else k.shape[1]
    return tuning.heads_per_group(q.shape[0] * k.shape[2], in_sight, q.shape[3], q.element_size())


def _batch_stride(x: Tensor | None) -> int:
    """0 where one row of bounds serves the whole batch."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    window: int,
    causal: bool,
    offset: int,
    scale: float,
    config: tuning.AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, S, H, D], k and v [B, T, KV, D], the last stride 1 -> out like q, contiguous; lse fp32 [B, S, H].

    Args:
        bounds: contiguous int32 [B or 1, 2, S], in place of window, causal and offset; window 0: none.
    """
    batch, queries, heads, _ = q.shape
    keys, kv = k.shape[1], k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    config = config or configs(q).forward
    (window, offset), flags = _visibility(q, k, bounds, window, causal, offset)
    blocks = triton.cdiv(queries, config.bm // (heads // kv))
    shape = _shape(q, k, config)
    forward_kernel[(batch * kv * blocks,)](
        q, k, v, q if bounds is None else bounds, out, lse, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], _batch_stride(bounds), batch * kv, kv, queries, keys, window, offset,
        scale * _LOG2E, _side_by_side(q, k, window), **shape, **flags,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    window: int,
    causal: bool,
    offset: int,
    scale: float,
    config: tuning.AttentionConfigs | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, in the dtype of q; out and lse as the forward gave them, contiguous."""
    batch, queries, heads, _ = q.shape
    keys, kv = k.shape[1], k.shape[2]
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=q.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=q.device)
    delta = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    config = config or configs(q)
    (window, offset), flags = _visibility(q, k, bounds, window, causal, offset)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], _batch_stride(bounds))
    together = _side_by_side(q, k, window)
    seen = q if bounds is None else bounds
    blocks = triton.cdiv(queries, config.dq.bm // (heads // kv))
    shape = _shape(q, k, config.dq)
    dq_kernel[(batch * kv * blocks,)](
        q, k, v, seen, out, dout, lse, lse if dlse is None else dlse, delta, dq, *strides, batch * kv, kv,
        queries, keys, window, offset, scale, scale * _LOG2E, together, DLSE=dlse is not None, **shape, **flags,
    )  # fmt: skip
    shape = _shape(q, k, config.dkdv)
    ranges = seen
    if bounds is not None:
        ranges = query_ranges(bounds, keys, config.dkdv.bn, config.dkdv.bm // (heads // kv)).contiguous()
    dkdv_kernel[(batch * kv * triton.cdiv(keys, config.dkdv.bn),)](
        q, k, v, seen, ranges, dout, lse, delta, dk, dv, *strides,
        0 if bounds is None else _batch_stride(ranges), batch * kv, kv, queries, keys, window, offset, scale,
        scale * _LOG2E, together, **shape, **flags,
    )  # fmt: skip
    return dq, dk, dv
