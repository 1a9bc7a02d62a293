"""Plain rounding of large weights: some rows at a time, on every core, never the whole weight in fp32.

The result is :func:`.rtn.rtn`'s to the bit. Each thread takes rows from where they lie, rounds them and packs them
while they are in its cache; what joins all rows, the double quantization of scales, is done between two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .config import QuantSpec
from .dequantize import decode_packed
from .formats import FORMATS
from .packing import pack_codes
from .scales import choose_params
from .tensor import Params, QuantizedTensor, Shape, groups_per_row, layout, load_scales, store_scales

B = TypeVar("B")
# rows start to stop of a weight [N, K], in any float dtype
Rows = Callable[[int, int], Tensor]
# weights of a piece: in fp32 they and what is computed of them stay in a core's L2 cache
_PIECE = 1 << 17


class Pieces(Protocol):
    """Who computes on the pieces of a weight, and where. :class:`.workers.Workers` is one.

    Attributes:
        device: where the pieces are handed out.
        piece: weights of a piece; None for what suits the caches of this machine's cores.
    """

    device: torch.device
    piece: int | None

    def each(
        self, function: Callable[[slice, Tensor], B], rows: Rows, parts: Sequence[slice], again: bool = False
    ) -> list[B]:
        """The function's values for each part and its rows, which are on ``device``, in the order of the parts.

        Args:
            again: they are the rows and parts of the last call, which may have been kept.
        """
        ...

    def back(self, tensor: Tensor) -> Tensor:
        """A tensor of ``device`` in this machine's own memory, whole when the work is over."""
        ...


@dataclass(frozen=True)
class Rounded:
    """A rounded weight; ``error`` is ||W - Q||_F^2, ``norm`` ||W||_F^2."""

    tensor: QuantizedTensor
    error: float
    norm: float


def round_rows(rows: Rows, shape: Shape, spec: QuantSpec, workers: Pieces) -> Rounded:
    """Round a weight of ``shape`` (N, K) plainly, as ``spec`` (algorithm rtn) says.

    On another device the same bits come out where scales are not searched: a search adds up errors, in another order.

    Raises:
        NonFiniteError: the weight holds NaN or infinity.
        ConfigError: the width is no multiple of the group.
    """
    fmt = FORMATS[spec.format]
    count, width = shape
    groups = groups_per_row(spec, shape)
    device = workers.device
    scale = torch.empty(count, groups, device=device)
    zero = None if spec.symmetric else torch.empty(count, groups, dtype=torch.uint8, device=device)
    packed = torch.empty(layout(spec, shape)["qweight"][1], dtype=torch.uint8, device=device)
    # with double quantization what a scale is stored as depends on all of them
    stored_apart = not spec.double_quant

    def encode(part: slice, w: Tensor, used: Tensor) -> None:
        grouped = w.unflatten(1, (groups, -1))
        z = None if zero is None else zero[part][..., None]
        packed[part] = pack_codes(fmt.encode(grouped, used[..., None], z).flatten(1), fmt.bits)

    def lost(part: slice, w: Tensor, used: Tensor) -> Tensor:
        params = Params(used, None if zero is None else zero[part])
        return _squared(w - decode_packed(packed[part], params, spec, width, torch.float32))

    def first(part: slice, stored_rows: Tensor) -> tuple[Tensor, Tensor | None]:
        w = stored_rows.to(torch.float32)
        exact = choose_params(w, spec)
        scale[part] = exact.scale
        if zero is not None and exact.zero is not None:
            zero[part] = exact.zero
        stored = load_scales(store_scales(exact.scale, spec), spec) if stored_apart else exact.scale
        if stored_apart or fmt.codes_from_exact_scale:
            encode(part, w, exact.scale if fmt.codes_from_exact_scale else stored)
        return _squared(w), lost(part, w, stored) if stored_apart else None

    step = max(1, (workers.piece or _PIECE) // width)
    parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    sums = workers.each(first, rows, parts)
    norm = sum(float(s[0]) for s in sums)
    error = sum(0.0 if s[1] is None else float(s[1]) for s in sums)
    # double quantization takes their mean, a sum, and the same bits are wanted of every device
    stored_scales = store_scales(scale.cpu(), spec)
    if not stored_apart:
        seen = load_scales(stored_scales, spec).to(device)

        def second(part: slice, stored_rows: Tensor) -> Tensor:
            w = stored_rows.to(torch.float32)
            if not fmt.codes_from_exact_scale:
                encode(part, w, seen[part])
            return lost(part, w, seen[part])

        error = sum(float(e) for e in workers.each(second, rows, parts, again=True))
    tensors = {"qweight": workers.back(packed), **stored_scales}
    if zero is not None:
        tensors["zeros"] = pack_codes(zero.cpu(), fmt.bits)
    return Rounded(QuantizedTensor(spec, shape, tensors), error, norm)


def _squared(x: Tensor) -> Tensor:
    flat = x.flatten()
    return torch.dot(flat, flat)
