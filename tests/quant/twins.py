"""Slow, plain twins of the formats and the scale rules, for tests to compare with.

Weights and stored scales are taken at face value (float32 numbers), everything else is Python floats or numpy
float64, except where a format is defined in float32: a scale is the float32 quotient of its group's extremes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from brise.quant.config import QuantSpec
from brise.quant.formats import FORMATS

U32 = 2.0**-24  # unit round-off of float32

# written down here once more, so that a slip in the library's table shows
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
_FP4_UPPER = [0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
FP4 = [float(np.float32(v)) for v in _FP4_UPPER + [-v for v in _FP4_UPPER]]

# the clipping ratios that scale searches try; 1.0 comes first
RATIOS = [1.0, *(r / 40 for r in range(39, 19, -1)), 41 / 40, 42 / 40, 43 / 40]


def f32(x: float) -> float:
    return float(np.float32(x))


def bits_of(spec: QuantSpec) -> int:
    return FORMATS[spec.format].bits


def is_integer(spec: QuantSpec) -> bool:
    return spec.format.startswith("int")


def unit_grid(spec: QuantSpec, zero: int | None = None) -> np.ndarray:
    """The unscaled value of every code, float64 [2^b]."""
    if is_integer(spec):
        bits = bits_of(spec)
        middle = 2 ** (bits - 1) if zero is None else zero
        return np.arange(2**bits, dtype=np.float64) - middle
    known = {"nf4": NF4, "fp4": FP4}
    if spec.format in known:
        return np.array(known[spec.format])
    # a format that came later: its own word for its grid, so that the algorithms are tested on it as well
    codes = torch.arange(2 ** bits_of(spec), dtype=torch.uint8)
    return FORMATS[spec.format].decode(codes, torch.ones(())).double().numpy()


def extremes_to_scale(group: list[float], spec: QuantSpec) -> tuple[float, int | None]:
    """Float32 scale before storage, and zero point, of one group of float32 weights, for the absmax rules."""
    low, high = min(group), max(group)
    biggest = max(abs(low), abs(high))
    if spec.format in ("nf4", "fp4"):
        return biggest, None
    if not is_integer(spec):
        own_scale, own_zero = FORMATS[spec.format].fit(torch.tensor(group), spec)
        return float(own_scale), None if own_zero is None else int(own_zero)
    bits = bits_of(spec)
    top = 2**bits - 1
    if spec.symmetric:
        steps = 2 ** (bits - 1) - 1 if spec.scale == "absmax_narrow" else top / 2
        return f32(biggest / steps), None
    low, high = min(low, 0.0), max(high, 0.0)
    scale = f32(f32(high - low) / top)
    if scale == 0:
        return scale, 0
    return scale, min(max(round(f32(-low / scale)), 0), top)


def stored(scale: float, spec: QuantSpec) -> float:
    """What a reader finds of a scale that is stored without double quantization."""
    return float(torch.tensor(scale, dtype=torch.float32).to(getattr(torch, spec.scale_dtype)))


def round_integer(w: float, scale: float, zero: int | None, bits: int) -> int:
    """Code of one weight: the float32 quotient to the nearest integer, ties to even, cut off at the ends."""
    middle = 2 ** (bits - 1) if zero is None else zero
    if scale == 0:
        return middle
    quotient = w / scale  # correctly rounded to float32 below: float64 holds more than twice its bits
    with np.errstate(over="ignore"):
        quotient = float(np.float32(quotient))
    steps = round(quotient) if math.isfinite(quotient) else math.copysign(2**20, quotient)
    return int(min(max(steps + middle, 0), 2**bits - 1))


def rtn_integer(
    w: Tensor, spec: QuantSpec
) -> tuple[list[list[int]], list[list[float]], list[list[int | None]]]:
    """Codes, stored scales and zero points of weights [N, K] rounded plainly, without double quantization."""
    rows = w.to(torch.float32).tolist()
    size = spec.group_size or len(rows[0])
    codes, scales, zeros = [], [], []
    for row in rows:
        groups = [row[i : i + size] for i in range(0, len(row), size)]
        exact = [extremes_to_scale(group, spec) for group in groups]
        scales.append([stored(scale, spec) for scale, _ in exact])
        zeros.append([zero for _, zero in exact])
        codes.append(
            [
                round_integer(x, scale, zero, bits_of(spec))
                for group, scale, zero in zip(groups, scales[-1], zeros[-1], strict=True)
                for x in group
            ]
        )
    return codes, scales, zeros


def group_loss(group: np.ndarray, scale: float, unit: np.ndarray, h: np.ndarray | None) -> float:
    """Squared error of one group on the grid ``scale * unit``, or its error under a Hessian block ``h``."""
    grid = scale * unit
    error = group - grid[np.abs(group[:, None] - grid[None, :]).argmin(axis=1)]
    return float(error @ error if h is None else error @ h @ error)


def candidate_scales(base: float, spec: QuantSpec) -> list[float]:
    """The scales that a search tries for one group, as a reader would see them."""
    signs = (1.0, -1.0) if is_integer(spec) and spec.symmetric else (1.0,)
    exact = [f32(base * f32(ratio * sign)) for ratio in RATIOS for sign in signs]
    return exact if spec.double_quant else [stored(scale, spec) for scale in exact]


def row_objective(error: np.ndarray, h: np.ndarray) -> np.ndarray:
    """e^T H e of every row of float64 errors [..., K] -> [...]."""
    return ((error @ h) * error).sum(axis=-1)


def random_problem(
    rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """A weight [N, K] and the Hessian float32 [K, K] of correlated inputs with unequal channels."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, width, generator=generator) * 0.1
    mix = torch.randn(width, width, generator=generator) / width**0.5
    strength = torch.exp(torch.randn(width, generator=generator))
    x = (
        torch.randn(tokens or 3 * width, width, generator=generator)
        @ (mix + 0.5 * torch.eye(width))
        * strength
    )
    return w.to(dtype), (x.T @ x) / x.shape[0]
