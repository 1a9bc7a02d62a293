"""GPTQ: codes chosen one input channel at a time, the error of each carried over to the channels still open.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, algorithm 1, with act-order and static groups of the authors' later code. It minimises
``(W - Q) H (W - Q)^T`` with ``H = X^T X`` over the calibration inputs X [T, K], onto any format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .calibrate import HessianError, cholesky_in_place
from .formats import FORMATS, Grid
from .refine import refine
from .scales import choose_params, stored_params
from .tensor import Params, QuantizedTensor, groups_per_row

if TYPE_CHECKING:
    from .config import QuantSpec

# channels that gather together inside a block
_STRIP = 32
# channels that the factorization works on at once
_PANEL = 1024


@dataclass(frozen=True, kw_only=True)
class GPTQOptions:
    """Options of gptq.

    Attributes:
        act_order: take the input channels by falling diagonal of the Hessian, largest inputs first.
        static_groups: choose all scales before the first code, and keep groups of consecutive channels whatever
            the order. Without it a group's scale is chosen when its first channel is reached, from weights that
            carry the error so far; together with act_order that makes groups of channels that are no
            neighbours, and a ``g_idx`` is stored.
        damp: added to the diagonal of the Hessian, as a share of its mean.
        damp_max: where the factorization fails, ``damp`` is multiplied by 10 up to this share.
        block_size: input channels whose errors are carried over inside the block at once, and to the rest of
            the matrix when the block is done. It changes the speed, not the result.
        refits: rounds of refinement after the first pass, each of them a least-squares fit of the scales to the
            codes under the Hessian and a pass of coordinate descent over the codes (see :mod:`.refine`).
    """

    act_order: bool = True
    static_groups: bool = True
    damp: float = 0.01
    damp_max: float = 1.0
    block_size: int = 128
    refits: int = 0

    def check(self, spec: QuantSpec) -> None:
        from .config import ConfigError

        for name in ("act_order", "static_groups"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("damp", "damp_max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} must be a number, got {value!r}")
        if not 0 < self.damp <= self.damp_max:
            raise ConfigError(f"damp must be above 0 and at most damp_max = {self.damp_max}, got {self.damp}")
        for name, least in (("block_size", 1), ("refits", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        if spec.double_quant and not self.static_groups:
            raise ConfigError(
                "double_quant needs all scales before the first code: set static_groups to true"
            )
        if spec.scale == "hessian" and not self.static_groups:
            raise ConfigError(
                "scale 'hessian' searches whole groups of neighbours: set static_groups to true"
            )

    @property
    def permutes_groups(self) -> bool:
        """Whether groups are of channels that are no neighbours, so that a g_idx is stored."""
        return self.act_order and not self.static_groups


def gptq(w: Tensor, spec: QuantSpec, hessian: Tensor | None) -> QuantizedTensor:
    """Quantize a weight [N, K] of any float dtype under ``hessian`` [K, K] = X^T X, up to any positive factor.

    Raises:
        ValueError: no Hessian, or one of another shape.
        HessianError: the Hessian cannot be factorized.
    """
    rows, width = w.shape
    if hessian is None:
        raise ValueError("gptq needs the Hessian of the inputs [K, K]: none was given")
    if tuple(hessian.shape) != (width, width):
        raise ValueError(
            f"the Hessian of a weight {list(w.shape)} must be {[width, width]}, got {list(hessian.shape)}"
        )
    options: GPTQOptions = spec.options
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if options.act_order else None
    share, factor = factorize(hessian, options, order)
    # always a copy: the errors are carried over in it
    columns = w.to(torch.float32).t()
    columns = columns.clone(memory_format=torch.contiguous_format) if order is None else columns[order]
    groups = groups_per_row(spec, (rows, width))

    if options.static_groups or groups == 1:
        exact = choose_params(w, spec, hessian)
        group_of = torch.arange(width, device=w.device) // (width // groups)
        codes = _solve(
            columns, spec, factor, stored_params(exact, spec), group_of if order is None else group_of[order]
        )
    else:
        codes, exact = _solve_with_moving_groups(columns, spec, factor, order)
    del columns, factor
    codes = (codes if order is None else torch.empty_like(codes).index_copy_(0, order, codes)).t()
    if options.refits:
        damped = damp(hessian, share)
        codes, exact = refine(w.to(torch.float32), spec, codes, exact, damped, options.refits)
    return QuantizedTensor.assemble(spec, codes.contiguous(), exact)


def dead_channels(hessian: Tensor) -> Tensor:
    """Input channels that calibration never excited: bool [K]."""
    return hessian.diagonal() <= 0


def damp(hessian: Tensor, share: float, order: Tensor | None = None) -> Tensor:
    """The Hessian in fp64 [K, K], its channels in ``order``, with ``share`` of the mean diagonal added to the diagonal.

    A channel that calibration never excited (zero diagonal) gets the mean: tied to no other, it is rounded plainly.
    """
    width = hessian.shape[0]
    diagonal = hessian.diagonal().to(torch.float64)
    dead = dead_channels(hessian)
    mean = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    damped = torch.empty(width, width, dtype=torch.float64, device=hessian.device)
    for start in range(0, width, _PANEL):
        part = slice(start, start + _PANEL)
        damped[part] = hessian[part] if order is None else hessian[order[part]][:, order]
    wanted = torch.where(dead, mean, diagonal) + share * mean
    damped.diagonal().copy_(wanted if order is None else wanted[order])
    return damped


def factorize(hessian: Tensor, options: GPTQOptions, order: Tensor | None = None) -> tuple[float, Tensor]:
    """(the damping that was enough, the inverse factor fp32 [K, K] of the damped Hessian in processing order).

    Raises:
        HessianError: not finite, or not positive definite with the greatest damping allowed.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise HessianError("the Hessian holds NaN or infinity: the calibration activations overflowed")
    share = options.damp
    width = hessian.shape[0]
    while True:
        factor = inverse_factor(damp(hessian, share, order))
        if factor is not None:
            return share, factor.to(torch.float32)
        if share * 10 > options.damp_max * (1 + 1e-9):
            raise HessianError(
                f"the Hessian [{width}, {width}] is not positive definite with damping {share:g} of its "
                f"mean diagonal: use more calibration text, or raise damp_max above {options.damp_max:g}"
            )
        share *= 10


