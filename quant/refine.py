"""Refinement of a quantized weight under its Hessian: scales fitted to the codes, codes to the scales.

Both steps lower ``(w - q)^T H (w - q)`` of every row or leave it: the scales are the least-squares solution for
fixed codes (a [G, G] system a row), and the codes are then changed one channel at a time, each to the best value
while all others are held (coordinate descent; QuantEase, arXiv:2309.01885, section 3).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .formats import FORMATS
from .scales import stored_params
from .tensor import Params

if TYPE_CHECKING:
    from .config import QuantSpec

# channels whose steps are gathered together
_STRIP = 32


def objective(w: Tensor, q: Tensor, hessian: Tensor) -> Tensor:
    """(w - q)^T H (w - q) of every row: fp32 weights [N, K], H [K, K] -> [N]."""
    error = w - q
    return ((error @ hessian.to(error.dtype)) * error).sum(1)


def refine(
    w: Tensor, spec: QuantSpec, codes: Tensor, exact: Params, hessian: Tensor, rounds: int
) -> tuple[Tensor, Params]:
    """``rounds`` of scale fit and coordinate descent; a row keeps what it had where a round did not help.

    Args:
        w: the weight, fp32 [N, K].
        codes: uint8 [N, K]. exact: their parameters before storage rounds them.
        hessian: [K, K], damped.
    """
    h = hessian.to(torch.float32)
    fmt = FORMATS[spec.format]

    def decoded(codes: Tensor, params: Params) -> Tensor:
        scale, zero = params.per_channel(w.shape[1])
        return fmt.decode(codes, scale, zero)

    used = stored_params(exact, spec)
    loss = objective(w, decoded(codes, used), h)
    for _ in range(rounds):
        fitted = dataclasses.replace(exact, scale=fit_scales(w, spec, codes, exact, h))
        new_used = stored_params(fitted, spec)
        new_codes = descend(w, spec, codes, new_used, h)
        new_loss = objective(w, decoded(new_codes, new_used), h)
        if spec.double_quant:
            # scales share blocks across rows: the round is taken or left as a whole
            better = (new_loss.sum() < loss.sum()).expand_as(loss)
        else:
            better = new_loss < loss
        codes = torch.where(better[:, None], new_codes, codes)
        exact = dataclasses.replace(exact, scale=torch.where(better[:, None], fitted.scale, exact.scale))
        loss = torch.where(better, new_loss, loss)
    return codes, exact


def fit_scales(w: Tensor, spec: QuantSpec, codes: Tensor, params: Params, h: Tensor) -> Tensor:
    """Scales [N, G] that minimise the objective with the codes held: the normal equations of every row.

    With c_g the unscaled values of group g (zero elsewhere), A[g, g'] = c_g^T H c_g' and b[g] = c_g^T H w.
    """
    fmt = FORMATS[spec.format]
    rows, width = w.shape
    groups = params.scale.shape[1]
    ones = torch.ones_like(params.scale)
    _, zero = params.per_channel(width)
    unit = fmt.decode(codes, torch.ones((), device=w.device), zero)
    group_of = (
        params.g_idx.long()
        if params.g_idx is not None
        else torch.arange(width, device=w.device) // (width // groups)
    )
    members = [torch.nonzero(group_of == g).flatten() for g in range(groups)]
    out = torch.empty_like(params.scale)
    step = max(1, (1 << 24) // (groups * width))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        c, wh = unit[part], w[part] @ h
        a = torch.empty(c.shape[0], groups, groups, dtype=torch.float64, device=w.device)
        for g, index in enumerate(members):
            spread = (c[:, index] @ h[index]) * c
            a[:, g] = (
                torch.zeros(c.shape[0], groups, device=w.device).index_add_(1, group_of, spread).double()
            )
        b = torch.zeros(c.shape[0], groups, device=w.device).index_add_(1, group_of, wh * c).double()
        a = (a + a.transpose(1, 2)) / 2
        # a group whose codes are all zero leaves its equation empty: a small ridge towards the present scale
        ridge = 1e-6 * a.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=1e-30)
        a.diagonal(dim1=1, dim2=2).add_(ridge)
        b += ridge * params.scale[part].double()
        out[part] = torch.linalg.solve(a, b).to(torch.float32)
    return torch.where(torch.isfinite(out), out, params.scale) * ones


def descend(w: Tensor, spec: QuantSpec, codes: Tensor, used: Params, h: Tensor) -> Tensor:
    """One pass of coordinate descent over the input channels: new codes uint8 [N, K].

    With r = (w - q) H, the best value of channel k with the others held is q_k + r_k / H_kk. The steps taken are
    gathered from behind as in GPTQ: by strips, and channel by channel inside a strip.
    """
    width = w.shape[1]
    zero = None if used.zero is None else used.zero.t().contiguous()
    grid = FORMATS[spec.format].grid(used.scale.t().contiguous(), zero)
    if used.g_idx is not None:
        group_of = used.g_idx.long()
    else:
        group_of = torch.arange(width, device=w.device) // (width // used.scale.shape[1])
    groups = group_of.tolist()
    q = FORMATS[spec.format].decode(codes, *used.per_channel(width)).t().contiguous()
    residual = h @ (w.t() - q)
    steps = torch.empty_like(q)
    places = grid.places(width)
    diagonal = h.diagonal().tolist()
    for first in range(0, width, _STRIP):
        last = min(first + _STRIP, width)
        if first:
            residual[first:last].addmm_(h[first:last, :first], steps[:first], alpha=-1)
        for k in range(first, last):
            owed = residual[k]
            if k > first:
                owed = torch.addmv(owed, steps[first:k].t(), h[first:k, k], alpha=-1)
            places[k], value = grid.nearest(torch.add(q[k], owed, alpha=1 / diagonal[k]), groups[k])
            torch.sub(value, q[k], out=steps[k])
    return grid.codes(places, group_of).t()
