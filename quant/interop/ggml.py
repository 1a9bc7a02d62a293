"""Blocks of 32 weights of llama.cpp: Q4_0, Q4_1 and Q8_0. A row [K] is K/32 blocks, one after the other.

====  =====  =================================================================  ==================
type  bytes  a block                                                            weight
====  =====  =================================================================  ==================
Q4_0  18     fp16 d; 16 bytes, the j-th with weight j low and weight j+16 high  d * (code - 8)
Q4_1  20     fp16 d; fp16 m; the same 16 bytes                                  d * code + m
Q8_0  34     fp16 d; 32 int8                                                    d * code
====  =====  =================================================================  ==================

Source: ggml, ggml-common.h (block_q4_0, block_q4_1, block_q8_0).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import QuantSpec
from ..formats import FORMATS
from ..packing import pack_codes
from ..tensor import QuantizedTensor, Shape
from .restate import Unfit

BLOCK = 32


@dataclass(frozen=True)
class BlockWeight:
    """One weight of a GGUF type: our format for it, whether it has a minimum, bytes a block."""

    name: str
    format: str
    block_bytes: int

    @property
    def spec(self) -> QuantSpec:
        """What a weight of this type is here; the scales of Q4_0 may be negative."""
        return QuantSpec(format=self.format, group_size=BLOCK, symmetric=self.format != "int4_min")

    def target(self, spec: QuantSpec, shape: Shape) -> QuantSpec:
        """The spec under which a weight of ``spec`` is stored here.

        Raises:
            Unfit: codes that are wider or no integers, permuted groups, or rows that are no whole blocks.
        """
        if not spec.format.startswith("int"):
            raise Unfit(f"{self.name} holds integers, not {spec.format}")
        if FORMATS[spec.format].bits > FORMATS[self.format].bits:
            raise Unfit(f"{spec.format} has more values than {self.name}")
        if shape[1] % BLOCK:
            raise Unfit(f"{shape[1]} input channels are no multiple of {self.name}'s block of {BLOCK}")
        if getattr(spec.options, "permutes_groups", False) and spec.group_size not in (None, shape[1]):
            raise Unfit("its groups are no neighbouring channels (act-order with a g_idx)")
        if self.format == "int4_min":
            return self.spec
        return dataclasses.replace(
            self.spec, algorithm=spec.algorithm, options=spec.options, scale=spec.scale
        )

    def write(self, q: QuantizedTensor) -> Tensor:
        """Rows of blocks, uint8 [N, K/32 * bytes], of a weight whose spec is what :meth:`target` gave."""
        rows, width = q.shape
        codes = q.codes().view(rows, width // BLOCK, BLOCK)
        parts = [_halves(q.tensors["scales"])]
        if self.format == "int4_min":
            parts.append(_halves(q.tensors["minimums"]))
        if self.format == "int8":
            parts.append(codes ^ 0x80)
        else:
            parts.append(codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4))
        return torch.cat(parts, dim=-1).flatten(1)

    def read(self, blocks: Tensor, spec: QuantSpec, shape: Shape) -> QuantizedTensor:
        """Inverse of :meth:`write`.

        Raises:
            ValueError: not the bytes that the shape takes.
        """
        rows, width = shape
        groups = width // BLOCK
        if blocks.dtype != torch.uint8 or tuple(blocks.shape) != (rows, groups * self.block_bytes):
            raise ValueError(
                f"{self.name} of {list(shape)} takes uint8 {[rows, groups * self.block_bytes]}, got "
                f"{blocks.dtype} {list(blocks.shape)}"
            )
        data = blocks.reshape(rows, groups, self.block_bytes)
        out = {"scales": _floats(data[..., :2])}
        at = 2
        if self.format == "int4_min":
            out["minimums"] = _floats(data[..., 2:4])
            at = 4
        codes = data[..., at:]
        codes = codes ^ 0x80 if self.format == "int8" else torch.cat([codes & 15, codes >> 4], dim=-1)
        out["qweight"] = pack_codes(codes.flatten(1), FORMATS[self.format].bits)
        return QuantizedTensor(spec, shape, out)


class NoBlock:
    """A file whose weights are not quantized."""

    def target(self, spec: QuantSpec, shape: Shape) -> QuantSpec:
        """Raise Unfit: everything is decoded."""
        raise Unfit("the file holds no quantized weights")


def _halves(values: Tensor) -> Tensor:
    """fp16 [N, G] -> its bytes, uint8 [N, G, 2]."""
    return values.reshape(-1).contiguous().view(torch.uint8).view(*values.shape, 2)


def _floats(data: Tensor) -> Tensor:
    """uint8 [N, G, 2] -> fp16 [N, G]."""
    return data.reshape(-1).contiguous().view(torch.float16).view(data.shape[:-1])


Q4_0 = BlockWeight("Q4_0", "int4", 18)
Q4_1 = BlockWeight("Q4_1", "int4_min", 20)
Q8_0 = BlockWeight("Q8_0", "int8", 34)
BLOCKS = {block.name: block for block in (Q4_0, Q4_1, Q8_0)}
