"""One quantized weight of another library's folder, and the checks that its tensors and its config go through.

Bits, groups and zero points are read off the shapes of the tensors, which cannot lie about themselves; the config
must then say the same. Patterns that a config brings along are never run: a regular expression may take for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from ...quant.config import ConfigError, QuantSpec
from ...quant.gptq import GPTQOptions
from ...quant.interop import gptq
from ...quant.tensor import QuantizedTensor, Shape
from ..reader import CheckpointReader
from ..safetensors_header import CheckpointError

Entry = Mapping[str, Any]
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


class WeightReader(Protocol):
    """One weight of another library, from its tensors by last name."""

    def read(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QuantizedTensor: ...


@dataclass(frozen=True)
class Stored:
    """One quantized weight: who reads it, what it becomes, and last name -> full name of its tensors.

    ``decode`` is there instead of a spec where no spec of ours holds it: it gives the fp32 weight.
    """

    reader: WeightReader
    spec: QuantSpec | None
    shape: Shape
    tensors: dict[str, str]
    decode: Callable[[Mapping[str, Tensor]], Tensor] | None = None


def modules(reader: CheckpointReader, leaf: str) -> dict[str, list[str]]:
    """Path -> names of all its tensors, for every module that has a tensor ``leaf``."""
    out: dict[str, list[str]] = {
        n.removesuffix(f".{leaf}"): [] for n in reader.names if n.endswith(f".{leaf}")
    }
    for name in reader.names:
        if (path := name.rpartition(".")[0]) in out:
            out[path].append(name)
    return out


def leaves_of(
    path: str, names: list[str], needed: set[str], allowed: set[str], reader: CheckpointReader
) -> dict[str, str]:
    leaves = {name.removeprefix(f"{path}."): name for name in names}
    if missing := sorted(needed - set(leaves)):
        raise CheckpointError(f"{reader.folder}: {path} has no {', '.join(missing)}")
    if extra := sorted(set(leaves) - needed - allowed):
        raise CheckpointError(
            f"{reader.folder}: {path} has {', '.join(extra)}, which belongs to no such weight"
        )
    leaves.pop("bias", None)
    return leaves


def shape_of(reader: CheckpointReader, name: str, dtype: torch.dtype | None, dims: int) -> tuple[int, ...]:
    got, shape = reader.info(name)
    if (dtype is not None and got != dtype) or len(shape) != dims or 0 in shape:
        raise CheckpointError(
            f"{reader.folder / reader.shard(name)}: {name} is {got} {list(shape)}, expected {dtype or 'floats'} of "
            f"{dims} sizes above 0"
        )
    return shape


def expect(reader: CheckpointReader, name: str, dtype: torch.dtype | None, shape: tuple[int, ...]) -> None:
    got, found = reader.info(name)
    if (dtype is not None and got != dtype) or found != shape:
        raise CheckpointError(
            f"{reader.folder / reader.shard(name)}: {name} is {got} {list(found)}, expected "
            f"{dtype or 'its dtype'} {list(shape)}"
        )


def group_size_of(path: str, width: int, groups: int, said: int | None, where: str) -> int | None:
    if width % groups:
        raise CheckpointError(
            f"{where}: {path} has {groups} groups in {width} channels; groups of unequal size are not read"
        )
    size = None if groups == 1 else width // groups
    if said is not None and (size or width) != (width if said == -1 else said):
        raise CheckpointError(f"{where}: group_size is {said}, but {path} has groups of {size or width}")
    return size


def order_of(reader: CheckpointReader, name: str, width: int, groups: int) -> GPTQOptions | None:
    """None where groups are of neighbouring channels, else options that keep a g_idx."""
    g_idx = reader.tensor(name).to(torch.int64)
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise CheckpointError(
            f"{reader.folder}: {name} must be 0..{groups - 1}, got {int(g_idx.min())}..{int(g_idx.max())}"
        )
    if torch.equal(g_idx, gptq.plain_groups(width, groups).to(torch.int64)):
        return None
    return gptq.act_order_options()


def make_spec(
    format: str, size: int | None, symmetric: bool, dtype: torch.dtype, options: GPTQOptions | None, name: str
) -> QuantSpec:
    if dtype not in _DTYPES:
        raise CheckpointError(f"{name} is {dtype}, expected float16, bfloat16 or float32")
    try:
        return QuantSpec(
            format=format,
            algorithm="rtn" if options is None else "gptq",
            group_size=size,
            symmetric=symmetric,
            scale_dtype=_DTYPES[dtype],
            options=options,
        )
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}") from error


def names_sym(dynamic: Any) -> bool:
    return isinstance(dynamic, Mapping) and any(
        "sym" in v for v in dynamic.values() if isinstance(v, Mapping)
    )


def integer(entry: Entry, key: str, where: str, default: int | None = None) -> int:
    value = entry.get(key, default)
    if type(value) is not int or not -1 <= value < 2**31:
        refuse(where, key, value, "an integer")
    return value


def refuse(where: str, key: str, got: Any, expected: str) -> NoReturn:
    raise CheckpointError(f"{where}: {key} of quantization_config is {cut(got)}, expected {expected}")


def cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
