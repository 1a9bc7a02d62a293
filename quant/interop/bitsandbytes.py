"""bitsandbytes, by the names that transformers gives it. W [N, K], blocks of B weights of the flat matrix.

4 bits (nf4, fp4): weight uint8 [ceil(N*K/2), 1], row-major, the even weight in the HIGH nibble; absmax fp32
[ceil(N*K/B)], or uint8 codes of it with nested_absmax fp32 [ceil(blocks/256)] and nested_quant_map fp32 [256];
quant_map fp32 [16]; quant_state, JSON in uint8. 8 bits: weight int8 [N, K]; SCB fp32 [N], the rows' absmax;
weight_format uint8, 0. weight = code * SCB / 127.

Source: bitsandbytes 0.50, functional.py (QuantState) and nn/modules.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import QuantSpec
from ..double_quant import BLOCK, dequantize_scales, dynamic_map
from ..formats import FORMATS
from ..nf4 import CodebookFormat, codebook
from ..packing import pack_codes, unpack_codes
from ..tensor import Params, QuantizedTensor, Shape, groups_per_row
from .restate import Unfit, relative_change

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE = "weight.quant_state.bitsandbytes__"
_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}
# a quant_state is some 200 bytes
_MAX_STATE = 1 << 14


@dataclass(frozen=True)
class Bits4Weight:
    """One weight of a 4-bit checkpoint; ``dtype`` is the model's, by torch's name."""

    dtype: str = "float32"

    def target(self, spec: QuantSpec, shape: Shape) -> QuantSpec:
        """The spec under which a weight of ``spec`` is stored here.

        Raises:
            Unfit: not nf4 or fp4, or groups that are no block size of bitsandbytes.
        """
        if not isinstance(FORMATS[spec.format], CodebookFormat):
            raise Unfit(f"bitsandbytes' 4 bits are nf4 and fp4, not {spec.format}")
        block = spec.group_size or shape[1]
        if block not in BLOCKSIZES:
            raise Unfit(f"bitsandbytes has blocks of {', '.join(map(str, BLOCKSIZES))}, not {block}")
        if getattr(spec.options, "permutes_groups", False) and shape[1] > block:
            raise Unfit("its groups are no neighbouring channels (act-order with a g_idx)")
        return dataclasses.replace(spec, scale_dtype="float32")

    def write(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """Tensor by last names of a weight whose spec is what :meth:`target` gave."""
        flat = q.codes().flatten()
        # pack_codes puts the even code in the low nibble; theirs is in the high one
        packed = _swap_nibbles(pack_codes(flat, 4))
        state: dict[str, Any] = {
            "quant_type": q.spec.format,
            "blocksize": q.spec.group_size or q.shape[1],
            "dtype": self.dtype,
            "shape": list(q.shape),
        }
        values = FORMATS[q.spec.format].values  # type: ignore[attr-defined]
        out = {
            "weight": packed[:, None],
            "weight.absmax": q.tensors["scales"].flatten(),
            "weight.quant_map": codebook(values, torch.device("cpu")).clone(),
        }
        if q.spec.double_quant:
            state |= {
                "nested_blocksize": BLOCK,
                "nested_dtype": "float32",
                "nested_offset": float(q.tensors["scales_offset"]),
            }
            out["weight.nested_absmax"] = q.tensors["scales_absmax"]
            out["weight.nested_quant_map"] = dynamic_map(torch.device("cpu")).clone()
        text = json.dumps(state).encode()
        out[STATE + q.spec.format] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return out

    def read(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QuantizedTensor:
        """Inverse of :meth:`write`.

        Raises:
            ValueError: the tables are not those of the format, or the state contradicts spec or shape.
        """
        state = read_state(tensors[STATE + spec.format])
        if spec_of_state(state) != spec or tuple(state["shape"]) != shape:
            raise ValueError(f"quant_state {state} does not say {spec.format} {list(shape)}")
        values = FORMATS[spec.format].values  # type: ignore[attr-defined]
        if not torch.equal(tensors["weight.quant_map"], codebook(values, torch.device("cpu"))):
            raise ValueError(f"quant_map is not the table of {spec.format}")
        count = shape[0] * shape[1]
        codes = unpack_codes(_swap_nibbles(tensors["weight"].flatten()), 4, count).view(shape)
        groups = groups_per_row(spec, shape)
        out = {"qweight": pack_codes(codes, 4), "scales": tensors["weight.absmax"].view(shape[0], groups)}
        if spec.double_quant:
            if not torch.equal(tensors["weight.nested_quant_map"], dynamic_map(torch.device("cpu"))):
                raise ValueError("nested_quant_map is not bitsandbytes' dynamic map")
            out["scales_absmax"] = tensors["weight.nested_absmax"]
            out["scales_offset"] = torch.tensor([state["nested_offset"]], dtype=torch.float32)
        return QuantizedTensor(spec, shape, out)


@dataclass(frozen=True)
class Int8Weight:
    """One weight of an LLM.int8 checkpoint (arXiv:2208.07339)."""

    def target(self, spec: QuantSpec, shape: Shape) -> QuantSpec:
        """As :meth:`Bits4Weight.target`. Raises Unfit: not integers, or more than one group a row."""
        if not spec.format.startswith("int"):
            raise Unfit(f"LLM.int8 holds integers, not {spec.format}")
        if groups_per_row(spec, shape) != 1:
            raise Unfit("LLM.int8 has one scale a row")
        return dataclasses.replace(
            spec, format="int8", group_size=None, symmetric=True, double_quant=False, scale_dtype="float32"
        )

    def admit(self, params: Params) -> float:
        """The largest relative change of a scale by way of an absmax, which is 127 of it in float32."""
        return relative_change(params.scale, _absmax(params.scale) / 127)

    def write(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """Tensor by last name of a weight whose spec is what :meth:`target` gave."""
        return {
            "weight": (q.codes() ^ 0x80).view(torch.int8),
            "SCB": _absmax(q.tensors["scales"].flatten()),
            "weight_format": torch.zeros((), dtype=torch.uint8),
        }

    def read(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QuantizedTensor:
        """Inverse of :meth:`write`; ValueError for a weight_format other than row-major."""
        if "weight_format" in tensors and int(tensors["weight_format"]) != 0:
            raise ValueError(f"weight_format is {int(tensors['weight_format'])}, only 0 (row-major) is read")
        out = {
            "qweight": tensors["weight"].contiguous().view(torch.uint8) ^ 0x80,
            "scales": (tensors["SCB"].flatten() / 127)[:, None],
        }
        return QuantizedTensor(spec, shape, out)


def read_state(packed: Tensor) -> dict[str, Any]:
    """The JSON of a quant_state tensor, its keys and types checked.

    Raises:
        ValueError: it is not what bitsandbytes writes.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.numel() > _MAX_STATE:
        raise ValueError(f"quant_state must be a few bytes of JSON, got {packed.dtype} {list(packed.shape)}")
    try:
        state = json.loads(bytes(packed.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"quant_state is no JSON ({error})") from None
    if not isinstance(state, dict) or set(state) not in (_KEYS, _KEYS | _NESTED):
        raise ValueError(f"quant_state must have {', '.join(sorted(_KEYS))}, got {str(state)[:120]}")
    shape = state["shape"]
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and 0 < size < 2**31 for size in shape)
        and state["quant_type"] in ("nf4", "fp4")
        and state["blocksize"] in BLOCKSIZES
        and state.get("nested_blocksize", BLOCK) == BLOCK
        and state.get("nested_dtype", "float32") == "float32"
        and type(state.get("nested_offset", 0.0)) in (int, float)
    ):
        raise ValueError(f"quant_state has values that are not read: {str(state)[:200]}")
    return state


