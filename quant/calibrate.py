"""Hessians of Linear inputs, gathered a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

# stripes of the Hessian; only those on and above the diagonal are multiplied, the rest is their mirror image
_STRIPES = 3
# rows of a Hessian, and rows of a weight, that are worked on at once where a copy of all would be too large
MIRROR = 2048
ROWS = 4096


class HessianError(ValueError):
    """A Hessian that is not positive definite even at the greatest damping, or is not finite."""


class HessianAccumulator:
    """H = X^T X over the calibration inputs X [T, K], and with a second stream C = X_full^T X beside it.

    Attributes:
        tokens: rows of X seen.
    """

    def __init__(self, width: int, cross: bool = False, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._h = torch.zeros(width, width, dtype=torch.float32, device=device)
        self._cross = torch.zeros_like(self._h) if cross else None

    def add(self, x: Tensor, full: Tensor | None = None) -> None:
        """Add inputs x [..., K], and what the unquantized model has in their place.

        Raises:
            ValueError: another width; or ``full`` is given where no cross term is kept, or the reverse.
        """
        width = self._h.shape[0]
        if x.shape[-1] != width or (full is not None and full.shape != x.shape):
            raise ValueError(f"expected inputs [..., {width}], got {list(x.shape)}")
        if (full is None) != (self._cross is None):
            raise ValueError(
                "give the full-precision inputs if and only if the accumulator keeps a cross term"
            )
        x = x.reshape(-1, width).to(torch.float32)
        self.tokens += x.shape[0]
        step = -(-width // _STRIPES)
        for start in range(0, width, step):
            self._h[start : start + step, start:].addmm_(x[:, start : start + step].t(), x[:, start:])
        if full is not None and self._cross is not None:
            self._cross.addmm_(full.reshape(-1, width).to(torch.float32).t(), x)

    @property
    def hessian(self) -> Tensor:
        """X^T X, fp32 [K, K], symmetric to the bit; the accumulator's own memory, which :meth:`add` goes on with."""
        width = self._h.shape[0]
        for start in range(0, width, MIRROR):
            part = slice(start, start + MIRROR)
            block = self._h[part, part]
            block.copy_(block.triu() + block.triu(1).t())
            self._h[start + MIRROR :, part] = self._h[part, start + MIRROR :].t()
        return self._h

    @property
    def cross(self) -> Tensor | None:
        """X_full^T X, fp32 [K, K], or None."""
        return self._cross

    def parts(self) -> list[Tensor]:
        """The sums themselves, for processes that add up theirs."""
        return [self._h] if self._cross is None else [self._h, self._cross]

    def drop_cross(self) -> None:
        """Give back the memory of the cross term, once it has been used."""
        self._cross = None


def matched_products(w: Tensor, hessian: Tensor, cross: Tensor, damp: float) -> Tensor:
    """``W C + a W`` in fp64 [N, K], from which :func:`matched_weight` solves the weight that is to be quantized.

    Apart, because the cross term C is of the Hessian's size and may be given back before that is factorized.
    """
    ridge = _ridge(hessian, damp)
    products = torch.empty(w.shape, dtype=torch.float64, device=w.device)
    for start in range(0, w.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        w64 = w[rows].to(torch.float64)
        torch.mul(w64, ridge, out=products[rows])
        for first in range(0, cross.shape[0], MIRROR):
            part = slice(first, first + MIRROR)
            products[rows].addmm_(w64[:, part], cross[part].to(torch.float64))
    return products


def matched_weight(products: Tensor, hessian: Tensor, damp: float) -> Tensor:
    """The weight fp32 [N, K] that on the quantized model's inputs X comes closest to W on the full model's X_full.

    ``||W X_full^T - V X^T||^2 + a ||V - W||^2`` is least at ``V = (W C + a W) (H + a I)^-1`` with C = X_full^T X and
    a = damp * mean(diag H). Quantizing V instead of W under H then minimises the distance to the full model's
    outputs up to a constant: the asymmetric calibration of GPTAQ (arXiv:2504.02692), solved before rounding.

    Besides H in float64 nothing of its size is held.

    Args:
        products: of :func:`matched_products`, overwritten.

    Raises:
        HessianError: the damped Hessian is not positive definite, or not finite.
    """
    width = hessian.shape[0]
    h = hessian.to(torch.float64)
    h.diagonal().add_(_ridge(hessian, damp))
    factor = cholesky_in_place(h)
    if factor is None:
        raise HessianError(
            f"the Hessian [{width}, {width}] is not positive definite with damping {damp:g} of its mean diagonal: "
            "use more calibration text, or set the calibration's target to quantized"
        )
    for start in range(0, products.shape[0], ROWS):
        # by columns, in place: torch.cholesky_solve is the same two solves on copies of both, the factor's of 1.6 GB
        right = products[start : start + ROWS].t()
        torch.linalg.solve_triangular(factor, right, upper=False, out=right)
        torch.linalg.solve_triangular(factor.t(), right, upper=True, out=right)
    del h, factor
    return products.to(torch.float32)


def _ridge(hessian: Tensor, damp: float) -> float:
    return damp * float(hessian.diagonal().to(torch.float64).mean())


def cholesky_in_place(h: Tensor) -> Tensor | None:
    """The lower factor of h fp64 [K, K], symmetric and contiguous, in h's own memory; None where there is none."""
    # symmetric: the transpose is the same matrix, laid out by columns as LAPACK wants it, so that nothing is copied
    columns = h.t()
    info = torch.empty((), dtype=torch.int32, device=h.device)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    return None if int(info) else columns
