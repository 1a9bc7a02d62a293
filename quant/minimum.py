"""Integers with a minimum a group in place of a zero point: weight = scale * code + minimum, as in ggml's Q4_1.

It is read from files that have it and written back; it is not among the formats to choose from, since a zero point
costs half a byte a group where this takes two bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .config import QuantSpec
    from .formats import Grid


@dataclass(frozen=True)
class MinimumFormat:
    """4-bit codes 0..15; where other formats have a zero point uint8 this one has the minimum, fp32."""

    name: str = "int4_min"
    bits: int = 4
    default_group: int | None = 32
    default_scale_dtype: str = "float16"
    codes_from_exact_scale: bool = False

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def check(self, spec: QuantSpec) -> None:
        from .config import ConfigError

        if spec.symmetric or spec.double_quant or spec.scale != "absmax" or spec.algorithm != "rtn":
            raise ConfigError(
                f"{self.name} is asymmetric, by rtn with scale absmax, without double quantization"
            )

    def fit(self, groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """fp32 groups [..., g] -> (scale fp32 [...], minimum fp32 [...])."""
        low, high = groups.aminmax(dim=-1)
        return (high - low) / self.top, low

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """fp32 ``w``, ``scale`` and the minimum ``zero`` that broadcast together -> uint8 codes."""
        assert zero is not None
        return torch.where(scale == 0, 0, (w - zero) / scale).round_().clamp_(0, self.top).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """uint8 codes, fp32 ``scale`` and the minimum ``zero`` -> fp32, in the order of ggml: product, then sum."""
        assert zero is not None
        return codes.to(torch.float32) * scale + zero

    def grid(self, scale: Tensor, zero: Tensor | None = None) -> Grid:
        """No algorithm goes channel by channel here (see :meth:`check`)."""
        raise TypeError(f"{self.name} is rounded plainly")


INT4_MIN = MinimumFormat()