def spec_of_state(state: Mapping[str, Any]) -> QuantSpec:
    """The spec of a weight with this quant_state.

    Raises:
        Unfit: blocks that reach over rows, so that no row has groups of its own.
    """
    width, block = state["shape"][1], state["blocksize"]
    if width % block:
        raise Unfit(
            f"rows of {width} weights are no multiple of the block size {block}: blocks reach over rows"
        )
    return QuantSpec(format=state["quant_type"], group_size=block, double_quant="nested_offset" in state)


def decode4(tensors: Mapping[str, Tensor]) -> Tensor:
    """The fp32 weight [N, K] of a 4-bit weight whose blocks reach over rows, which no spec of ours describes.

    Raises:
        ValueError: there is no quant_state, or not what bitsandbytes writes.
    """
    leaf = next((name for name in tensors if name.startswith(STATE)), None)
    if leaf is None:
        raise ValueError("the weight has no quant_state")
    state = read_state(tensors[leaf])
    count = state["shape"][0] * state["shape"][1]
    absmax = tensors["weight.absmax"]
    if "nested_offset" in state:
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        absmax = dequantize_scales(absmax, tensors["weight.nested_absmax"], offset)
    codes = unpack_codes(_swap_nibbles(tensors["weight"].flatten()), 4, count)
    scale = absmax.repeat_interleave(state["blocksize"])[:count]
    return FORMATS[state["quant_type"]].decode(codes, scale).view(state["shape"])


def _absmax(scale: Tensor) -> Tensor:
    """fp32 absmax of rows of this scale. 127 times it may round to a neighbour of the number that gives it back."""
    absmax = scale * 127
    for near in (absmax.nextafter(torch.zeros(())), absmax.nextafter(torch.full((), math.inf))):
        absmax = torch.where((absmax / 127 != scale) & (near / 127 == scale), near, absmax)
    return absmax


def _swap_nibbles(packed: Tensor) -> Tensor:
    return (packed << 4) | (packed >> 4)
