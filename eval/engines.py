"""Where the cells of a sweep run: in this process, in processes of their own, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from .cells import Cell
from .record import Row

Progress = Callable[[str, int, int], None]
# a cell and what came of it
Result = tuple[Cell, "Row | Exception"]


class CellDied(RuntimeError):
    """A cell's process ended without a result: killed, or out of memory."""


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
    """

    def __init__(self, jobs: int, threads: int | None = None) -> None:
        if jobs < 1:
            raise ValueError(f"expected at least 1 job, got {jobs}")
        self.width = jobs
        self.threads = threads

    def run(self, cells: Sequence[Cell], progress: Progress) -> Iterator[Result]:
        import torch

        threads = self.threads or max(1, torch.get_num_threads() // self.width)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([_child.__module__])
        left = list(cells)
        running: dict[Connection, tuple[Cell, Any]] = {}
        try:
            while left or running:
                while left and len(running) < self.width:
                    cell = left.pop(0)
                    mine, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=_child, args=(theirs, cell, threads), daemon=True)
                    process.start()
                    theirs.close()
                    running[mine] = (cell, process)
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    cell, process = running[ready]
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
        finally:
            for _, process in running.values():
                process.kill()


def _child(results: Connection, cell: Cell, threads: int) -> None:
    """Run a cell and send what came of it; end with the parent, also where that was killed."""
    import torch

    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(threads)
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
