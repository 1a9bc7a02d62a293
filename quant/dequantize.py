"""Codes back to weights, a range of rows at a time, so that the whole fp32 matrix never has to exist.

By the compiled code of :mod:`brise.kernels.native`, where that is; without, a byte of two 4-bit codes indexes a table
of 256 pairs, so that two weights cost one look-up.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import native
from .formats import FORMATS
from .minimum import MinimumFormat
from .packing import unpack_codes
from .workers import Workers

if TYPE_CHECKING:
    from .config import QuantSpec
    from .tensor import Params, QuantizedTensor

# weights decoded at a time: larger pieces leave the caches, smaller ones are spent on calling operators
_CHUNK = 1 << 18
# weights below which threads are not worth their start
_MANY = 1 << 20


def dequantize_rows(q: QuantizedTensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows ``start`` to ``stop`` of the weight [N, K], computed in fp32 and rounded once to ``dtype``; on all cores."""
    packed, params = q.tensors["qweight"][start:stop], q.params(start, stop)
    rows, width = packed.shape[0], q.shape[1]
    if packed.device.type != "cpu" or rows * width < _MANY or native.active() is not None:
        return decode_packed(packed, params, q.spec, width, dtype)
    out = torch.empty(rows, width, dtype=dtype)
    with Workers() as workers:
        step = -(-rows // (4 * workers.count))
        parts = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
        workers.map(lambda part: _decode_into(out[part], packed[part], params.rows(part), q.spec), parts)
    return out


def decode_packed(packed: Tensor, params: Params, spec: QuantSpec, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of packed codes uint8 [R, B] and their parameters -> weights [R, ``width``]."""
    out = torch.empty(packed.shape[0], width, dtype=dtype, device=packed.device)
    _decode_into(out, packed, params, spec)
    return out


def _decode_into(out: Tensor, packed: Tensor, params: Params, spec: QuantSpec) -> None:
    if native.decode_into(out, packed, spec.format, params.scale, params.zero, params.g_idx):
        return
    fmt = FORMATS[spec.format]
    rows, width = out.shape
    groups = params.scale.shape[1]
    pairs = None
    step = max(1, _CHUNK // max(1, width))
    if fmt.bits == 4 and params.g_idx is None and width % 2 == 0 and not isinstance(fmt, MinimumFormat):
        pairs = _pairs(spec.format, spec.symmetric, packed.device)
        # one memory for all chunks: fresh pages would cost as much as the decoding
        index = torch.empty(min(step, rows) * width // 2, dtype=torch.int32, device=packed.device)
        values = (
            None if out.dtype == torch.float32 else torch.empty(min(step, rows), width, device=packed.device)
        )
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        codes = packed[part]
        target = out[part]
        scale, zero = params.scale[part], None if params.zero is None else params.zero[part]
        if pairs is not None:
            weights = target if values is None else values[: len(target)]
            bytes_ = index[: codes.numel()].copy_(codes.reshape(-1))
            torch.index_select(pairs, 0, bytes_, out=weights.view(torch.int64).view(-1))
            grouped = weights.view(-1, groups, width // groups)
            if zero is not None:
                grouped.sub_(zero[..., None])
            grouped.mul_(scale[..., None])
            if weights is not target:
                target.copy_(weights)
            continue
        unpacked = unpack_codes(codes, fmt.bits, width)
        if params.g_idx is not None:
            channels = params.g_idx.long()
            target.copy_(
                fmt.decode(unpacked, scale[:, channels], None if zero is None else zero[:, channels])
            )
        else:
            zero = None if zero is None else zero[..., None]
            target.copy_(fmt.decode(unpacked.unflatten(1, (groups, -1)), scale[..., None], zero).flatten(1))


@lru_cache(maxsize=16)
def _pairs(format: str, symmetric: bool, device: torch.device) -> Tensor:
    """The two unscaled fp32 weights of every byte as one int64 [256], the low nibble first in memory."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    codes = torch.stack([byte & 15, byte >> 4], dim=1)
    zero = None if symmetric else torch.zeros((), device=device)
    weights = FORMATS[format].decode(codes, torch.ones((), device=device), zero)
    return weights.contiguous().view(torch.int64).flatten()
