"""AWQ in its GEMM layout, 4 bits with zero points. W [N, K], G groups a row; every word is an int32.

=======  ============  =====================================================================
qweight  [K, N/8]      nibble i of a word holds output channel 8w + (0, 2, 4, 6, 1, 3, 5, 7)[i]
qzeros   [G, N/8]      the same order, nothing subtracted
scales   fp16 [G, N]
=======  ============  =====================================================================

weight = scales * (code - zero). Source: AutoAWQ, awq/modules/linear/gemm.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import QuantSpec
from ..formats import FORMATS
from ..packing import pack_codes, unpack_codes
from ..tensor import QuantizedTensor, Shape, groups_per_row
from .restate import Unfit
from .words import to_bytes, to_words

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AWQWeight:
    """One weight of an AWQ checkpoint."""

    def target(self, spec: QuantSpec, shape: Shape) -> QuantSpec:
        """The spec under which a weight of ``spec`` is stored here.

        Raises:
            Unfit: more than 4 bits or no integers, permuted groups, or a size that does not fill the words.
        """
        if not spec.format.startswith("int") or FORMATS[spec.format].bits > 4:
            raise Unfit(f"AWQ holds integers of 4 bits, not {spec.format}")
        if getattr(spec.options, "permutes_groups", False) and groups_per_row(spec, shape) > 1:
            raise Unfit("its groups are no neighbouring channels (act-order with a g_idx)")
        if shape[0] % 8:
            raise Unfit(f"{shape[0]} output channels do not fill words of 8")
        return dataclasses.replace(
            spec,
            format="int4",
            symmetric=False,
            scale=_asymmetric(spec),
            double_quant=False,
            scale_dtype="float16",
        )

    def write(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """Tensor by last name of a weight whose spec is what :meth:`target` gave."""
        zero = q.params().zero
        assert zero is not None, "target() asks for zero points"
        return {
            "qweight": _interleave(q.codes().t()),
            "qzeros": _interleave(zero.t()),
            "scales": q.tensors["scales"].t().contiguous(),
        }

    def read(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QuantizedTensor:
        """Inverse of :meth:`write`."""
        out = {
            "qweight": pack_codes(_deinterleave(tensors["qweight"], shape[0]).t().contiguous(), 4),
            "zeros": pack_codes(_deinterleave(tensors["qzeros"], shape[0]).t().contiguous(), 4),
            "scales": tensors["scales"].t().contiguous(),
        }
        return QuantizedTensor(spec, shape, out)


def _asymmetric(spec: QuantSpec) -> str:
    """The scale rule of a spec, where zero points allow it."""
    return "absmax" if spec.scale == "absmax_narrow" else spec.scale


def _interleave(codes: Tensor) -> Tensor:
    """uint8 codes [R, N] -> int32 words [R, N/8]."""
    eights = codes.unflatten(1, (-1, 8))[..., torch.tensor(ORDER)]
    return to_words(pack_codes(eights.flatten(1), 4))


def _deinterleave(words: Tensor, count: int) -> Tensor:
    """int32 words [R, N/8] -> uint8 codes [R, N]."""
    eights = unpack_codes(to_bytes(words, count // 2), 4, count).unflatten(1, (-1, 8))
    return eights[..., torch.argsort(torch.tensor(ORDER))].flatten(1)
