"""A weight as the compiled code reads it: the struct of ``native_weights.h``, over the tensors as they are stored."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from . import reference
from .reference import Weight

# of activations, decoded weights and scales, by their numbers there
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_DOUBLE = 3
# bytes of codes that a lane holds, by bits
_LANE = {2: 4, 3: 12, 4: 4, 8: 1}
# a strip of rows, chunk by chunk, has its scales on a thread's stack
_MOST_GROUPS = 2048


class NativeWeight(ctypes.Structure):
    """``weight``; whoever makes one holds the tensors while it is in use."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "values", "absmax", "map", "offset")
    ] + [
        (name, ctypes.c_int64)
        for name in ("n", "k", "groups", "bits", "scale_kind", "zero_packed", "integers")
    ]


def takes(fmt: str, width: int, groups: int, library: ctypes.CDLL) -> bool:
    """Whether products take rows of ``width`` codes in ``groups``: chunks of whole groups or groups of whole
    chunks, and lanes of one group."""
    bits = reference.BITS.get(fmt)
    if bits not in _LANE or not 0 < groups <= _MOST_GROUPS or width < 1 or width * bits % (8 * groups):
        return False
    lane = _LANE[bits]
    chunk, group = lane * library.brise_lanes(), width * bits // 8 // groups
    if width * bits // 8 > _MOST_GROUPS * chunk:
        return False
    return group % lane == 0 and (groups == 1 or group % chunk == 0 or chunk % group == 0)


def decodes(fmt: str, width: int, groups: int, library: ctypes.CDLL) -> bool:
    """Whether rows of ``width`` codes in ``groups`` can be decoded: 4 or 8 bits, groups of whole vectors."""
    bits = reference.BITS.get(fmt)
    return (
        bits in (4, 8)
        and 0 < groups <= _MOST_GROUPS
        and width > 0
        and width * bits % (8 * groups * library.brise_lanes()) == 0
    )


def stored(w: Weight) -> Weight:
    """``w`` with tensors that lie in memory as the compiled code reads them; as a rule it is ``w`` itself."""
    scales = w.scales
    if scales.dtype not in DTYPES and scales.dtype != torch.uint8:
        scales = scales.float()
    tensors = (w.qweight, scales, w.zeros, w.scales_absmax, w.scales_offset, w.scales_map)
    if scales is w.scales and all(t is None or t.is_contiguous() for t in tensors):
        return w
    return Weight(w.format, w.shape, *(None if t is None else t.contiguous() for t in tensors))  # type: ignore[arg-type]


def described(w: Weight) -> NativeWeight:
    """The struct over the tensors of a weight that is :func:`stored`; zeros are packed codes, or fp32 [N, G]."""
    double = w.scales.dtype == torch.uint8
    packed = w.zeros is not None and w.zeros.dtype == torch.uint8
    return NativeWeight(
        *addresses(
            w.qweight, w.scales, w.zeros, values(w.format, w.zeros is not None),
            *((w.scales_absmax, w.scales_map, w.scales_offset) if double else (None, None, None)),
        ),
        *w.shape, w.groups, reference.BITS[w.format], _DOUBLE if double else DTYPES[w.scales.dtype], packed,
        w.format not in reference.CODEBOOKS,
    )  # fmt: skip


@lru_cache(maxsize=16)
def values(fmt: str, has_zero: bool) -> Tensor:
    """What the low 4 bits of a code stand for, fp32 [16]; with fewer bits the higher ones are another code's."""
    count = 1 << min(4, reference.BITS[fmt])
    middle = 0 if has_zero else count // 2
    found = reference.CODEBOOKS.get(fmt) or [float(code - middle) for code in range(count)]
    return torch.tensor(found, dtype=torch.float32).repeat(16 // count)


def addresses(*tensors: Tensor | None) -> list[int | None]:
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous(), "the compiled code knows no strides"
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
