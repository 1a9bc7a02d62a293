"""Where the quantized weights of another library's folder are: one function a library.

Each goes by the tensors that are there and holds them against ``quantization_config``; see :mod:`.stored`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...quant.config import QuantSpec
from ...quant.interop import awq, bitsandbytes, compressed_tensors, gptq
from ...quant.interop.restate import Unfit
from ..reader import CheckpointReader
from ..safetensors_header import CheckpointError
from .stored import (
    Entry,
    Stored,
    cut,
    expect,
    group_size_of,
    integer,
    leaves_of,
    make_spec,
    modules,
    names_sym,
    order_of,
    refuse,
    shape_of,
)

# gptqmodel's names for bitsandbytes' tensors -> transformers'
_GPTQMODEL_BNB = {
    "weight_absmax": "weight.absmax",
    "weight_quant_map": "weight.quant_map",
    "weight_nested_absmax": "weight.nested_absmax",
    "weight_nested_quant_map": "weight.nested_quant_map",
}


@dataclass(frozen=True)
class _Args:
    """What one group of a compressed-tensors config says of its weights."""

    bits: int
    symmetric: bool
    group_size: int | None

    def groups(self, width: int) -> int:
        return 1 if self.group_size is None else math.ceil(width / self.group_size)

    def __str__(self) -> str:
        return f"{self.bits} bits, group {self.group_size}, {'' if self.symmetric else 'a'}symmetric"


def _config_groups(entry: Entry, where: str) -> list[_Args]:
    groups = entry.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(
            f"{where}: config_groups of compressed-tensors must be an object, got {cut(groups)}"
        )
    out = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"{where}: {cut(name)} of config_groups says nothing of weights")
        if group.get("input_activations") is not None or group.get("output_activations") is not None:
            raise CheckpointError(f"{where}: {cut(name)} quantizes activations, which is not read")
        strategy = weights.get("strategy")
        if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
            raise CheckpointError(
                f"{where}: {cut(name)} is {cut(weights.get('type'))} by {cut(strategy)}; int by group or "
                "channel is read"
            )
        size = integer(weights, "group_size", where) if strategy == "group" else None
        if size is not None and size < 1:
            refuse(where, "group_size", size, "a positive number")
        out.append(_Args(integer(weights, "num_bits", where), weights.get("symmetric", True) is True, size))
    return out


def find_gptq(reader: CheckpointReader, entry: Entry, where: str) -> dict[str, Stored]:
    """The weights of a GPTQ folder.

    Raises:
        CheckpointError: a config or tensors that make no GPTQ checkpoint.
    """
    version = {"gptq": 1, "gptq_v2": 2}.get(str(entry.get("checkpoint_format", entry.get("format", "gptq"))))
    if version is None:
        refuse(where, "checkpoint_format", entry.get("checkpoint_format"), "gptq or gptq_v2")
    if entry.get("pack_dtype", "int32") != "int32":
        refuse(where, "pack_dtype", entry["pack_dtype"], "int32")
    bits, group = integer(entry, "bits", where), integer(entry, "group_size", where, -1)
    mixed = bool(entry.get("dynamic"))
    if bits not in gptq.BITS:
        refuse(where, "bits", bits, " or ".join(map(str, gptq.BITS)))
    out = {}
    for path, names in modules(reader, "qweight").items():
        leaves = leaves_of(path, names, {"qweight", "qzeros", "scales"}, {"g_idx", "bias"}, reader)
        words, rows = shape_of(reader, leaves["qweight"], torch.int32, 2)
        groups = shape_of(reader, leaves["scales"], None, 2)[0]
        width = (
            shape_of(reader, leaves["g_idx"], torch.int32, 1)[0] if "g_idx" in leaves else words * 32 // bits
        )
        own = words * 32 // width if width else 0
        if own not in gptq.BITS or (own != bits and not mixed) or words * 32 != width * own:
            raise CheckpointError(
                f"{reader.folder}: {leaves['qweight']} [{words}, {rows}] holds {width} channels of {own} bits; "
                f"the config says bits {bits}"
            )
        size = group_size_of(path, width, groups, None if mixed else group, where)
        expect(reader, leaves["qzeros"], torch.int32, (groups, math.ceil(rows * own / 32)))
        expect(reader, leaves["scales"], None, (groups, rows))
        options = None
        if "g_idx" in leaves and groups > 1:
            options = order_of(reader, leaves["g_idx"], width, groups)
        sym = entry.get("sym", False) is True and not (mixed and names_sym(entry["dynamic"]))
        spec = make_spec(f"int{own}", size, sym, reader.info(leaves["scales"])[0], options, leaves["scales"])
        out[path] = Stored(gptq.GPTQWeight(version), spec, (rows, width), leaves)
    return out


def find_awq(reader: CheckpointReader, entry: Entry, where: str) -> dict[str, Stored]:
    """The weights of an AWQ folder in the GEMM layout. Raises CheckpointError as :func:`find_gptq` does."""
    version = str(entry.get("version", entry.get("checkpoint_format", "gemm"))).lower()
    if version != "gemm":
        refuse(where, "version", version, "gemm")
    if integer(entry, "bits", where, integer(entry, "w_bit", where, 4)) != 4:
        refuse(where, "bits", entry.get("bits"), "4")
    group = integer(entry, "group_size", where, integer(entry, "q_group_size", where, 128))
    out = {}
    for path, names in modules(reader, "qweight").items():
        leaves = leaves_of(path, names, {"qweight", "qzeros", "scales"}, {"bias"}, reader)
        width, words = shape_of(reader, leaves["qweight"], torch.int32, 2)
        rows, groups = words * 8, shape_of(reader, leaves["scales"], None, 2)[0]
        size = group_size_of(path, width, groups, group, where)
        expect(reader, leaves["qzeros"], torch.int32, (groups, words))
        expect(reader, leaves["scales"], None, (groups, rows))
        spec = make_spec("int4", size, False, reader.info(leaves["scales"])[0], None, leaves["scales"])
        out[path] = Stored(awq.AWQWeight(), spec, (rows, width), leaves)
    return out


def find_compressed_tensors(reader: CheckpointReader, entry: Entry, where: str) -> dict[str, Stored]:
    """The weights of a pack-quantized folder. Raises CheckpointError as :func:`find_gptq` does."""
    if entry.get("format") != "pack-quantized":
        refuse(where, "format", entry.get("format"), "pack-quantized")
    if entry.get("quantization_status", "compressed") != "compressed":
        refuse(where, "quantization_status", entry["quantization_status"], "compressed")
    groups_said = _config_groups(entry, where)
    out = {}
    for path, names in modules(reader, "weight_packed").items():
        needed = {"weight_packed", "weight_scale", "weight_shape"}
        leaves = leaves_of(path, names, needed, {"weight_zero_point", "weight_g_idx", "bias"}, reader)
        expect(reader, leaves["weight_shape"], torch.int64, (2,))
        said = reader.tensor(leaves["weight_shape"]).tolist()
        rows, words = shape_of(reader, leaves["weight_packed"], torch.int32, 2)
        width = said[1]
        groups = shape_of(reader, leaves["weight_scale"], None, 2)[1]
        fitting = [bits for bits in (2, 3, 4, 8) if math.ceil(width * bits / 32) == words]
        args = next(
            (
                a
                for a in groups_said
                if a.bits in fitting
                and a.symmetric == ("weight_zero_point" not in leaves)
                and a.groups(width) == groups
            ),
            None,
        )
        if said[0] != rows or not 0 < width < 2**31 or args is None:
            raise CheckpointError(
                f"{reader.folder}: {path} has {words} words, {groups} scales a row and weight_shape {said}, which "
                f"no group in {where} describes ({', '.join(map(str, groups_said))})"
            )
        expect(reader, leaves["weight_scale"], None, (rows, groups))
        if not args.symmetric:
            zeros = (math.ceil(rows * args.bits / 32), groups)
            expect(reader, leaves["weight_zero_point"], torch.int32, zeros)
        options = None
        if "weight_g_idx" in leaves and groups > 1:
            expect(reader, leaves["weight_g_idx"], None, (width,))
            options = order_of(reader, leaves["weight_g_idx"], width, groups)
        size = group_size_of(path, width, groups, None, where)
        scale_dtype = reader.info(leaves["weight_scale"])[0]
        spec = make_spec(
            f"int{args.bits}", size, args.symmetric, scale_dtype, options, leaves["weight_scale"]
        )
        out[path] = Stored(compressed_tensors.PackedWeight(), spec, (rows, width), leaves)
    return out


def find_bitsandbytes(reader: CheckpointReader, entry: Entry, where: str) -> dict[str, Stored]:
    """The weights of a bitsandbytes folder, 4 bits or LLM.int8. Raises CheckpointError as :func:`find_gptq` does."""
    if entry.get("load_in_8bit") is True or entry.get("_load_in_8bit") is True:
        return _find_int8(reader)
    if entry.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        refuse(where, "bnb_4bit_quant_storage", entry["bnb_4bit_quant_storage"], "uint8")
    out = {}
    for name in reader.names:
        path, dot, _ = name.partition(".weight.quant_state.")
        if not dot:
            path, dot, _ = name.partition(".weight_quant_state")
        if not dot:
            continue
        try:
            state = bitsandbytes.read_state(reader.tensor(name))
            spec: QuantSpec | None = bitsandbytes.spec_of_state(state)
        except Unfit:
            spec = None
        except ValueError as error:
            raise CheckpointError(f"{reader.folder}: {name}: {error}") from error
        kind: str = state["quant_type"]
        rows, width = state["shape"]
        names = [n for n in reader.names if n.startswith((f"{path}.weight.", f"{path}.weight_"))]
        leaves = {"weight": f"{path}.weight"}
        for own in (n.removeprefix(f"{path}.") for n in names):
            leaves[_GPTQMODEL_BNB.get(own, own)] = f"{path}.{own}"
        key = bitsandbytes.STATE + kind
        if leaves.pop("weight_quant_state", None) is not None:
            leaves[key] = name
        blocks = math.ceil(rows * width / state["blocksize"])
        nested = "nested_offset" in state
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (torch.uint8, (math.ceil(rows * width / 2), 1)),
            "weight.absmax": (torch.uint8 if nested else torch.float32, (blocks,)),
            "weight.quant_map": (torch.float32, (16,)),
            key: reader.info(name),
        }
        if nested:
            expected["weight.nested_absmax"] = (torch.float32, (math.ceil(blocks / 256),))
            expected["weight.nested_quant_map"] = (torch.float32, (256,))
        if set(leaves) != set(expected):
            unlike = ", ".join(sorted(set(leaves) ^ set(expected)))
            raise CheckpointError(f"{reader.folder}: {path} lacks, or has too many of, {unlike}")
        for own, (dtype, shape) in expected.items():
            expect(reader, leaves[own], dtype, shape)
        decode = None if spec is not None else bitsandbytes.decode4
        out[path] = Stored(bitsandbytes.Bits4Weight(), spec, (rows, width), leaves, decode)
    return out


def _find_int8(reader: CheckpointReader) -> dict[str, Stored]:
    out = {}
    for path in [name.removesuffix(".SCB") for name in reader.names if name.endswith(".SCB")]:
        leaves = {leaf: f"{path}.{leaf}" for leaf in ("weight", "SCB")}
        if f"{path}.weight" not in reader.names:
            raise CheckpointError(f"{reader.folder}: {path}.SCB is there without {path}.weight")
        rows, width = shape_of(reader, leaves["weight"], torch.int8, 2)
        expect(reader, leaves["SCB"], torch.float32, (rows,))
        if f"{path}.weight_format" in reader.names:
            leaves["weight_format"] = f"{path}.weight_format"
            expect(reader, leaves["weight_format"], torch.uint8, ())
        spec = QuantSpec(format="int8", group_size=None, scale_dtype="float32")
        out[path] = Stored(bitsandbytes.Int8Weight(), spec, (rows, width), leaves)
    return out
