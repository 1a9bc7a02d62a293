"""The same weight under another spec: what a conversion keeps exactly, what it rounds, and what it cannot say.

Codes are never chosen anew here. An integer weight ``scale * (code - zero)`` keeps its value when code and zero
move together, so it fits wider codes, and a fixed zero point where the range allows it; a group may be cut into
smaller ones that repeat its scale. Only scales are ever rounded, to the dtype that the target stores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import QuantSpec
from ..formats import FORMATS
from ..integer import IntegerFormat
from ..minimum import MinimumFormat
from ..packing import pack_codes, unpack_codes
from ..tensor import Params, QuantizedTensor, Shape, groups_per_row, load_scales, store_scales


class Unfit(ValueError):
    """A weight that cannot be said under the spec that is asked for; the message says why."""


@dataclass(frozen=True)
class Restated:
    """Parameters under the target: exact ones for storage, and what the move does to the old ones.

    Attributes:
        params: scales fp32 [N, G'], zero points uint8 [N, G'] or None, g_idx.
        shift: what is added to the codes, int16 [N, G'], or None for nothing.
        rounding: the largest relative change of a scale that storing it makes; 0.0 where all are kept.
    """

    params: Params
    shift: Tensor | None
    rounding: float


def check_restate(q: QuantizedTensor, target: QuantSpec) -> Restated:
    """Whether and how ``q`` can be said under ``target``; reads scales and zero points, not the codes.

    Raises:
        Unfit: the grid of the target does not hold these values, or a scale overflows its dtype.
    """
    params = _regroup(q.params(), q.spec, target, q.shape)
    if isinstance(FORMATS[target.format], MinimumFormat) and target.format != q.spec.format:
        return _with_minimum(q, params, target)
    zero, shift = _move(params.zero, q.spec, target, params.scale)
    try:
        stored = load_scales(store_scales(params.scale, target), target)
    except ValueError as error:
        raise Unfit(str(error)) from None
    if _same_scales(q.spec, target, q.shape):
        stored = params.scale
    return Restated(Params(params.scale, zero, params.g_idx), shift, relative_change(params.scale, stored))


def restate(q: QuantizedTensor, target: QuantSpec) -> QuantizedTensor:
    """``q`` under the spec ``target``. Raises Unfit as :func:`check_restate` does."""
    if q.spec == target:
        return q
    how = check_restate(q, target)
    same = _same_scales(q.spec, target, q.shape)
    if same:
        tensors = {n: t for n, t in q.tensors.items() if n.startswith("scales")}
    else:
        tensors = store_scales(how.params.scale, target)
    bits = FORMATS[target.format].bits
    if how.shift is None and bits == FORMATS[q.spec.format].bits:
        tensors["qweight"] = q.tensors["qweight"]
    else:
        tensors["qweight"] = pack_codes(_shifted(q, how), bits)
    if isinstance(FORMATS[target.format], MinimumFormat):
        assert how.params.zero is not None
        tensors["minimums"] = how.params.zero.to(getattr(torch, target.scale_dtype))
    elif how.params.zero is not None:
        tensors["zeros"] = pack_codes(how.params.zero, bits)
    if how.params.g_idx is not None:
        tensors["g_idx"] = how.params.g_idx
    return QuantizedTensor(target, q.shape, tensors)


def relative_change(before: Tensor, after: Tensor) -> float:
    """The largest ``|after - before| / |before|``; a zero that stays zero is no change."""
    change = (after - before).abs() / before.abs()
    return float(change.nan_to_num_(nan=0.0).max()) if change.numel() else 0.0


def _with_minimum(q: QuantizedTensor, params: Params, target: QuantSpec) -> Restated:
    """``scale * (code - zero)`` as ``scale * code + minimum``: the product of scale and zero point is rounded."""
    fmt = FORMATS[q.spec.format]
    if not isinstance(fmt, IntegerFormat) or fmt.bits > FORMATS[target.format].bits:
        raise Unfit(f"{q.spec.format} values lie on another grid than {target.format}'s")
    dtype = getattr(torch, target.scale_dtype)
    minimum = -params.scale * (fmt.middle if params.zero is None else params.zero)
    scale, stored = params.scale.to(dtype).float(), minimum.to(dtype).float()
    if not bool(scale.isfinite().all() and stored.isfinite().all()):
        raise Unfit(f"a scale or minimum does not fit {target.scale_dtype}")
    rounding = max(relative_change(params.scale, scale), relative_change(minimum, stored))
    return Restated(Params(params.scale, minimum), None, rounding)


def _same_scales(spec: QuantSpec, target: QuantSpec, shape: Shape) -> bool:
    """Whether the stored scales can be taken over as they are, double-quantized ones among them."""
    return (
        spec.double_quant == target.double_quant
        and (spec.double_quant or spec.scale_dtype == target.scale_dtype)
        and groups_per_row(spec, shape) == groups_per_row(target, shape)
    )


def _regroup(params: Params, spec: QuantSpec, target: QuantSpec, shape: Shape) -> Params:
    have, want = groups_per_row(spec, shape), groups_per_row(target, shape)
    if params.g_idx is not None and not getattr(target.options, "permutes_groups", False):
        raise Unfit("its groups are no neighbouring channels (act-order with a g_idx)")
    if have == want:
        return params
    if want % have or params.g_idx is not None:
        raise Unfit(f"{have} groups a row cannot be said as {want}")
    repeat = want // have
    zero = None if params.zero is None else params.zero.repeat_interleave(repeat, dim=1)
    return Params(params.scale.repeat_interleave(repeat, dim=1), zero)


def _move(
    zero: Tensor | None, spec: QuantSpec, target: QuantSpec, scale: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Zero points under the target, and what the codes move by (None: nothing)."""
    old, new = FORMATS[spec.format], FORMATS[target.format]
    if not (isinstance(old, IntegerFormat) and isinstance(new, IntegerFormat)):
        if spec.format != target.format:
            raise Unfit(f"{spec.format} values lie on another grid than {target.format}'s")
        return zero, None
    if new.bits < old.bits:
        raise Unfit(f"{spec.format} has more values than {target.format}")
    before = torch.full_like(scale, old.middle, dtype=torch.int16) if zero is None else zero.to(torch.int16)
    after = torch.full_like(before, new.middle) if target.symmetric else before + (new.middle - old.middle)
    shift = after - before
    low, high = int(shift.min()), int(shift.max())
    if low < 0 or old.top + high > new.top:
        raise Unfit(f"its zero points {int(before.min())} to {int(before.max())} need an asymmetric grid")
    return (None if target.symmetric else after.to(torch.uint8)), (shift if high else None)


def _shifted(q: QuantizedTensor, how: Restated) -> Tensor:
    codes = unpack_codes(q.tensors["qweight"], FORMATS[q.spec.format].bits, q.shape[1])
    if how.shift is None:
        return codes
    shift = how.shift.to(torch.uint8)
    if how.params.g_idx is not None:
        return codes + shift[:, how.params.g_idx.long()]
    return codes + shift.repeat_interleave(q.shape[1] // shift.shape[1], dim=1)
