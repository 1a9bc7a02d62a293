"""The plain torch oracle of every op: slow, obvious, any device and dtype; never imports triton.

W is [N, K] (out, in), cut along K into G groups. The tensors of a stored weight ("portable" layout):

=============  =======================  ==================================================================
qweight        uint8 [N, ceil(K*b/8)]   codes along K, a dense little-endian bit stream a row
scales         float [N, G], or uint8   uint8: indices into ``scales_map``: double quantization
scales_absmax  fp32 [ceil(N*G/256)]     double quantization: one a 256 scales, row-major over [N, G]
scales_offset  fp32 [1]                 double quantization: scale = map[code] * absmax + offset
scales_map     fp32 [256]               double quantization: the values of the codes
zeros          uint8 [N, ceil(G*b/8)]   zero points, packed like the codes; absent: 2^(b-1)
g_idx          int32 [K]                the group of each input channel; absent: k // (K / G)
=============  =======================  ==================================================================

Integers: ``W = scale * (code - zero)``. nf4, fp4: ``W = CODEBOOKS[format][code] * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .codebooks import CODEBOOKS

BITS = {"nf4": 4, "fp4": 4, "int8": 8, "int4": 4, "int3": 3, "int2": 2}

SCALE_BLOCK = 256


@dataclass(frozen=True)
class Weight:
    """The tensors of one stored weight; see the table above. ``shape`` is (N, K)."""

    format: str
    shape: tuple[int, int]
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    scales_absmax: Tensor | None = None
    scales_offset: Tensor | None = None
    scales_map: Tensor | None = None
    g_idx: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.scales.shape[1]


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 bit stream [R, ceil(count*bits/8)] -> uint8 codes [R, count]."""
    first = torch.arange(count, device=packed.device) * bits
    stream = torch.nn.functional.pad(packed, (0, 1)).to(torch.int32)
    low, shift = first // 8, first % 8
    word = stream[:, low] | (stream[:, low + 1] << 8)
    return ((word >> shift) & ((1 << bits) - 1)).to(torch.uint8)


def scales(w: Weight) -> Tensor:
    """The scales, fp32 [N, G], double quantization undone."""
    if w.scales.dtype != torch.uint8:
        return w.scales.float()
    assert w.scales_absmax is not None and w.scales_offset is not None and w.scales_map is not None
    flat = w.scales_map[w.scales.flatten().to(torch.int32)]
    absmax = w.scales_absmax.repeat_interleave(SCALE_BLOCK)[: flat.numel()]
    return (flat * absmax + w.scales_offset).view(w.scales.shape)


def dequantize(w: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [N, K], computed in fp32 (fp64 where asked for) and rounded once to ``dtype``."""
    bits, (_, width) = BITS[w.format], w.shape
    work = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack_codes(w.qweight, bits, width)
    group = (
        w.g_idx.long()
        if w.g_idx is not None
        else torch.arange(width, device=codes.device) // (width // w.groups)
    )
    scale = scales(w).to(work)[:, group]
    if w.format in CODEBOOKS:
        table = torch.tensor(CODEBOOKS[w.format], dtype=torch.float32, device=codes.device)
        return (table[codes.to(torch.int32)].to(work) * scale).to(dtype)
    zero: Tensor | int = 1 << (bits - 1)
    if w.zeros is not None:
        zero = unpack_codes(w.zeros, bits, w.groups)[:, group].to(work)
    return ((codes.to(work) - zero) * scale).to(dtype)


def matmul(x: Tensor, w: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ W^T (+ bias [N]) -> [..., N] in x's dtype, the way eager code does it in that dtype."""
    return torch.nn.functional.linear(x, dequantize(w, x.dtype), None if bias is None else bias.to(x.dtype))


def matmul_backward(grad: Tensor, w: Weight) -> Tensor:
    """Gradient of :func:`matmul` to x: grad [..., N] @ W -> [..., K]."""
    return grad @ dequantize(w, grad.dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [M, K] -> (int8 [M, K], fp32 scale [M]); q = round(x * 127 / absmax), ties to even."""
    absmax = x.abs().amax(dim=-1).float()
    # a division of tensors: torch computes number / tensor as a product with the reciprocal, one rounding more
    # below 2^-120 the quotient may be no finite number: such a token counts as zero
    inverse = torch.where(absmax >= 2.0**-120, absmax.new_tensor(127.0) / absmax, 0.0)
    return (x.float() * inverse[:, None]).round_().to(torch.int8), absmax / 127.0


def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """bool [K]: the input channels with an activation of at least ``threshold`` (0: none) in some row of x
    [M, K]."""
    if threshold <= 0 or x.shape[0] == 0:
        return torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
    return x.abs().amax(dim=0) >= threshold


def int8_dynamic_matmul(x: Tensor, w: Weight, bias: Tensor | None = None, threshold: float = 0.0) -> Tensor:
    """x [M, K] @ W^T with x rounded to int8 a token, except its outlier columns (LLM.int8, arXiv:2208.07339).

    W is int8 per channel without zero points. The sum over the ordinary columns is exact in integers.
    """
    outlier = outlier_columns(x, threshold)
    q, scale = quantize_tokens(x.masked_fill(outlier, 0))
    codes = unpack_codes(w.qweight, 8, w.shape[1]).to(torch.int16) - 128
    exact = (q.double() @ codes.double().T).float()
    out = exact * scale[:, None] * scales(w)[:, 0]
    if bool(outlier.any()):
        out += (x[:, outlier].float() @ codes[:, outlier].float().T) * scales(w)[:, 0]
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)
