"""Cells on a Ray cluster. Rows come back to the driver, which alone writes them.

A cell finds its model, and puts its checkpoint, at the same paths on every machine: on a shared disk, or each machine
makes its own. The items of tasks come back with the row. A worker that dies has its cell run again elsewhere; what it
had finished on a shared disk is used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from .cells import Cell
from .engines import CellDied, Inline, Processes, Progress, Result, portable
from .provenance import code_commit
from .record import Row
from .tasks import items_of, put_items

# seconds between two looks at the cluster, and how long it may lack a machine that a cell fits on
_LOOK, _PATIENCE = 10.0, 60.0


class NoRoomError(RuntimeError):
    """No machine of the cluster has what a cell takes, so that it would wait for ever."""


class OnRay:
    """Args:
    address: of the cluster as ``ray.init`` takes it (``auto``, ``HOST:PORT``); None starts one here, or uses the one
        that this program has joined.
    cpus, gpus: that a cell takes, on one machine. retries: of a cell whose worker or machine dies.
    timeout: seconds that a cell may take once it runs, before it is ended and fails; None is for ever.

    Raises:
        ImportError: Ray is not installed.
        NoRoomError: no machine of the cluster has so many CPUs or GPUs.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        cpus: float = 1,
        gpus: float = 0,
        retries: int = 3,
        timeout: float | None = None,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError('the engine ray needs Ray: pip install "brise[ray]"') from error
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        self.ray: Any = ray
        self.wanted = {"CPU": cpus, "GPU": gpus}
        self.retries, self.timeout = retries, timeout
        self.width = max(1, sum(_fits(machine, self.wanted) for machine in self._machines()))
        if (lack := self._lack()) is not None:
            raise NoRoomError(lack)

    def run(self, cells: Sequence[Cell], progress: Progress) -> Iterator[Result]:
        if not self.wanted["GPU"] and any(cell.setting.device.type == "cuda" for cell in cells):
            # Ray hides every GPU from a task that has asked for none
            raise ValueError(
                "cells on cuda need a part of a GPU each: gpus=1 (--gpus 1), or less to share one"
            )
        # tried again from here: Ray's own count leaves out workers that it killed for want of memory
        options = {"num_cpus": self.wanted["CPU"], "num_gpus": self.wanted["GPU"], "max_retries": 0}
        remote = self.ray.remote(_run).options(**options)
        threads = int(self.wanted["CPU"] or 1)
        waiting = {remote.remote(cell, threads, self.timeout): (cell, 0) for cell in cells}
        seen = time.monotonic()  # when there last was a machine with room for a cell
        try:
            while waiting:
                ready, _ = self.ray.wait(list(waiting), num_returns=1, timeout=_LOOK)
                if not ready:
                    lack = self._lack()
                    if lack is None:
                        seen = time.monotonic()
                    elif time.monotonic() - seen > _PATIENCE:
                        for reference in list(waiting):
                            self.ray.cancel(reference, force=True)
                            yield waiting.pop(reference)[0], NoRoomError(lack)
                    continue
                cell, tried = waiting.pop(ready[0])
                try:
                    result = self.ray.get(ready[0])
                    again = isinstance(result, CellDied)
                except self.ray.exceptions.RayError as error:
                    result = CellDied(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                    again = self._worth_another(error)
                if again and tried < self.retries:
                    waiting[remote.remote(cell, threads, self.timeout)] = (cell, tried + 1)
                    continue
                if isinstance(result, tuple):
                    result, items = result
                    put_items(cell.out, result.key, items)
                yield cell, result
        finally:
            for reference in waiting:
                self.ray.cancel(reference, force=True)

    def _machines(self) -> list[dict[str, float]]:
        return [machine["Resources"] for machine in self.ray.nodes() if machine["Alive"]]

    def _lack(self) -> str | None:
        """What no machine has, in words; None where a cell fits on one."""
        machines = self._machines()
        if any(_fits(machine, self.wanted) for machine in machines):
            return None
        wanted = " and ".join(f"{number:g} {kind}" for kind, number in self.wanted.items() if number)
        most = ", ".join(
            f"{machine.get('CPU', 0):g} CPU and {machine.get('GPU', 0):g} GPU" for machine in machines
        )
        return (
            f"expected a machine with {wanted} for a cell, the cluster has {most or 'none'}: ask for less, or start a "
            "machine that has it"
        )

    def _worth_another(self, error: Exception) -> bool:
        """Whether it was the worker or the machine that failed, and not what ran there."""
        e = self.ray.exceptions
        return not isinstance(
            error, e.RayTaskError | e.TaskCancelledError | e.TaskUnschedulableError | e.RuntimeEnvSetupError
        )


def _fits(machine: dict[str, float], wanted: dict[str, float]) -> int:
    """How many cells fit on a machine at once."""
    return min(
        (int(machine.get(kind, 0) / number + 1e-9) for kind, number in wanted.items() if number), default=1
    )


def _run(cell: Cell, threads: int, timeout: float | None) -> tuple[Row, dict[str, bytes]] | Exception:
    import torch

    code_commit()  # of this machine's own code, which may not be the driver's
    torch.set_num_threads(max(1, threads))
    # what does not end can only be ended from outside: a cell that has a time limit gets a process of its own
    engine = Inline() if timeout is None else Processes(1, max(1, threads), timeout)
    ((_, result),) = engine.run([cell], lambda *_: None)
    if isinstance(result, Exception):  # a cell's own failure is a result: only one that died is tried again
        return portable(result)
    return result, items_of(cell.out, result.key)
