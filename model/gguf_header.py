"""A GGUF file's header walked once, with bounds, before anything else believes it.

The ``gguf`` package reads whatever lengths a file claims, an object a value: a sparse file of a terabyte that claims
an array as long would keep it busy for ever. Here every length is held against what is left of the file, and the sum
of all values against a limit. Source: "GGUF", docs/gguf.md of ggml.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

# far above any real model: a vocabulary of 256,000 with merges takes some 30 MB and a million values
MAX_HEADER_BYTES = 256 << 20
MAX_VALUES = 1 << 23
MAX_NAMES = 1 << 16
_MAX_NAME = 1 << 16
_MAX_ELEMENTS = 2**62
_STRING, _ARRAY, _UINT32 = 8, 9, 4
# value type -> bytes
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class GGUFHeaderError(ValueError):
    """A header that is damaged, or made to be."""


def check_header(path: Path, sizes: Mapping[int, tuple[int, int]]) -> None:
    """Walk the header of a GGUF file and hold its tensors against the file's size.

    Args:
        sizes: tensor type -> (weights a block, bytes a block).

    Raises:
        GGUFHeaderError: lengths beyond the file or reason, a key or tensor that comes twice, an unknown type,
            tensors that overlap, end behind the file, or lie at odd places.
    """
    with path.open("rb") as file:
        _Walk(file, os.fstat(file.fileno()).st_size).run(sizes)


class _Walk:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.at = 0
        self.values = 0
        self.alignment = 32

    def run(self, sizes: Mapping[int, tuple[int, int]]) -> None:
        if self.take(4) != b"GGUF":
            raise GGUFHeaderError("it does not begin with GGUF")
        version = self.number("<I")
        if version not in (2, 3):
            raise GGUFHeaderError(f"it is of version {version}; 2 and 3 are read, little-endian")
        tensors, keys = self.number("<Q"), self.number("<Q")
        if tensors > MAX_NAMES or keys > MAX_NAMES:
            raise GGUFHeaderError(f"it claims {tensors} tensors and {keys} keys")
        seen: set[bytes] = set()
        for _ in range(keys):
            name = self.string(_MAX_NAME)
            if name in seen:
                raise GGUFHeaderError(f"the key {name[:80]!r} comes twice")
            seen.add(name)
            self.value(self.number("<I"), name)
        spans = self.tensors(tensors, sizes)
        start = self.at + -self.at % self.alignment
        end = 0
        for offset, nbytes, name in sorted(spans):
            if offset % self.alignment or offset < end:
                raise GGUFHeaderError(f"the tensor {name[:80]!r} overlaps another, or lies at an odd place")
            end = offset + nbytes
        if spans and start + end > self.size:
            raise GGUFHeaderError(f"its tensors end at byte {start + end}, the file at {self.size}")

    def tensors(self, count: int, sizes: Mapping[int, tuple[int, int]]) -> list[tuple[int, int, bytes]]:
        spans, names = [], set()
        for _ in range(count):
            name = self.string(_MAX_NAME)
            if name in names:
                raise GGUFHeaderError(f"the tensor {name[:80]!r} comes twice")
            names.add(name)
            dims = self.number("<I")
            if not 1 <= dims <= 4:
                raise GGUFHeaderError(f"the tensor {name[:80]!r} has {dims} dimensions")
            shape = [self.number("<Q") for _ in range(dims)]
            kind, offset = self.number("<I"), self.number("<Q")
            if kind not in sizes:
                raise GGUFHeaderError(f"the tensor {name[:80]!r} is of the unknown type {kind}")
            elements = 1
            for size in shape:
                elements *= size
            block, nbytes = sizes[kind]
            if not 0 < elements < _MAX_ELEMENTS or shape[0] % block:
                raise GGUFHeaderError(f"the tensor {name[:80]!r} has the shape {shape[::-1]}")
            spans.append((offset, elements // block * nbytes, name))
        return spans

    def value(self, kind: int, name: bytes) -> None:
        if kind == _STRING:
            self.string(MAX_HEADER_BYTES)
        elif kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            self.values += count
            if self.values > MAX_VALUES:
                raise GGUFHeaderError(f"the key {name[:80]!r} claims {count} values")
            if inner == _STRING:
                for _ in range(count):
                    self.string(MAX_HEADER_BYTES)
            elif inner in _SCALARS:
                self.skip(count * _SCALARS[inner])
            else:
                raise GGUFHeaderError(f"the key {name[:80]!r} is an array of the type {inner}")
        elif kind not in _SCALARS:
            raise GGUFHeaderError(f"the key {name[:80]!r} is of the unknown type {kind}")
        elif name == b"general.alignment":
            self.alignment = self.number("<I") if kind == _UINT32 else 0
            if self.alignment < 1 or self.alignment & (self.alignment - 1) or self.alignment > 1 << 20:
                raise GGUFHeaderError("general.alignment is no power of two")
        else:
            self.skip(_SCALARS[kind])

    def string(self, limit: int) -> bytes:
        length = self.number("<Q")
        if length > limit:
            raise GGUFHeaderError(f"it claims a string of {length} bytes")
        return self.take(length)

    def number(self, kind: str) -> int:
        value: int = struct.unpack(kind, self.take(struct.calcsize(kind)))[0]
        return value

    def skip(self, count: int) -> None:
        self.advance(count)
        self.file.seek(count, os.SEEK_CUR)

    def take(self, count: int) -> bytes:
        self.advance(count)
        return self.file.read(count)

    def advance(self, count: int) -> None:
        self.at += count
        if self.at > self.size:
            raise GGUFHeaderError("it is cut short: its header goes on behind the end of the file")
        if self.at > MAX_HEADER_BYTES:
            raise GGUFHeaderError(f"its header is larger than {MAX_HEADER_BYTES} bytes")
