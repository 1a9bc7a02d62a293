"""GPTQ as gptqmodel and AutoGPTQ store it. W [N, K], G groups a row, b bits; every word is an int32.

=======  ===================  ==========================================================
qweight  [K*b/32, N]          codes along K, as one dense little-endian bit stream a column
qzeros   [G, N*b/32]          zero points along N, the same order; v1 stores them minus one
scales   fp16 [G, N]
g_idx    int32 [K]            the group of each input channel
=======  ===================  ==========================================================

weight = scales[g_idx[k], n] * (code - zero). Source: gptqmodel 7.7, nn_modules/qlinear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import QuantSpec
from ..formats import FORMATS
from ..gptq import GPTQOptions
from ..packing import pack_codes, packed_width, unpack_codes
from ..tensor import QuantizedTensor, Shape, groups_per_row
from .restate import Unfit
from .words import to_bytes, to_words

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class GPTQWeight:
    """One weight of a GPTQ checkpoint; ``version`` 1 ("gptq") or 2 ("gptq_v2")."""

    version: int

    def target(self, spec: QuantSpec, shape: Shape) -> QuantSpec:
        """The spec under which a weight of ``spec`` is stored here.

        Raises:
            Unfit: not integers, or sizes that do not fill the words.
        """
        if spec.format not in {f"int{bits}" for bits in BITS}:
            raise Unfit(f"GPTQ holds integers of {', '.join(map(str, BITS))} bits, not {spec.format}")
        bits = FORMATS[spec.format].bits
        for what, size in (("output", shape[0]), ("input", shape[1])):
            if size * bits % 32:
                raise Unfit(f"{size} {what} channels of {bits} bits do not fill words of 32")
        if self.version == 1 and not spec.symmetric:
            # gptqmodel takes such a file only where it says that gptqmodel itself wrote it
            raise Unfit("loaders of GPTQ version 1 take no zero points from others; gptq_v2 holds them")
        return dataclasses.replace(spec, scale_dtype="float16", double_quant=False)

    def write(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """Tensor by last name of a weight whose spec is what :meth:`target` gave.

        Raises:
            Unfit: a zero point of 0, which wraps in version 1 and spoils its neighbours.
        """
        bits = FORMATS[q.spec.format].bits
        groups = groups_per_row(q.spec, q.shape)
        zero = q.params().zero
        if zero is None:
            zero = torch.full((q.shape[0], groups), 1 << (bits - 1), dtype=torch.uint8)
        if self.version == 1:
            if not bool(zero.all()):
                raise Unfit(
                    "it has zero points of 0, which GPTQ version 1 (zero minus one) cannot store; gptq_v2 can"
                )
            zero = zero - 1
        g_idx = q.tensors.get("g_idx")
        if g_idx is None:
            g_idx = plain_groups(q.shape[1], groups)
        return {
            "qweight": to_words(q.tensors["qweight"]).t().contiguous(),
            "qzeros": to_words(pack_codes(zero.t().contiguous(), bits)),
            "scales": q.tensors["scales"].t().contiguous(),
            "g_idx": g_idx,
        }

    def read(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QuantizedTensor:
        """Inverse of :meth:`write`.

        Raises:
            ValueError: zero points that contradict a symmetric ``spec`` or this version.
        """
        bits = FORMATS[spec.format].bits
        rows, width = shape
        zero = self._zeros(tensors["qzeros"], bits, rows, spec.symmetric)
        out = {
            "qweight": to_bytes(tensors["qweight"].t(), packed_width(width, bits)),
            "scales": tensors["scales"].t().contiguous(),
        }
        if not spec.symmetric:
            out["zeros"] = pack_codes(zero, bits)
        if permutes(spec) and groups_per_row(spec, shape) > 1:
            out["g_idx"] = tensors["g_idx"]
        return QuantizedTensor(spec, shape, out)

    def _zeros(self, words: Tensor, bits: int, rows: int, symmetric: bool) -> Tensor:
        """Zero points uint8 [N, G] of the words [G, N*b/32]."""
        fields = unpack_codes(to_bytes(words, packed_width(rows, bits)), bits, rows)
        top, middle = (1 << bits) - 1, 1 << (bits - 1)
        label = f"checkpoint_format is gptq{'' if self.version == 1 else '_v2'}"
        if symmetric:
            expected = middle - (self.version == 1)
            if bool((fields == expected).all()):
                return (fields + (self.version == 1)).t().contiguous()
            other = middle if self.version == 1 else middle - 1
            if bool((fields == other).all()):
                raise ValueError(
                    f"{label}, but every stored zero point is {other}, as in version "
                    f"{3 - self.version}: the label is wrong"
                )
            raise ValueError(
                f"the config says symmetric, so every stored zero point must be {expected}; "
                f"found {int(fields.min())} to {int(fields.max())}"
            )
        if self.version == 1:
            if int(fields.max()) == top:
                raise ValueError(
                    f"{label}, but a stored zero point is {top}: version 1 stores zero minus one, so this is a "
                    "zero that wrapped and spoiled its neighbours, or a file of version 2; save it as gptq_v2"
                )
            fields = fields + 1
        return fields.t().contiguous()


def plain_groups(width: int, groups: int) -> Tensor:
    """The g_idx of groups of neighbouring channels: int32 [K], k // g."""
    return torch.arange(width, dtype=torch.int32) // (width // groups)


def permutes(spec: QuantSpec) -> bool:
    """Whether a spec stores a g_idx (where it has more than one group)."""
    return bool(getattr(spec.options, "permutes_groups", False))


def act_order_options() -> GPTQOptions:
    """The options of a weight that comes with groups of channels that are no neighbours."""
    return GPTQOptions(act_order=True, static_groups=False)
