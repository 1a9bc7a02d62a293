"""Which launch of the dequant-matmul is fastest on the GPU at hand: candidates are data, so is what is found."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops, tuning
from ..quant.rtn import rtn
from .gpu_matmul import SPECS
from .gpu_protocol import Call, Timer, copies_for
from .timing import Spread

# layers on which a launch must prove itself: wide, tall, and small
SHAPES = ((28672, 4096), (4096, 14336), (6144, 4096))
FORMATS = ("int4", "nf4", "int8")
# tokens that stand for an entry of the table: its own limit, but for the open last one
OPEN_ENDED = 128
CROSSOVERS = (64, 128, 256, 512, 1024, 2048)
Product = Callable[[Tensor, ops.PackedWeight, tuning.MatmulConfig], Tensor]


def launch_product(x: Tensor, w: ops.PackedWeight, config: tuning.MatmulConfig) -> Tensor:
    """The Triton product of a tiled weight by one launch configuration."""
    from ..kernels import launch

    zeros, absmax, offset, scale_map = (
        w.tensors.get(name) for name in ("zeros", "scales_absmax", "scales_offset", "scales_map")
    )
    qweight, scales = w.tensors["qweight"], w.tensors["scales"]
    return launch.matmul(
        x, w.format, w.shape[0], qweight, scales, zeros, absmax, offset, scale_map, None, False, config
    )


def tune(
    device: torch.device,
    timer: Timer,
    *,
    deadline: float = math.inf,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    formats: tuple[str, ...] = FORMATS,
    crossovers: tuple[int, ...] = CROSSOVERS,
    product: Product = launch_product,
    layout: str = "tiles",
    origin: dict[str, Any] | None = None,
) -> tuple[tuning.Tuned, list[dict[str, Any]]]:
    """Time every candidate of every entry on every shape; the least product of times wins.

    Args:
        deadline: of :func:`time.monotonic`; a format that was not begun by then keeps what it has.
        product, layout: other ones stand in where there is no GPU.

    Returns:
        What was found, and a row for every candidate: seconds by shape, or why it cannot run.
    """
    tables: dict[str, tuning.Table] = {}
    crossing: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for fmt in formats:
        if time.monotonic() > deadline:
            break
        weights = [_weights(fmt, n, k, device, layout) for n, k in shapes]
        entries = []
        for limit, usual in tuning.MATMUL:
            tokens = OPEN_ENDED if limit == tuning.ALL else limit
            found: dict[tuning.MatmulConfig, float] = {}
            for config in tuning.CANDIDATES[limit]:
                times, failed = _try(weights, tokens, functools.partial(_by, product, config), timer)
                rows.append({"family": "tuning", "format": fmt, "tokens": tokens, "config": repr(config),
                             "seconds": times, "failed": failed})  # fmt: skip
                if failed is None:
                    found[config] = math.prod(times)
            entries.append((limit, min(found, key=lambda c: found[c]) if found else usual))
        tables[fmt] = tuple(entries)
        crossing[fmt] = _crossing(weights, tables[fmt], crossovers, product, timer)
        rows.append({"family": "tuning", "format": fmt, "crossover": crossing[fmt]})
    return tuning.Tuned(tables, crossing, origin or {}), rows


def _weights(fmt: str, n: int, k: int, device: torch.device, layout: str) -> list[ops.PackedWeight]:
    generator = torch.Generator(device).manual_seed(0)
    q = rtn(torch.randn(n, k, generator=generator, device=device), SPECS[fmt])
    first = ops.pack_weight(q.tensors, q.spec.format, (n, k), torch.float16, layout_name=layout)
    copies = [{name: t.clone() for name, t in first.tensors.items()} for _ in range(copies_for(first.nbytes))]
    return [ops.PackedWeight(first.format, first.shape, layout, tensors) for tensors in copies]


def _by(product: Product, config: tuning.MatmulConfig, x: Tensor, w: ops.PackedWeight) -> Tensor:
    return product(x, w, config)


def _try(
    weights: list[list[ops.PackedWeight]],
    tokens: int,
    multiply: Callable[[Tensor, ops.PackedWeight], Tensor],
    timer: Timer,
) -> tuple[list[float], str | None]:
    """Median seconds on every shape, and why it failed where it did."""
    times: list[float] = []
    for copies in weights:
        x = torch.randn(tokens, copies[0].shape[1], device=copies[0].tensors["qweight"].device).half()
        calls: list[Call] = [functools.partial(multiply, x, w) for w in copies]
        try:
            step = timer.prepare(calls)
        except (RuntimeError, ValueError) as error:  # too many registers or too much shared memory
            return times, f"{type(error).__name__}: {error}"[:200]
        times.append(Spread.of([step() for _ in range(5)]).median)
    return times, None


def _crossing(
    weights: list[list[ops.PackedWeight]],
    table: tuning.Table,
    crossovers: tuple[int, ...],
    product: Product,
    timer: Timer,
) -> int:
    """The most tokens at which the fused product is no slower, on all shapes together, than decoding first."""
    best = 0
    for tokens in crossovers:
        config = tuning.by_tokens(table, tokens)
        fused, failed = _try(weights, tokens, functools.partial(_by, product, config), timer)
        plain, _ = _try(weights, tokens, _decode_first, timer)
        if failed is not None or math.prod(fused) > math.prod(plain):
            break
        best = tokens
    return best


def _decode_first(x: Tensor, w: ops.PackedWeight) -> Tensor:
    return torch.nn.functional.linear(x, ops.dequantize(w, x.dtype))
