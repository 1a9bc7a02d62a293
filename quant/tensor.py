"""QuantizedTensor: the named tensors of one quantized weight, exactly as they go to disk.

=================  =======================  ==================================================================
name               dtype                    shape (W is [N, K], G groups a row, b bits)
=================  =======================  ==================================================================
qweight            uint8                    [N, ceil(K*b/8)], codes along K in the order of :mod:`.packing`
scales             spec.scale_dtype         [N, G]; uint8 codes with double quantization
scales_absmax      float32                  [ceil(N*G/256)], double quantization only
scales_offset      float32                  [1], double quantization only
zeros              uint8                    [N, ceil(G*b/8)], asymmetric integers only
minimums           spec.scale_dtype         [N, G], formats with a minimum (:mod:`.minimum`) only
g_idx              int32                    [K], the group of each input channel; only where it is not k // g
=================  =======================  ==================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ConfigError, QuantSpec
from .double_quant import BLOCK, dequantize_scales, quantize_scales
from .formats import FORMATS
from .minimum import MinimumFormat
from .packing import pack_codes, packed_width, unpack_codes

Shape = tuple[int, int]


@dataclass(frozen=True)
class Params:
    """What decodes codes [N, K]: scale fp32 [N, G]; zero uint8, or minimum fp32, [N, G] or None; g_idx int32 [K]."""

    scale: Tensor
    zero: Tensor | None = None
    g_idx: Tensor | None = None

    def rows(self, part: slice) -> Params:
        """Those of some rows, without a copy."""
        return Params(self.scale[part], None if self.zero is None else self.zero[part], self.g_idx)

    def per_channel(self, columns: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero spread over the input channels: [N, K] each."""
        if self.g_idx is not None:
            index = self.g_idx.long()
            return self.scale[:, index], None if self.zero is None else self.zero[:, index]
        width = columns // self.scale.shape[1]
        zero = None if self.zero is None else self.zero.repeat_interleave(width, dim=1)
        return self.scale.repeat_interleave(width, dim=1), zero


def groups_per_row(spec: QuantSpec, shape: Shape) -> int:
    """Number of groups G of a row.

    Raises:
        ConfigError: the width is no multiple of the group size.
    """
    width = shape[1]
    if spec.group_size is None:
        return 1
    if width % spec.group_size:
        divisors = [g for g in (16, 32, 64, 96, 128, 256) if width % g == 0]
        fits = f"group_size {' or '.join(map(str, divisors))} fits, " if divisors else ""
        raise ConfigError(
            f"width {width} is no multiple of group_size {spec.group_size}; "
            f"{fits}null (per channel) always fits"
        )
    return width // spec.group_size


