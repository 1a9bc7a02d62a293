"""Cells on a Ray cluster. Rows come back to the driver, which alone writes them.

A cell finds its model, and puts its checkpoint, at the same paths on every machine: on a shared disk, or each machine
makes its own. The items of tasks come back with the row. A worker that dies has its cell run again elsewhere; what it
had finished on a shared disk is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .cells import Cell
from .engines import CellDied, Progress, Result, portable
from .record import Row
from .tasks import items_of, put_items


class OnRay:
    """Args:
    address: of the cluster as ``ray.init`` takes it (``auto``, ``HOST:PORT``); None starts one here, or uses the one
        that this program has joined.
    cpus, gpus: that a cell takes. retries: of a cell whose worker or machine dies.
    """

    def __init__(
        self, address: str | None = None, *, cpus: float = 1, gpus: float = 0, retries: int = 3
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError('the engine ray needs Ray: pip install "brise[ray]"') from error
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        self.ray: Any = ray
        self.options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": retries}
        resources = ray.cluster_resources()
        self.width = max(1, int(resources.get("CPU", 1) / max(cpus, 1e-9)))
        if gpus:
            self.width = min(self.width, max(1, int(resources.get("GPU", 0) / gpus)))

    def run(self, cells: Sequence[Cell], progress: Progress) -> Iterator[Result]:
        if not self.options["num_gpus"] and any(cell.setting.device.type == "cuda" for cell in cells):
            # Ray hides every GPU from a task that has asked for none
            raise ValueError(
                "cells on cuda need a part of a GPU each: gpus=1 (--gpus 1), or less to share one"
            )
        remote = self.ray.remote(_run).options(**self.options)
        waiting = {remote.remote(cell, int(self.options["num_cpus"] or 1)): cell for cell in cells}
        try:
            while waiting:
                ready, _ = self.ray.wait(list(waiting), num_returns=1)
                cell = waiting.pop(ready[0])
                try:
                    result = self.ray.get(ready[0])
                    if isinstance(result, tuple):
                        result, items = result
                        put_items(cell.out, result.key, items)
                except self.ray.exceptions.RayError as error:
                    result = CellDied(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                yield cell, result
        finally:
            for reference in waiting:
                self.ray.cancel(reference, force=True)


def _run(cell: Cell, threads: int) -> tuple[Row, dict[str, bytes]] | Exception:
    import torch

    torch.set_num_threads(max(1, threads))
    try:
        row = cell.run(lambda *_: None)
        return row, items_of(cell.out, row.key)
    except Exception as error:  # a cell's own failure is a result: only a dead worker is tried again
        return portable(error)
