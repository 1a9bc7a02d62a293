"""The hidden states of the calibration windows between blocks: in memory, or in files that outlive the process.

In files, what is behind block i stays as it is while block i + 1 works on a copy, so that a job that dies goes on with
the very same bits. In memory they are gone with the process, and are made again by running the finished blocks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .sequential import Activations

MODES = ("memory", "file")


class Store(Protocol):
    """Where activations are kept. Steps are counted from 1, the first is what the embedding gives."""

    def put(self, step: int, activations: Activations) -> Activations:
        """Keep what a step gave; returns it as it is kept."""
        ...

    def work_on(self, step: int, activations: Activations) -> Activations:
        """What a step may change in place, beginning with what the one before it gave."""
        ...

    def sync(self, step: int) -> None:
        """Wait until what a step gave would survive the process."""
        ...

    def forget_before(self, step: int) -> None:
        """Earlier steps are not needed any more."""
        ...

    def load(self, step: int) -> Activations | None:
        """What a step gave to a process that has died, None where it was not kept."""
        ...


class InMemory:
    """Activations that live and die with the process."""

    def put(self, step: int, activations: Activations) -> Activations:
        return activations

    def work_on(self, step: int, activations: Activations) -> Activations:
        return activations

    def sync(self, step: int) -> None:
        """Nothing to wait for."""

    def forget_before(self, step: int) -> None:
        """Nothing was kept."""

    def load(self, step: int) -> Activations | None:
        return None


@dataclass(frozen=True)
class InFiles:
    """Files in ``folder``, mapped into memory: two streams of ``shape`` [windows, T, D] fp32 where ``full``.

    Attributes:
        rank: of this process, whose windows they are.
    """

    folder: Path
    shape: tuple[int, int, int]
    full: bool
    rank: int = 0

    def put(self, step: int, activations: Activations) -> Activations:
        kept = self._open(step, create=True)
        kept.hidden.copy_(activations.hidden)
        if kept.full is not None and activations.full is not None:
            kept.full.copy_(activations.full)
        return kept

    def work_on(self, step: int, activations: Activations) -> Activations:
        for stream in self._streams():
            before, path = self._path(stream, step - 1), self._path(stream, step)
            with _room(path, before.stat().st_size):
                shutil.copyfile(before, path)
        return self._open(step)

    def sync(self, step: int) -> None:
        for stream in self._streams():
            fd = os.open(self._path(stream, step), os.O_RDWR)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def forget_before(self, step: int) -> None:
        for path in self.folder.glob(f"*-{self.rank}.f32"):
            kept = path.name.split("-")
            if kept[0] in ("hidden", "full") and int(kept[1]) < step:
                path.unlink()

    def load(self, step: int) -> Activations | None:
        size = 4 * torch.Size(self.shape).numel()
        paths = [self._path(stream, step) for stream in self._streams()]
        if not all(path.is_file() and path.stat().st_size == size for path in paths):
            return None
        return self._open(step)

    def _streams(self) -> tuple[str, ...]:
        return ("hidden", "full") if self.full else ("hidden",)

    def _path(self, stream: str, step: int) -> Path:
        return self.folder / f"{stream}-{step}-{self.rank}.f32"

    def _open(self, step: int, create: bool = False) -> Activations:
        tensors = [map_file(self._path(stream, step), self.shape, create) for stream in self._streams()]
        return Activations(tensors[0], tensors[1] if self.full else None, self._buffer)

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        """Scratch memory that the system may write out, under no name."""
        path = self.folder / f"scratch-{self.rank}.f32"
        tensor = map_file(path, shape, create=True)
        path.unlink()
        return tensor


@contextlib.contextmanager
def _room(path: Path, wanted: int) -> Iterator[None]:
    """Say of a full disk how many bytes were ``wanted`` for a file, and where."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(path.parent).free
        text = f"the calibration's activations take {wanted:,} bytes in a file, {free:,} are free here"
        raise OSError(error.errno, text, str(path.parent)) from error


def map_file(path: Path, shape: tuple[int, ...], create: bool = False) -> Tensor:
    """A file as an fp32 tensor of ``shape``: what is written to one is in the other."""
    count = torch.Size(shape).numel()
    if not count:
        path.touch()
        return torch.empty(shape)
    if create:
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            # room for all of it now: a full disk met while a map is written to would end the process
            with _room(path, 4 * count):
                os.posix_fallocate(fd, 0, 4 * count)
        finally:
            os.close(fd)
    return torch.from_file(str(path), shared=True, size=count, dtype=torch.float32).view(shape)