def layout(spec: QuantSpec, shape: Shape) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor that a weight of this spec and shape [N, K] stores."""
    rows, width = shape
    groups = groups_per_row(spec, shape)
    bits = FORMATS[spec.format].bits
    out: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "qweight": (torch.uint8, (rows, packed_width(width, bits)))
    }
    if spec.double_quant:
        out["scales"] = (torch.uint8, (rows, groups))
        out["scales_absmax"] = (torch.float32, (-(-rows * groups // BLOCK),))
        out["scales_offset"] = (torch.float32, (1,))
    else:
        out["scales"] = (getattr(torch, spec.scale_dtype), (rows, groups))
    if isinstance(FORMATS[spec.format], MinimumFormat):
        out["minimums"] = (getattr(torch, spec.scale_dtype), (rows, groups))
    elif not spec.symmetric:
        out["zeros"] = (torch.uint8, (rows, packed_width(groups, bits)))
    if getattr(spec.options, "permutes_groups", False) and groups > 1:
        out["g_idx"] = (torch.int32, (width,))
    return out


def store_scales(scale: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """fp32 scales [N, G] -> the tensors that hold them on disk.

    Raises:
        ValueError: a scale does not fit the storage dtype.
    """
    if spec.double_quant:
        codes, absmax, offset = quantize_scales(scale)
        return {"scales": codes, "scales_absmax": absmax, "scales_offset": offset}
    stored = scale.to(getattr(torch, spec.scale_dtype))
    if not bool(stored.isfinite().all()):
        largest = float(scale.abs().max())
        raise ValueError(
            f"a scale of {largest:.3g} does not fit {spec.scale_dtype}: set scale_dtype to float32"
        )
    return {"scales": stored}


def load_scales(tensors: dict[str, Tensor], spec: QuantSpec) -> Tensor:
    """Inverse of :func:`store_scales`: fp32 [N, G]."""
    if spec.double_quant:
        return dequantize_scales(tensors["scales"], tensors["scales_absmax"], tensors["scales_offset"])
    return tensors["scales"].to(torch.float32)


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight of ``shape`` (N, K): a plain record, not a torch.Tensor subclass."""

    spec: QuantSpec
    shape: Shape
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        expected = layout(self.spec, self.shape)
        if set(self.tensors) != set(expected):
            raise ValueError(f"expected the tensors {sorted(expected)}, got {sorted(self.tensors)}")
        for name, (dtype, shape) in expected.items():
            got = self.tensors[name]
            if got.dtype != dtype or tuple(got.shape) != shape:
                raise ValueError(
                    f"{name} of a {self.spec.format} weight {list(self.shape)} must be {dtype} {list(shape)}, "
                    f"got {got.dtype} {list(got.shape)}"
                )

    @classmethod
    def assemble(cls, spec: QuantSpec, codes: Tensor, params: Params) -> QuantizedTensor:
        """Pack codes uint8 [N, K] and their exact (not yet stored) parameters."""
        bits = FORMATS[spec.format].bits
        tensors = {"qweight": pack_codes(codes, bits), **store_scales(params.scale, spec)}
        if isinstance(FORMATS[spec.format], MinimumFormat):
            assert params.zero is not None
            tensors["minimums"] = params.zero.to(getattr(torch, spec.scale_dtype))
        elif params.zero is not None:
            tensors["zeros"] = pack_codes(params.zero, bits)
        if params.g_idx is not None:
            tensors["g_idx"] = params.g_idx.to(torch.int32)
        return cls(spec, (codes.shape[0], codes.shape[1]), tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def codes(self) -> Tensor:
        """Unpacked codes, uint8 [N, K]."""
        return unpack_codes(self.tensors["qweight"], FORMATS[self.spec.format].bits, self.shape[1])

    def params(self, start: int = 0, stop: int | None = None) -> Params:
        """Scales and zero points of rows ``start`` to ``stop`` as a reader sees them, after storage rounded them."""
        rows = slice(start, stop)
        zero = None
        if "minimums" in self.tensors:
            zero = self.tensors["minimums"][rows].to(torch.float32)
        if "zeros" in self.tensors:
            groups = self.tensors["scales"].shape[1]
            zero = unpack_codes(self.tensors["zeros"][rows], FORMATS[self.spec.format].bits, groups)
        return Params(load_scales(self.tensors, self.spec)[rows], zero, self.tensors.get("g_idx"))

    def split(self, sizes: list[int]) -> list[QuantizedTensor]:
        """Cut into weights of ``sizes`` rows each; ValueError with double quantization, which ties rows together."""
        if self.spec.double_quant:
            raise ValueError(
                "double-quantized scales share blocks across rows: such a weight cannot be split by rows"
            )
        parts = {n: [t] * len(sizes) if n == "g_idx" else t.split(sizes) for n, t in self.tensors.items()}
        return [
            QuantizedTensor(
                self.spec, (rows, self.shape[1]), {n: t[i].contiguous() for n, t in parts.items()}
            )
            for i, rows in enumerate(sizes)
        ]

    def dequantize(
        self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Rows ``start`` to ``stop`` of the weight [N, K], computed in fp32 and rounded once to ``dtype``."""
        from .dequantize import dequantize_rows

        return dequantize_rows(self, start, self.shape[0] if stop is None else stop, dtype)
