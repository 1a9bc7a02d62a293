"""Launches of the Triton matrix products: grids, workspaces, configurations. Imported only when one is
launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .codebooks import CODEBOOKS
from .int8 import int8_dynamic_kernel, quantize_tokens_kernel
from .layout import tiles_shape
from .matmul import dequantize_kernel, matmul_kernel

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_locks: dict[tuple[torch.device, int], list[Tensor]] = {}


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 runs the kernels on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def _use_asm(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cuda" and torch.version.hip is None and dtype != torch.float32 and not interpreting()
    )


@lru_cache(maxsize=16)
def _codebook(fmt: str, device: torch.device) -> Tensor:
    return torch.tensor(CODEBOOKS[fmt], dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def architecture(device: torch.device) -> str | None:
    """As "sm_90"; None where it is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return tuning.MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def counters(device: torch.device, count: int) -> Tensor:
    """Arrival counters, zero between launches: the last program of each tile resets its own. One set a stream.

    A CUDA graph keeps the addresses it was captured with, so a set that has become too small is kept as well. A graph
    whose stream was not warmed up gets a set of its own, zeroed at every replay.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    sets = _locks.setdefault((device, stream), [])
    if sets and sets[-1].numel() >= count:
        return sets[-1]
    fresh = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        sets.append(fresh)
    return fresh


def _plane_bytes(fmt: str, n: int, k: int) -> int:
    """Offset of int3's plane of high bits."""
    rows, columns = tiles_shape(n, k)
    return rows * columns * 256 if fmt == "int3" else 0


@dataclass(frozen=True)
class Plan:
    """One product's launch: the grid, and the arguments that every kernel around ``accumulate`` has in common."""

    grid: tuple[int, int]
    work: Tensor
    locks: Tensor
    weight: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    options: dict[str, Any]


def plan(
    x: Tensor,
    fmt: str,
    n: int,
    t: Sequence[Tensor | None],
    batch_invariant: bool,
    config: tuning.MatmulConfig | None = None,
) -> Plan:
    """How x [M, K], M and N of at least 1, is multiplied by a tiled weight [N, K]: by ``config``, or by the tables.

    Args:
        t: the weight's tensors in the order of :data:`.checks.TENSORS`.
    """
    m, k = x.shape
    qweight, scales, zeros, absmax, offset, scale_map = t[:6]
    assert qweight is not None and scales is not None
    groups = scales.shape[0]
    group = 0 if groups == 1 else k // groups
    if config is None:
        table = tuning.matmul_table(fmt, architecture(x.device))
        config = tuning.MATMUL_INVARIANT if batch_invariant else tuning.by_tokens(table, m)
    bk = tuning.block_k(config, group)
    blocks_n, blocks_m = triton.cdiv(n, config.bn), triton.cdiv(m, config.bm)
    blocks_for_split = 1 if batch_invariant else blocks_m
    split = tuning.splits(n, k, blocks_for_split, config, bk, _multiprocessors(x.device))
    # a pointer is needed even where nothing is stored
    work, locks = scales, scales
    if split > 1:
        work = torch.empty(
            blocks_n * blocks_m * split * config.bn * config.bm, dtype=torch.float32, device=x.device
        )
        locks = counters(x.device, blocks_n * blocks_m)
    book = _codebook(fmt, x.device) if fmt in CODEBOOKS else scales
    options = {
        "FORMAT": fmt, "GROUP": group, "ZERO": zeros is not None, "DOUBLE": absmax is not None,
        "BN": config.bn, "BK": bk, "BM": config.bm, "SPLIT": split, "STAGES": config.stages,
        "EVEN": n % config.bn == 0 and k % bk == 0, "DTYPE": DTYPES[x.dtype], "ASM": _use_asm(x.device, x.dtype),
        "num_warps": config.warps,
    }  # fmt: skip
    return Plan(
        (blocks_n * blocks_m, split), work, locks, (qweight, scales, zeros, absmax, offset, scale_map, book),
        (m, n, k, groups, x.stride(0), x.stride(1), _plane_bytes(fmt, n, k)), options,
    )  # fmt: skip


def matmul(
    x: Tensor,
    fmt: str,
    n: int,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    absmax: Tensor | None,
    offset: Tensor | None,
    scale_map: Tensor | None,
    bias: Tensor | None,
    batch_invariant: bool,
    config: tuning.MatmulConfig | None = None,
) -> Tensor:
    """x [M, K] (any strides) times a tiled weight [N, K] -> [M, N]; by ``config`` rather than by the tables."""
    y = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    t = (qweight, scales, zeros, absmax, offset, scale_map)
    how = plan(x, fmt, n, t, batch_invariant, config)
    matmul_kernel[how.grid](
        x, *how.weight, bias, y, how.work, how.locks, *how.sizes, BIAS=bias is not None, **how.options
    )
    return y


def dequantize(
    dtype: torch.dtype,
    fmt: str,
    shape: tuple[int, int],
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    absmax: Tensor | None,
    offset: Tensor | None,
    scale_map: Tensor | None,
) -> Tensor:
    """A tiled weight -> dense [N, K]."""
    n, k = shape
    groups = scales.shape[0]
    y = torch.empty(n, k, dtype=dtype, device=qweight.device)
    asm = _use_asm(y.device, dtype)
    book = _codebook(fmt, y.device) if fmt in CODEBOOKS else scales
    dequantize_kernel[(triton.cdiv(n, 64), triton.cdiv(k, 64))](
        qweight, scales, zeros, absmax, offset, scale_map, book, y, n, k, groups, _plane_bytes(fmt, n, k),
        FORMAT=fmt, GROUP=0 if groups == 1 else k // groups, ZERO=zeros is not None,
        DOUBLE=absmax is not None, BN=64, BK=64, DTYPE=DTYPES[dtype] if asm else tl.float32, ASM=asm,
        num_warps=4,
    )  # fmt: skip
    return y


def int8_dynamic_matmul(
    x: Tensor, qweight: Tensor, scales: Tensor, outlier: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [M, K] times portable int8 codes [N, K], scales fp32 [N]; ``outlier`` uint8 [K] or None."""
    m, k = x.shape
    n = qweight.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0 or n == 0:
        return y
    q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    xs = torch.empty(m, dtype=torch.float32, device=x.device)
    quantize_tokens_kernel[(m,)](
        x, outlier, q, xs, k, x.stride(0), x.stride(1), BLOCK=1024, OUTLIERS=outlier is not None, num_warps=4
    )
    config = tuning.by_tokens(tuning.INT8_DYNAMIC if outlier is None else tuning.INT8_OUTLIERS, m)
    int8_dynamic_kernel[(triton.cdiv(m, config.bm) * triton.cdiv(n, config.bn),)](
        x, q, xs, outlier, qweight, scales, bias, y, m, n, k, x.stride(0), x.stride(1),
        BM=config.bm, BN=config.bn, BK=config.bk, STAGES=config.stages, OUTLIERS=outlier is not None,
        BIAS=bias is not None, DTYPE=DTYPES[x.dtype], num_warps=config.warps,
    )  # fmt: skip
    return y
