"""Hessians of Linear inputs, gathered a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

# stripes of the Hessian; only those on and above the diagonal are multiplied, the rest is their mirror image
_STRIPES = 3


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
        """X^T X, fp32 [K, K], symmetric to the bit."""
        return self._h.triu() + self._h.triu(1).t()

    @property
    def cross(self) -> Tensor | None:
        """X_full^T X, fp32 [K, K], or None."""
        return self._cross


def matched_weight(w: Tensor, hessian: Tensor, cross: Tensor, damp: float) -> Tensor:
    """The weight [N, K] that on the quantized model's inputs X comes closest to W on the full model's X_full.

    ``||W X_full^T - V X^T||^2 + a ||V - W||^2`` is least at ``V = (W C + a W) (H + a I)^-1`` with C = X_full^T X and
    a = damp * mean(diag H). Quantizing V instead of W under H then minimises the distance to the full model's
    outputs up to a constant: the asymmetric calibration of GPTAQ (arXiv:2504.02692), solved before rounding.
    """
    h = hessian.to(torch.float64)
    w64 = w.to(torch.float64)
    ridge = damp * float(h.diagonal().mean())
    h.diagonal().add_(ridge)
    right = w64 @ cross.to(torch.float64) + ridge * w64
    return torch.cholesky_solve(right.t(), torch.linalg.cholesky(h)).t().to(torch.float32)
