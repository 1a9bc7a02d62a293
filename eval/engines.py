"""Where the cells of a sweep run: in this process, in processes of their own, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from .cells import Cell
from .provenance import code_commit, inherit_code
from .record import Row

Progress = Callable[[str, int, int], None]
# a cell and what came of it
Result = tuple[Cell, "Row | Exception"]


class CellDied(RuntimeError):
    """A cell's process ended without a result: killed, or out of memory."""


class CellTimeout(RuntimeError):
    """A cell was not done in the time that it was given, and its process was ended."""


class Engine(Protocol):
    """Runs cells, in any order, and yields what came of each when it is there."""

    # how many cells run at once, for the time left
    width: int

    def run(self, cells: Sequence[Cell], progress: Progress) -> Iterator[Result]: ...


def staged(progress: Progress, name: str) -> Progress:
    """``progress`` with the cell's name before the stage."""
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)


class Inline:
    """One cell after the other, in this process."""

    width = 1

    def run(self, cells: Sequence[Cell], progress: Progress) -> Iterator[Result]:
        for cell in cells:
            try:
                result: Row | Exception = cell.run(staged(progress, cell.name))
            except Exception as error:  # the other cells go on; this one is reported with its error
                result = error
            yield cell, result


class Processes:
    """Each cell in a fresh process, ``jobs`` at once: one that is killed takes no other with it.

    They are forked from a server that has imported what a cell needs and run none of it, so a cell begins at once,
    on any device.

    Args:
        jobs: processes at once. threads: of torch in each; None shares this process's out.
        timeout: seconds that a cell may take before its process is killed and the cell fails; None is for ever.
    """

    def __init__(self, jobs: int, threads: int | None = None, timeout: float | None = None) -> None:
        if jobs < 1:
            raise ValueError(f"expected at least 1 job, got {jobs}")
        if timeout is not None and timeout <= 0:
            raise ValueError(f"expected a timeout above 0 seconds, got {timeout}")
        self.width = jobs
        self.threads = threads
        self.timeout = timeout

    def run(self, cells: Sequence[Cell], progress: Progress) -> Iterator[Result]:
        import torch

        threads = self.threads or max(1, torch.get_num_threads() // self.width)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([_child.__module__])
        left = list(cells)
        running: dict[Connection, tuple[Cell, Any, float]] = {}
        try:
            while left or running:
                while left and len(running) < self.width:
                    cell = left.pop(0)
                    mine, theirs = context.Pipe(duplex=False)
                    process = context.Process(
                        target=_child, args=(theirs, cell, threads, code_commit()), daemon=True
                    )
                    process.start()
                    theirs.close()
                    running[mine] = (cell, process, time.monotonic())
                for ready in wait(list(running), self._patience(running)):
                    assert isinstance(ready, Connection)
                    cell, process, _ = running[ready]
                    try:
                        message = ready.recv()
                    except (EOFError, OSError):  # OSError: it was killed in the middle of a message
                        process.join()
                        del running[ready]
                        yield cell, CellDied(f"its process ended with exit code {process.exitcode}")
                        continue
                    if isinstance(message, tuple):
                        progress(f"{cell.name}: {message[0]}", message[1], message[2])
                        continue
                    process.join()
                    del running[ready]
                    yield cell, message
                for late in [c for c in running if self._patience({c: running[c]}) == 0]:
                    cell, process, _ = running.pop(late)
                    process.kill()
                    process.join()
                    yield cell, CellTimeout(f"it was not done after {self.timeout:g} s and was ended")
        finally:
            for _, process, _ in running.values():
                process.kill()

    def _patience(self, running: Mapping[Connection, tuple[Cell, Any, float]]) -> float | None:
        """Seconds until the first of these has had its time; None without a timeout."""
        if self.timeout is None:
            return None
        return max(0.0, min(begun for *_, begun in running.values()) + self.timeout - time.monotonic())


def _child(results: Connection, cell: Cell, threads: int, code: str | None) -> None:
    """Run a cell and send what came of it; end with the parent, also where that was killed."""
    import torch

    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(threads)
    inherit_code(code)
    try:
        result: Row | Exception = cell.run(lambda *stage: results.send(stage))
    except Exception as error:  # goes to the parent, which lists it
        result = portable(error)
    results.send(result)


def portable(error: Exception) -> Exception:
    """``error`` itself where it can be sent, else one that says the same."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception of somebody's fails with when it is pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
