"""How a group's scale is chosen: from its largest magnitude, or by a search over clipping ratios."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .config import QuantSpec
from .formats import FORMATS
from .tensor import Params, groups_per_row, load_scales, store_scales
from .workers import Workers

# weights searched at a time: they and their temporaries stay in a core's L2 cache
_CHUNK = 1 << 17
# weights below which threads are not worth their start
_MANY = 1 << 16
# clipping ratios tried, as multiples of the absmax scale; 1.0 first, so that it wins ties
_RATIOS = (1.0, *(r / 40 for r in (*range(39, 19, -1), 41, 42, 43)))


class NonFiniteError(ValueError):
    """A weight that holds NaN or infinity, or a group whose range is beyond float32."""


def choose_params(w: Tensor, spec: QuantSpec, hessian: Tensor | None = None) -> Params:
    """Scales and zero points of a weight [N, K], exact in fp32, before storage rounds them.

    Raises:
        NonFiniteError: the weight is not finite.
        ValueError: ``spec.scale`` is ``hessian`` and no Hessian was given.
    """
    groups = w.to(torch.float32).unflatten(1, (groups_per_row(spec, (w.shape[0], w.shape[1])), -1))
    scale, zero = FORMATS[spec.format].fit(groups, spec)
    # NaN and infinity pass through the extremes that every fit takes, so the few scales tell of all the weights
    if not bool(torch.isfinite(scale).all()):
        bad = int((~torch.isfinite(w)).sum())
        what = f"holds {bad} NaN or infinite values" if bad else "has a group whose range overflows float32"
        raise NonFiniteError(f"the weight {list(w.shape)} {what}: it cannot be quantized")
    if spec.scale in ("mse", "hessian"):
        if spec.scale == "hessian" and hessian is None:
            raise ValueError("scale 'hessian' needs calibration: none was given for this weight")
        scale = search_scale(groups, scale, zero, spec, hessian if spec.scale == "hessian" else None)
    return Params(scale, zero)


def stored_params(params: Params, spec: QuantSpec) -> Params:
    """The parameters as a reader of the checkpoint will see them."""
    return dataclasses.replace(params, scale=load_scales(store_scales(params.scale, spec), spec))


def search_scale(
    groups: Tensor, base: Tensor, zero: Tensor | None, spec: QuantSpec, hessian: Tensor | None
) -> Tensor:
    """Of ``base`` [N, G] times each clipping ratio, the scale with the least error of its group [N, G, g].

    The error is ||e||^2, or e^T H_gg e with the group's own diagonal block of the Hessian [K, K].
    Symmetric integers have one code more below zero than above, so each ratio is tried with both signs.
    """
    signs = (1.0, -1.0) if spec.symmetric and spec.format.startswith("int") else (1.0,)
    candidates = [base * (ratio * sign) for ratio in _RATIOS for sign in signs]
    if not spec.double_quant:  # else what storage makes of one scale depends on all the others
        candidates = [load_scales(store_scales(scale, spec), spec) for scale in candidates]
    best = torch.empty_like(base)
    width = groups.shape[2]
    step = max(1, _CHUNK // width)

    def search(g: int) -> None:
        members = slice(g * width, (g + 1) * width)
        block = None if hessian is None else hessian[members, members].to(torch.float32)
        for start in range(0, groups.shape[0], step):
            rows = slice(start, start + step)
            z = None if zero is None else zero[rows, g]
            scales = torch.stack([scale[rows, g] for scale in candidates])
            best[rows, g] = _least_error(groups[rows, g].t().contiguous(), scales, z, spec, block)

    if groups.device.type != "cpu" or groups.numel() < _MANY:
        for g in range(groups.shape[1]):
            search(g)
    else:
        with Workers() as workers:
            workers.map(search, range(groups.shape[1]))
    return best


def _least_error(
    w: Tensor, scales: Tensor, zero: Tensor | None, spec: QuantSpec, block: Tensor | None
) -> Tensor:
    """Of the candidate ``scales`` [C, N] of one group's weights [g, N], the best of each row: [N]. Ties: the first."""
    losses = torch.empty_like(scales)
    grid = FORMATS[spec.format].grid(scales, None if zero is None else zero.expand_as(scales))
    for c in range(scales.shape[0]):
        error = w - grid.nearest(w, c)[1]
        weighed = error if block is None else block @ error
        torch.sum(weighed * error, dim=0, out=losses[c])
    chosen = losses.argmin(dim=0, keepdim=True)
    return scales.gather(0, chosen).squeeze(0)
