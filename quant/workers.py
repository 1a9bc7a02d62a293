"""Small pieces of tensor work on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

A = TypeVar("A")
B = TypeVar("B")


class Workers:
    """As many threads as torch has, each of which computes by itself; used as a context manager.

    Small pieces of work on all cores: torch's own threads would meet after every operator.
    """

    device = torch.device("cpu")
    piece: int | None = None

    def __enter__(self) -> Workers:
        self.count = torch.get_num_threads()
        self._pool = None
        if self.count > 1:
            self._pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            # what a thread sets for itself reaches the libraries below, and from there the others
            torch.set_num_threads(self.count)

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """The values in the order of the items; the first error is raised once all have ended.

        Inference mode and whether gradients are kept are each thread's own: the workers take on the caller's.
        """
        if self._pool is None:
            return [function(item) for item in items]
        inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def call(item: A) -> B:
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                return function(item)

        futures = [self._pool.submit(call, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def each(
        self,
        function: Callable[[slice, Tensor], B],
        rows: Callable[[int, int], Tensor],
        parts: Sequence[slice],
        again: bool = False,
    ) -> list[B]:
        """See :class:`.rows.Pieces`: each thread reads the rows of its part, every time, and keeps none."""
        return self.map(lambda part: function(part, rows(part.start, part.stop)), parts)

    def back(self, tensor: Tensor) -> Tensor:
        """It is there already."""
        return tensor
