"""The header of a safetensors file, read by hand so that nothing in it is believed before it is checked.

A file is 8 bytes (header length, little-endian), the header (JSON: name -> dtype, shape, begin and end), then
the tensors, each beginning where the one before it ends. Source: "Format" in the README of safetensors.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

# Far above any real file (a header takes about 120 bytes a tensor), far below what would hurt to parse.
MAX_JSON_BYTES = 16 << 20
_MAX_DIMS = 32
_MAX_DIM = 2**63 - 1

# in the order in which safetensors lays tensors out: the widest first, so that each lies at a multiple of its width
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked; the message names the file and the way out."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype, shape, and its bytes ``begin`` to ``end`` from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object, strictly: no key twice, not nested beyond reason.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise CheckpointError(f"{where}: the JSON is nested too deep to be a checkpoint's") from None
    except ValueError as error:  # covers UnicodeDecodeError, JSONDecodeError, and the key that came twice
        raise CheckpointError(f"{where}: expected a JSON object, got something else ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got a JSON {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} comes twice")
    return out


def read_header(file: BinaryIO, where: str) -> dict[str, Entry]:
    """Name -> :class:`Entry` of every tensor in an open safetensors file, checked against the file's size.

    Args:
        file: open for reading, binary, without a buffer that hides its size (any regular file).
        where: its name for messages.

    Raises:
        CheckpointError: cut short, a header that is larger than the file or absurd, not JSON, an unknown
            dtype, a shape that disagrees with the bytes given to it, or tensors that overlap, leave gaps or
            end elsewhere than the file does.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise CheckpointError(f"{where}: {size} bytes are too few for a safetensors file; fetch it again")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{where}: the header claims {length} bytes, more than the {MAX_JSON_BYTES} that are read; "
            "this is no safetensors file, or a damaged one"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{where}: the header claims {length} bytes, but the file has only {size - 8} after its length: "
            "the file is truncated or damaged; fetch it again"
        )
    header = parse_json(file.read(length), f"{where}: header")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(f"{where}: __metadata__ must map names to strings, got {_short(metadata)}")
    entries = {name: _entry(name, value, 8 + length, where) for name, value in header.items()}
    _check_offsets(entries, 8 + length, size, where)
    return entries


def _entry(name: str, value: Any, start: int, where: str) -> Entry:
    which = f"{where}: {_short(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{which} must have dtype, shape and data_offsets, got {_short(value)}")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{which} has the dtype {_short(value['dtype'])}, expected one of {', '.join(DTYPES)}"
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not _naturals(shape) or len(shape) > _MAX_DIMS:
        raise CheckpointError(
            f"{which} has the shape {_short(shape)}, expected at most {_MAX_DIMS} sizes >= 0"
        )
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{which} has the offsets {_short(offsets)}, expected [begin, end]")
    expected = dtype.itemsize
    for dim in shape:
        expected *= dim
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{which} is {value['dtype']} {_short(shape)}, which takes {_short(expected)} bytes, "
            f"but its offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _check_offsets(entries: dict[str, Entry], start: int, size: int, where: str) -> None:
    end, last = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end:
            raise CheckpointError(f"{where}: {_short(name)} overlaps {last}: the file is damaged")
        if entry.begin > end:
            raise CheckpointError(
                f"{where}: {entry.begin - end} bytes between {last} and {_short(name)} belong to no tensor: "
                "the file is damaged"
            )
        end, last = entry.end, _short(name)
    if end > size:
        raise CheckpointError(
            f"{where} is truncated: its header describes {end} bytes, the file has {size}; fetch it again"
        )
    if end < size:
        raise CheckpointError(
            f"{where}: its header describes {end} bytes, the file has {size}: what follows belongs to no "
            "tensor; the file is damaged"
        )


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= _MAX_DIM for v in value)


def _short(value: Any) -> str:
    """What a hostile file holds, cut to a length that a message can bear."""
    text = str(value) if isinstance(value, int) and abs(value) < 2**128 else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
