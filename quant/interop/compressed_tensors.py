"""compressed-tensors, format "pack-quantized". W [N, K], G groups a row, b bits; every word is an int32.

=================  ======================  ======================================================
weight_packed      [N, ceil(K*b/32)]       codes along K; they say code - 2^(b-1), so a symmetric zero is 2^(b-1)
weight_scale       [N, G], a float dtype   [N, 1] for one scale a row
weight_shape       int64 [2]               N, K
weight_zero_point  [ceil(N*b/32), G]       asymmetric only: zero points along N, stored as the codes are
weight_g_idx       int32 [K]               only with actorder "group"
=================  ======================  ======================================================

Source: compressed-tensors 0.15, compressors/pack_quantized. Older versions left gaps in the words of 3 bits;
those are told by their width and refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import QuantSpec
from ..formats import FORMATS
from ..packing import pack_codes, packed_width, unpack_codes
from ..tensor import QuantizedTensor, Shape, groups_per_row
from .gptq import permutes
from .restate import Unfit
from .words import to_bytes, to_words


@dataclass(frozen=True)
class PackedWeight:
    """One weight of a pack-quantized checkpoint; ``scale_dtype`` is what scales are written in, by torch's name."""

    scale_dtype: str = "float16"

    def target(self, spec: QuantSpec, shape: Shape) -> QuantSpec:
        """The spec under which a weight of ``spec`` is stored here; 2 and 3 bits in codes of 4, which loaders know.

        Raises:
            Unfit: no integers, or permuted groups: version 0.20 loads such weights without a word, and wrongly.
        """
        if not spec.format.startswith("int") or spec.format not in ("int2", "int3", "int4", "int8"):
            raise Unfit(f"pack-quantized holds integers, not {spec.format}")
        if permutes(spec) and groups_per_row(spec, shape) > 1:
            raise Unfit(
                "its groups are no neighbouring channels, and compressed-tensors no longer reads a g_idx"
            )
        wide = "int8" if spec.format == "int8" else "int4"
        return dataclasses.replace(spec, format=wide, scale_dtype=self.scale_dtype, double_quant=False)

    def write(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """Tensor by last name of a weight whose spec is what :meth:`target` gave."""
        bits = FORMATS[q.spec.format].bits
        out = {
            "weight_packed": to_words(q.tensors["qweight"]),
            "weight_scale": q.tensors["scales"],
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        zero = q.params().zero
        if zero is not None:
            out["weight_zero_point"] = to_words(pack_codes(zero.t().contiguous(), bits)).t().contiguous()
        if "g_idx" in q.tensors:
            out["weight_g_idx"] = q.tensors["g_idx"]
        return out

    def read(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QuantizedTensor:
        """Inverse of :meth:`write`. Raises ValueError where ``weight_shape`` says another shape."""
        bits = FORMATS[spec.format].bits
        said = tuple(tensors["weight_shape"].tolist())
        if said != shape:
            raise ValueError(f"weight_shape says {list(said)}, the tensors are of {list(shape)}")
        out = {
            "qweight": to_bytes(tensors["weight_packed"], packed_width(shape[1], bits)),
            "scales": tensors["weight_scale"].contiguous(),
        }
        if not spec.symmetric:
            words = tensors["weight_zero_point"].t().contiguous()
            fields = unpack_codes(to_bytes(words, packed_width(shape[0], bits)), bits, shape[0])
            out["zeros"] = pack_codes(fields.t().contiguous(), bits)
        if permutes(spec) and groups_per_row(spec, shape) > 1:
            out["g_idx"] = tensors["weight_g_idx"].to(torch.int32)
        return QuantizedTensor(spec, shape, out)
