"""Shards whose layout is known before their tensors: headers first, room for everything, then bytes in any order.

A quantized checkpoint's tensors follow from shapes and specs, so each has its place from the start. Tensors can be
written by several threads or processes as they come, a full disk shows before the work begins, and what was written
stays where it is when the process dies.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import fsync_folder
from .reader import SINGLE
from .safetensors_header import DTYPE_NAMES, DTYPES

_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_COPY = 1 << 24


def final_name(index: int, count: int) -> str:
    """The name of a shard in a finished folder."""
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True)
class Planned:
    """A tensor to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its header's bytes, where each tensor begins, and its size."""

    header: bytes
    begins: dict[str, int]
    size: int


def lay_out(tensors: Iterable[Planned], max_shard_bytes: int) -> list[Shard]:
    """Fill shards in order; a tensor that would make one larger than ``max_shard_bytes`` begins the next."""
    shards: list[list[Planned]] = []
    filled = 0
    for tensor in tensors:
        if not shards or (shards[-1] and filled + tensor.nbytes > max_shard_bytes):
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return [lay_out_shard(members) for members in shards]


def lay_out_shard(members: Sequence[Planned]) -> Shard:
    """Tensors in the order that safetensors itself has: the widest dtype first, then by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    relative: dict[str, int] = {}
    for tensor in sorted(members, key=lambda t: (_RANKS[t.dtype], t.name)):
        relative[tensor.name] = at
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    # blanks may follow the header; with these, tensors of the usual widths lie on cache lines when mapped
    text += b" " * (-(8 + len(text)) % 64)
    start = 8 + len(text)
    begins = {name: start + offset for name, offset in relative.items()}
    return Shard(len(text).to_bytes(8, "little") + text, begins, start + at)


def _write_at(fd: int, data: memoryview, at: int) -> None:
    """A write may take less than it was given."""
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done


class ShardFiles:
    """The shards of a plan as files in a folder.

    A file's name holds a number, the generation: it goes up when the plan changes (a module is kept after all), and a
    shard that changes by it is written anew under the new name, with what it held.

    Args:
        create: make the files that are not there; otherwise another process makes them.

    Raises:
        OSError: ENOSPC, with the room that is needed.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[Planned], max_shard_bytes: int, generation: int, create: bool
    ) -> None:
        self.folder = folder
        self._max = max_shard_bytes
        self._files: list[int] = []
        self.set_plan(tensors, generation)
        if create:
            self._create(range(len(self.shards)))
        # opened when all are there: :meth:`open`

    def set_plan(self, tensors: Sequence[Planned], generation: int) -> None:
        """Take a plan without touching a file."""
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.shards = lay_out(tensors, self._max)
        self.generation = generation
        self._where = {name: i for i, shard in enumerate(self.shards) for name in shard.begins}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def path(self, index: int) -> Path:
        """Where a shard lies: the newest file of it that any generation made."""
        made = [p for p in self._made(index) if p[0] <= self.generation]
        generation = max(made)[0] if made else self.generation
        return self._name(index, generation)

    def open(self) -> None:
        """Open every shard for writing."""
        self.close()
        self._files = [os.open(self.path(i), os.O_RDWR) for i in range(len(self.shards))]

    def close(self) -> None:
        for fd in self._files:
            os.close(fd)
        self._files = []

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Bytes of a tensor, from ``offset`` on."""
        index = self._where[name]
        _write_at(self._files[index], data, self.shards[index].begins[name] + offset)

    def sync(self, names: Iterable[str]) -> None:
        """Wait until the shards that hold the tensors are on the disk."""
        for index in sorted({self._where[name] for name in names}):
            os.fdatasync(self._files[index])

    def read(self, name: str) -> Tensor:
        """A tensor that was written, as its own memory."""
        tensor = self.tensors[name]
        raw = torch.empty(tensor.nbytes, dtype=torch.uint8)
        index = self._where[name]
        view, at = raw.numpy().data, self.shards[index].begins[name]
        while view:
            got = os.preadv(self._files[index], [view], at)
            if got == 0:
                raise OSError(errno.EIO, "the shard was cut short by somebody else", str(self.path(index)))
            view, at = view[got:], at + got
        return raw.view(tensor.dtype).view(tensor.shape)

    def relay(self, tensors: Sequence[Planned], generation: int, finished: Iterable[str]) -> list[Path]:
        """Move to another plan: shards that change are made anew, with the ``finished`` tensors in them.

        Returns:
            The old files, to be removed once the new plan is on record (:meth:`forget`).
        """
        finished = list(finished)
        before, files = (self.shards, self._where), self._files
        old = [self.path(i) for i in range(len(self.shards))]
        self._files = []
        self.set_plan(tensors, generation)
        same = min(len(before[0]), len(self.shards))
        first = next((i for i in range(same) if before[0][i].header != self.shards[i].header), same)
        try:
            self._create(range(first, len(self.shards)))
            self.open()
            for name in finished:
                if self._where[name] >= first:
                    source = before[1][name]
                    self._copy(files[source], before[0][source].begins[name], name)
            for fd in self._files:
                os.fdatasync(fd)
        finally:
            for fd in files:
                os.close(fd)
        fsync_folder(self.folder)
        return old[first:]

    def forget(self, files: Iterable[Path]) -> None:
        """Remove files of earlier generations."""
        for path in files:
            path.unlink(missing_ok=True)

    def reclaim(self) -> None:
        """Undo what a process did that died: later generations, final names, files beside the shards."""
        count = len(self.shards)
        for index in range(count):
            if (final := self.folder / final_name(index, count)).exists():
                os.rename(final, self._name(index, self.generation))
        keep = {self.path(index) for index in range(count)}
        for path in self.folder.iterdir():
            if path not in keep:
                path.unlink()

    def _name(self, index: int, generation: int) -> Path:
        return self.folder / f"shard-{index}-{generation}"

    def _made(self, index: int) -> list[tuple[int]]:
        found = self.folder.glob(f"shard-{index}-*")
        return [(int(path.name.rpartition("-")[2]),) for path in found]

    def _create(self, which: Iterable[int]) -> None:
        for index in which:
            shard = self.shards[index]
            fd = os.open(self._name(index, self.generation), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                os.posix_fallocate(fd, 0, shard.size)
                _write_at(fd, memoryview(shard.header), 0)
                os.fsync(fd)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                    raise self._full(error.errno) from error
                raise
            finally:
                os.close(fd)
        fsync_folder(self.folder)

    def _full(self, code: int) -> OSError:
        free = shutil.disk_usage(self.folder).free
        return OSError(
            code,
            f"the checkpoint takes {sum(s.size for s in self.shards):,} bytes, {free:,} are free here",
            str(self.folder),
        )

    def _copy(self, source: int, begin: int, name: str) -> None:
        length = self.tensors[name].nbytes
        for offset in range(0, length, _COPY):
            block = os.pread(source, min(_COPY, length - offset), begin + offset)
            self.write(name, memoryview(block), offset)
