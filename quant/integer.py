"""Integers of 2 to 8 bits: weight = scale * (code - zero), on an even grid of 2^b codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .config import QuantSpec


@dataclass(frozen=True)
class IntegerFormat:
    """``bits``-bit codes 0 .. 2^bits - 1; symmetric grids have the zero point 2^(bits-1), which is not stored."""

    bits: int
    default_group: int | None = 128
    default_scale_dtype: str = "float16"
    codes_from_exact_scale: bool = False

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def check(self, spec: QuantSpec) -> None:
        from .config import ConfigError

        if spec.scale == "absmax_narrow" and not spec.symmetric:
            raise ConfigError(
                "scale absmax_narrow is a rule for symmetric integers: use absmax (the range from min to max)"
            )

    def fit(self, groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """fp32 groups [..., g] -> (scale fp32 [...], zero point uint8 [...] or None when symmetric)."""
        low, high = groups.aminmax(dim=-1)
        if spec.symmetric:
            steps = self.middle - 1 if spec.scale == "absmax_narrow" else self.top / 2
            # abs: a group of zeros must give the scale 0.0, never -0.0
            return torch.maximum(-low, high).abs_() / _on(low, steps), None
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / _on(low, self.top)
        zero = torch.where(scale > 0, -low / scale, 0).round_().clamp_(0, self.top)
        return scale, zero.to(torch.uint8)

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """fp32 ``w``, ``scale`` and uint8 ``zero`` that broadcast together -> uint8 codes of w's shape.

        Ties go to the even integer; a scale of zero gives the zero point, which decodes to zero.
        """
        middle = self.middle if zero is None else zero
        steps = torch.where(scale == 0, 0, w / scale).round_()
        return steps.add_(middle).clamp_(0, self.top).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """uint8 codes, fp32 ``scale`` and uint8 ``zero`` that broadcast together -> fp32 of the codes' shape."""
        return (codes.to(torch.float32) - (self.middle if zero is None else zero)) * scale

    def grid(self, scale: Tensor, zero: Tensor | None = None) -> IntegerGrid:
        """See :class:`brise.quant.formats.Grid`: a place is the signed number of steps from the zero point."""
        middle = torch.full_like(scale[:, :1], self.middle) if zero is None else zero.to(scale.dtype)
        # a scale of zero leaves every weight at the zero point: 0 steps of 0
        divisor = torch.where(scale == 0, torch.inf, scale)
        return IntegerGrid(scale, divisor, -middle, self.top - middle)


@dataclass(frozen=True)
class IntegerGrid:
    """Groups of even steps: ``scale`` and ``divisor`` fp32 [G, N], fewest and most steps fp32 [G, N] or [G, 1]."""

    scale: Tensor
    divisor: Tensor
    fewest: Tensor
    most: Tensor

    def nearest(self, w: Tensor, group: int) -> tuple[Tensor, Tensor]:
        steps = torch.div(w, self.divisor[group]).round_().clamp_(self.fewest[group], self.most[group])
        return steps, steps * self.scale[group]

    def codes(self, places: Tensor, groups: Tensor) -> Tensor:
        return (places - self.fewest[groups]).to(torch.uint8)

    def places(self, count: int) -> Tensor:
        return self.scale.new_empty(count, self.scale.shape[1])


def _on(like: Tensor, value: float) -> Tensor:
    """A divisor on the device of ``like``: CUDA multiplies by the reciprocal of a number, which rounds otherwise."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


INTEGERS = (*(IntegerFormat(bits) for bits in (2, 3, 4)), IntegerFormat(8, default_group=None))
