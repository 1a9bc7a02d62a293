"""The processes of one job: this one alone, or all those that torch's own distributed has brought together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Group(Protocol):
    """What a job asks of its processes."""

    rank: int
    world: int

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of the ranks, at every process; all must ask."""
        ...

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over all processes, in place, the same bits everywhere; all must ask."""
        ...


class Alone:
    """A group of one."""

    rank = 0
    world = 1

    def gather(self, value: T) -> list[T]:
        return [value]

    def all_reduce(self, tensor: Tensor) -> None:
        """Nothing to add."""


class Distributed:
    """The default process group of ``torch.distributed``, which must be there (torchrun makes it)."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def all_reduce(self, tensor: Tensor) -> None:
        # on the CPU, where gloo always can
        flat = tensor.cpu().contiguous()
        dist.all_reduce(flat)
        # sums may be taken in another order at each process: what decides about codes must be the same bits
        dist.broadcast(flat, src=0)
        if flat is not tensor:
            tensor.copy_(flat)


def current_group() -> Group:
    """The default process group where there is one."""
    if dist.is_available() and dist.is_initialized():
        return Distributed()
    return Alone()


def raise_together(group: Group, error: Exception | None) -> None:
    """Let an error of any process end all of them; those that had none say whose it was.

    Raises:
        Exception: this process's own error.
        RuntimeError: another process's.
    """
    found = group.gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, text in enumerate(found):
        if text is not None:
            raise RuntimeError(f"process {rank} of the job failed: {text}")


def share(count: int, group: Group) -> range:
    """Which of ``count`` things are this process's."""
    return range(group.rank, count, group.world)


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """The processes that torchrun started, brought together by gloo; this one alone without torchrun."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield current_group()
        return
    dist.init_process_group("gloo")
    try:
        yield Distributed()
    finally:
        dist.destroy_process_group()