def inverse_factor(h: Tensor) -> Tensor | None:
    """Upper triangular U [K, K] with U^T U = h^-1, in the memory of h fp64 [K, K]; None where h has no factor.

    With the order of the channels reversed h = L L^T, so back in order h = R R^T with R upper, and U = R^-1: one
    factorization and one triangular inverse, where the usual road takes two and an inverse between them. In place,
    because for 14336 channels a matrix has 1.6 GB.
    """
    _reverse(h)
    lower = cholesky_in_place(h)
    if lower is None:
        return None
    _invert_lower(lower)
    _reverse(h)
    return lower


def _reverse(h: Tensor) -> None:
    """Both axes of a contiguous matrix back to front, in place."""
    flat = h.view(-1)
    step = _PANEL * _PANEL
    for start in range(0, flat.numel() // 2, step):
        stop = min(start + step, flat.numel() // 2)
        front, back = flat[start:stop], flat[flat.numel() - stop : flat.numel() - start]
        kept = front.clone()
        front.copy_(back.flip(0))
        back.copy_(kept.flip(0))


def _invert_lower(lower: Tensor) -> None:
    """The inverse of a lower triangular matrix [K, K] in its own place, panel by panel from the last.

    With L = [[A, 0], [B, C]] the inverse is [[A^-1, 0], [-C^-1 B A^-1, C^-1]], and C^-1 is there already.
    """
    width = lower.shape[0]
    for start in reversed(range(0, width, _PANEL)):
        stop = min(start + _PANEL, width)
        corner = lower[start:stop, start:stop]
        identity = torch.eye(stop - start, dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
        if stop < width:
            below = lower[stop:, start:stop]
            below.copy_(lower[stop:, stop:] @ (below @ inverse).neg_())
        corner.copy_(inverse)


def _solve(columns: Tensor, spec: QuantSpec, factor: Tensor, used: Params, group_of: Tensor) -> Tensor:
    """Codes uint8 [K, N] of ``columns`` fp32 [K, N], overwritten, with the scales fixed; all in processing order."""
    grid = _grid(used, spec)
    places = grid.places(columns.shape[0])
    size = spec.options.block_size
    groups = group_of.tolist()
    for start in range(0, columns.shape[0], size):
        _solve_block(columns, places, grid, groups, factor, start, min(start + size, columns.shape[0]))
    return grid.codes(places, group_of)


def _solve_with_moving_groups(
    columns: Tensor, spec: QuantSpec, factor: Tensor, order: Tensor | None
) -> tuple[Tensor, Params]:
    """As :func:`_solve`, but each group's scale is chosen from the weights as they are when it begins."""
    width = columns.shape[0]
    size = spec.group_size
    assert size is not None
    block = spec.options.block_size
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    work = columns
    fitted = []
    for begin in range(0, width, size):
        members = slice(begin, begin + size)
        exact = choose_params(work[members].t(), spec)
        fitted.append(exact)
        grid = _grid(stored_params(exact, spec), spec)
        places = grid.places(width)
        for start in range(begin, begin + size, block):
            _solve_block(work, places, grid, [0] * width, factor, start, min(start + block, begin + size))
        codes[members] = grid.codes(
            places[members], torch.zeros(size, dtype=torch.int64, device=columns.device)
        )
    g_idx = None
    if order is not None:
        g_idx = torch.empty(width, dtype=torch.int32, device=columns.device)
        g_idx[order] = torch.arange(width, dtype=torch.int32, device=columns.device) // size
    scales = torch.cat([p.scale for p in fitted], dim=1)
    zeros = (
        None if fitted[0].zero is None else torch.cat([p.zero for p in fitted if p.zero is not None], dim=1)
    )
    return codes, Params(scales, zeros, g_idx)


def _grid(used: Params, spec: QuantSpec) -> Grid:
    zero = None if used.zero is None else used.zero.t().contiguous()
    return FORMATS[spec.format].grid(used.scale.t().contiguous(), zero)


def _solve_block(
    work: Tensor, places: Tensor, grid: Grid, groups: list[int], factor: Tensor, start: int, stop: int
) -> None:
    """Fill places[start:stop]; carry the errors over inside the block, then to all rows of ``work`` behind it.

    Inside the block a channel gathers what it is owed when its turn comes (one product over the errors before it),
    and strips of 32 channels gather from the strips before them at once: the errors are read, not the matrix rewritten.
    """
    errors = torch.empty_like(work[start:stop])
    pivots = factor.diagonal()[start:stop].tolist()
    for first in range(start, stop, _STRIP):
        last = min(first + _STRIP, stop)
        if first > start:
            work[first:last].addmm_(factor[start:first, first:last].t(), errors[: first - start], alpha=-1)
        for k in range(first, last):
            column = work[k]
            if k > first:
                owed = errors[first - start : k - start]
                column = torch.addmv(column, owed.t(), factor[first:k, k], alpha=-1)
            places[k], value = grid.nearest(column, groups[k])
            torch.sub(column, value, out=errors[k - start]).div_(pivots[k - start])
    if stop < work.shape[0]:
        work[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
