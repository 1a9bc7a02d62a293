"""NF4 and FP4: 16 fixed values scaled by the group's largest magnitude.

Codes and scales are those of bitsandbytes to the bit (QLoRA, arXiv:2305.14314, appendix E; bitsandbytes
``quantize_4bit``): the weight is multiplied by the fp32 reciprocal of absmax, and takes the upper of two
neighbouring values only when strictly above their midpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.codebooks import FP4_VALUES, NF4_VALUES

if TYPE_CHECKING:
    from .config import QuantSpec

# bitsandbytes clamps absmax here before it takes the reciprocal, so that a zero block gives zeros, not NaN
_SMALLEST_ABSMAX = 1e-38
# elements worked on at a time: the temporaries stay in a core's L2 cache
_CHUNK = 1 << 17
# bins of the look-up over [-1, 1]
_BINS = 1024


@dataclass(frozen=True)
class CodebookFormat:
    """A 4-bit code is an index into ``values``; weight = values[code] * scale."""

    name: str
    values: tuple[float, ...]
    bits: int = 4
    default_group: int | None = 64
    default_scale_dtype: str = "float32"
    # bitsandbytes chooses codes with the exact absmax, and only then rounds absmax for double quantization
    codes_from_exact_scale: bool = True

    def check(self, spec: QuantSpec) -> None:
        from .config import ConfigError

        if not spec.symmetric:
            raise ConfigError(f"{self.name} has no zero point: leave symmetric at true")
        if spec.scale == "absmax_narrow":
            raise ConfigError(
                f"scale absmax_narrow is a rule for integers; {self.name} takes absmax, mse or hessian"
            )

    def fit(self, groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """fp32 groups [..., g] -> (absmax fp32 [...], no zero points)."""
        # abs: the extremes of zeros may come out as -0.0, which is not what bitsandbytes stores
        return torch.maximum(groups.amax(dim=-1), -groups.amin(dim=-1)).abs_(), None

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """fp32 ``w`` [R, ...] and ``scale`` that broadcasts to it -> uint8 codes of w's shape.

        A negative scale turns the codebook round, as it must for double-quantized scales near zero.
        """
        inverse = _reciprocal(scale).expand_as(w)
        first, border, order = _bins(self.values, w.device)
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        rows = max(1, _CHUNK // max(1, w[:1].numel()))
        for start in range(0, w.shape[0], rows):
            part = slice(start, start + rows)
            ratio = w[part] * inverse[part]
            bins = (ratio + 1).mul_(_BINS / 2).clamp_(0, _BINS - 1).to(torch.int32).flatten()
            above = ratio > border.index_select(0, bins).view(ratio.shape)
            place = first.index_select(0, bins).view(ratio.shape) + above
            codes[part] = place if order is None else order[place.to(torch.int32)]
        return codes

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """uint8 codes and fp32 ``scale`` that broadcast together -> fp32 of the codes' shape."""
        return codebook(self.values, codes.device)[codes.to(torch.int32)] * scale

    def grid(self, scale: Tensor, zero: Tensor | None = None) -> CodebookGrid:
        """See :class:`brise.quant.formats.Grid`: a place is the place among the sorted values."""
        table = codebook(self.values, scale.device)
        order = torch.argsort(table, stable=True)
        ordered = table[order]
        midpoints = (ordered[:-1] + ordered[1:]) / 2
        return CodebookGrid(scale, _reciprocal(scale), ordered, midpoints, order.to(torch.uint8))


@dataclass(frozen=True)
class CodebookGrid:
    """Groups of a codebook: ``scale`` and its reciprocal fp32 [G, N]; sorted values, their midpoints, their codes."""

    scale: Tensor
    inverse: Tensor
    values: Tensor
    midpoints: Tensor
    order: Tensor

    def nearest(self, w: Tensor, group: int) -> tuple[Tensor, Tensor]:
        places = torch.bucketize(w * self.inverse[group], self.midpoints, out_int32=True)
        values = self.values.index_select(0, places.flatten()).view(places.shape)
        return places, values.mul_(self.scale[group])

    def codes(self, places: Tensor, groups: Tensor) -> Tensor:
        return self.order[places]

    def places(self, count: int) -> Tensor:
        return torch.empty(count, self.scale.shape[1], dtype=torch.int32, device=self.scale.device)


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, with zero kept off the way bitsandbytes does."""
    return 1.0 / torch.where(scale < 0, scale.clamp(max=-_SMALLEST_ABSMAX), scale.clamp(min=_SMALLEST_ABSMAX))


@lru_cache(maxsize=32)
def codebook(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The fp32 table of the values on a device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache(maxsize=32)
def _bins(values: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """A look-up that finds the nearest value with one comparison, in place of a search over 15 midpoints.

    [-1, 1] is cut into even bins so narrow that each holds at most one midpoint. Returns, for every bin, the
    number of midpoints below it (uint8 [bins]) and its own or else the next midpoint (fp32 [bins]); and the code
    of each place in the sorted values (None where they are sorted already).
    """
    table = codebook(values, device)
    order = torch.argsort(table, stable=True)
    ordered = table[order]
    midpoints = torch.cat([(ordered[:-1] + ordered[1:]) / 2, table.new_tensor([torch.inf])])
    edges = torch.arange(_BINS + 1, dtype=torch.float64, device=device) * (2 / _BINS) - 1
    # a ratio within a rounding error of an edge may fall on either side of it: bins reach over their edges a little
    low = torch.searchsorted(midpoints.double(), edges[:-1] - 1e-6)
    high = torch.searchsorted(midpoints.double(), edges[1:] + 1e-6)
    if int((high - low).max()) > 1:
        raise ValueError(f"{_BINS} bins are too few for values as close as {float(ordered.diff().min()):g}")
    is_sorted = bool((order == torch.arange(len(values), device=device)).all())
    return low.to(torch.uint8), midpoints[low], None if is_sorted else order.to(torch.uint8)


NF4 = CodebookFormat("nf4", NF4_VALUES)
FP4 = CodebookFormat("fp4", FP4_VALUES)
