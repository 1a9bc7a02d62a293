"""The tensors of safetensors files in a folder, by name: mapped, or read rows at a time, and watched for changes."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .safetensors_header import CheckpointError, Entry, read_header

# below this a tensor is read, above it is mapped: a map costs a page table entry and a file descriptor
_READ_BELOW = 1 << 16


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` of a folder.

    Raises:
        CheckpointError: not the plain name of a regular file there, or a link that leads out. The hub's
            cache, whose snapshots are links into the ``blobs`` beside them, counts as inside.
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
        raise CheckpointError(f"{folder}: {name[:200]!r} is not the plain name of a file in this folder")
    home = folder.resolve()
    try:
        real = (folder / name).resolve()
    except (RuntimeError, OSError) as error:  # links in a circle
        raise CheckpointError(f"{folder / name} is a link that leads nowhere ({error})") from None
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.parent == root for root in allowed):
        raise CheckpointError(
            f"{folder / name} is a link that leads out of the folder, to {real}; put the file itself there"
        )
    if not real.exists():
        raise CheckpointError(f"{folder / name} is missing; fetch it, or the whole folder, again")
    if not stat.S_ISREG(real.stat().st_mode):
        raise CheckpointError(f"{folder / name} is no regular file")
    return real


class TensorFiles:
    """Tensors by name; every header is checked when its file is opened (:meth:`open`).

    Attributes:
        folder: where the files are.
        names: every tensor, in the order of the names.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.names: list[str] = []
        self._files: dict[str, BinaryIO] = {}
        self._opened: dict[str, tuple[int, int, int]] = {}
        self._where: dict[str, tuple[str, Entry]] = {}

    def open(self, shards: Iterable[str]) -> None:
        """Open files of the folder, by name.

        Raises:
            CheckpointError: a file is missing, leads out of the folder or is damaged, or tensors are in two of them.
        """
        double: list[str] = []
        for shard in shards:
            self._open(shard, double)
        if double:
            raise CheckpointError(f"{self.folder}: {len(double)} tensors are in two shards: {listed(double)}")
        self.names = sorted(self._where)

    def hide(self, names: Iterable[str]) -> None:
        """Forget tensors that are not the caller's business."""
        for name in names:
            del self._where[name]
        self.names = sorted(self._where)

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor. Raises CheckpointError for a name that is not there."""
        entry = self._find(name)[1]
        return entry.dtype, entry.shape

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor on disk."""
        return self._find(name)[1].nbytes

    def shard(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return self._find(name)[0]

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, in its stored dtype: a map of its own, given back when the tensor goes."""
        shard, entry = self._find(name)
        file = self._files[shard]
        if entry.nbytes < _READ_BELOW:
            raw = torch.empty(entry.nbytes, dtype=torch.uint8)
            if os.preadv(file.fileno(), [raw.numpy().data], entry.begin) != entry.nbytes:
                raise CheckpointError(f"{self.folder / shard} became shorter while it was read")
            return raw.view(entry.dtype).view(entry.shape)
        start = entry.begin - entry.begin % mmap.ALLOCATIONGRANULARITY
        return _typed(self._map(shard, start, entry.end - start), entry, entry.begin - start)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the first axis, in memory of their own.

        Read, not mapped: where a file is cut short underneath this is an error, and a map would end the process.

        Raises:
            CheckpointError: the file became shorter.
        """
        shard, entry = self._find(name)
        count = entry.shape[0] if entry.shape else 1
        width = entry.nbytes // max(1, count)
        raw = torch.empty((stop - start) * width, dtype=torch.uint8)
        view, at = raw.numpy().data, entry.begin + start * width
        while view:
            got = os.preadv(self._files[shard].fileno(), [view], at)
            if got == 0:
                raise CheckpointError(f"{self.folder / shard} became shorter while it was read")
            view, at = view[got:], at + got
        return raw.view(entry.dtype).view(stop - start, *entry.shape[1:])

    def identity(self) -> dict[str, Any]:
        """What the files are, JSON-ready: of every one its size, time and the hash of its header."""
        out: dict[str, Any] = {}
        for shard, file in sorted(self._files.items()):
            status = os.fstat(file.fileno())
            length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
            header = os.pread(file.fileno(), 8 + length, 0)
            out[shard] = [status.st_size, status.st_mtime_ns, _sha256(header)]
        return out

    def check_unchanged(self) -> None:
        """See that every shard is the file that was opened, with its size and time.

        Raises:
            CheckpointError: one was changed, replaced or removed.
        """
        for shard, opened in self._opened.items():
            path = self.folder / shard
            if not path.exists() or _stamp(path.stat()) != opened:
                raise CheckpointError(
                    f"{path} was changed, replaced or removed while it was read: what was made of it since the last "
                    "finished step is not kept; put the file back and resume, or begin anew"
                )

    def prefetch(self, name: str) -> None:
        """Let the system begin to read a tensor from the disk."""
        shard, entry = self._find(name)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._files[shard].fileno(), entry.begin, entry.nbytes, os.POSIX_FADV_WILLNEED)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, shard by shard: one map a shard, held for as long as any of its tensors lives."""
        for shard in self._files:
            names = [name for name in self.names if self._where[name][0] == shard]
            end = max((self._where[name][1].end for name in names), default=0)
            whole = self._map(shard, 0, end) if end else torch.empty(0, dtype=torch.uint8)
            for name in names:
                entry = self._where[name][1]
                yield name, _typed(whole, entry, entry.begin)

    def _open(self, shard: str, double: list[str]) -> None:
        file = inside(self.folder, shard).open("rb")
        self._files[shard] = file
        self._opened[shard] = _stamp(os.fstat(file.fileno()))
        for name, entry in read_header(file, str(self.folder / shard)).items():
            if name in self._where:
                double.append(f"{name} in {self._where[name][0]} and {shard}")
            self._where[name] = (shard, entry)

    def _find(self, name: str) -> tuple[str, Entry]:
        if name not in self._where:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self._where[name]

    def _map(self, shard: str, start: int, length: int) -> Tensor:
        try:
            view = mmap.mmap(self._files[shard].fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder / shard}: {length} bytes cannot be mapped into memory ({error})"
            ) from error
        return torch.frombuffer(view, dtype=torch.uint8)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def listed(words: list[str], separator: str = ", ", limit: int = 6) -> str:
    rest = f" and {len(words) - limit} more" if len(words) > limit else ""
    return separator.join(words[:limit]) + rest


def _typed(raw: Tensor, entry: Entry, offset: int) -> Tensor:
    data = raw[offset : offset + entry.nbytes]
    if offset % entry.dtype.itemsize or not entry.nbytes:
        data = data.clone()  # a file that starts its tensors at odd places: no dtype can be laid over them
    return data.view(entry.dtype).view(entry.shape)
