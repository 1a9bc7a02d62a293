"""Several quantized weights with the same inputs as one: their rows below one another.

Nothing is stored twice: the parts become views of the whole. They stay what they were, so a state dict shows them and
never the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.checks import TENSORS
from ..kernels.ops import PackedWeight
from .formats import IMPORTED
from .linear import QuantLinear
from .tensor import QuantizedTensor

# rows of one tile of the kernels' layout, see kernels/layout.py
_TILE_ROWS = 16


class RowsOfWhole(QuantLinear):
    """Some rows of a larger weight, whose packed tensors it reads; it is multiplied, saved and moved as any other."""

    def _weight(self, layout: str) -> PackedWeight:
        # a tile's scales lie row by row of groups, so those of some rows only are no contiguous block
        w = super()._weight(layout)
        return dataclasses.replace(w, tensors={name: t.contiguous() for name, t in w.tensors.items()})


def why_not(parts: Sequence[QuantLinear]) -> str | None:
    """Why these weights cannot be one, in words; None where they can."""
    stored = [part.quantized() for part in parts]
    kinds = {
        (s.format, s.group_size, s.symmetric, s.double_quant, s.scale_dtype, part.in_features)
        for part in parts
        for s in (part.spec,)
    }
    if len(kinds) > 1:
        return "they are stored in different ways, or have different inputs"
    if any(part.bias is not None for part in parts):
        return "they have biases"
    if parts[0].spec.format in IMPORTED:
        return f"no kernel reads {parts[0].spec.format}"
    if parts[0].spec.double_quant:
        return "double-quantized scales have an offset for each weight"
    if any(part.out_features % _TILE_ROWS for part in parts):
        return f"their rows are no multiples of {_TILE_ROWS}, of which the kernels make a tile"
    if parts[0].spec.format == "int3" and stored[0].tensors["qweight"].is_cuda:
        return "the kernels keep the bits of int3 in two planes, which cannot be cut by rows"
    orders = [q.tensors.get("g_idx") for q in stored]
    first = orders[0]
    same = all(o is first or (o is not None and first is not None and torch.equal(o, first)) for o in orders)
    return None if same else "the orders of their groups differ"


def fuse(parts: Sequence[QuantLinear], dtype: torch.dtype) -> tuple[QuantLinear, list[QuantLinear]]:
    """The parts as one weight, made ready for activations of ``dtype``.

    Returns:
        the whole [sum of rows, K], and modules to take the places of the parts, which share its storage.
    Raises:
        ValueError: see :func:`why_not`.
    """
    reason = why_not(parts)
    if reason is not None:
        raise ValueError(f"these weights cannot be one: {reason}")
    stored = [part.quantized() for part in parts]
    tensors = {
        name: t if name == "g_idx" else torch.cat([q.tensors[name] for q in stored])
        for name, t in stored[0].tensors.items()
    }
    shape = (sum(q.shape[0] for q in stored), stored[0].shape[1])
    whole = QuantLinear.from_quantized(QuantizedTensor(stored[0].spec, shape, tensors))
    cut: list[QuantLinear] = []
    start = 0
    for part in parts:
        rows = slice(start, start + part.out_features)
        start = rows.stop
        views = {name: t if name == "g_idx" else t[rows] for name, t in tensors.items()}
        cut.append(RowsOfWhole.from_quantized(QuantizedTensor(part.spec, part.shape, views)))
    del stored, tensors
    whole.prepare(dtype)
    if whole._buffers["qweight"] is None:
        start = 0
        for part in cut:
            _read_tiles(part, whole, start)
            start += part.out_features
    return whole, cut


def _read_tiles(part: QuantLinear, whole: QuantLinear, start: int) -> None:
    """Let the part read its rows, from ``start`` on, of the whole's tiles, and give up its stored tensors."""
    stop = start + part.out_features
    for name in TENSORS:
        packed: Tensor | None = whole._buffers["packed_" + name]
        if packed is None:
            continue
        if name == "qweight":
            width = packed.numel() // whole.out_features
            part._buffers["packed_" + name] = packed[start * width : stop * width]
        else:
            part._buffers["packed_" + name] = packed[:, start:stop]
    for name in part.quantized().tensors:
        part._buffers[name] = None
    part.layout = whole.layout
    part._prepared = whole._prepared
