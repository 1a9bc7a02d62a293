"""Progress bars on stderr, shown only once something has taken more than a second."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

# seconds before anything is shown, and between two lines where stderr is no terminal
DELAY = 1.0
INTERVAL = 15.0
# stages whose units are bytes
_BYTES = ("download", "unpack")


class Bars:
    """A callback (stage, units done, units in all): a bar a stage; lines where stderr is a file.

    A total of 0 means that it is not known. Stages may be interleaved, and may begin again.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._lock = threading.RLock()
        self._start = time.monotonic()
        self._last_line = 0.0
        self._last_stage = ""
        self._stages: dict[str, TaskID] = {}
        self.visible = False
        self._closed = False
        self._timer = threading.Timer(DELAY, self._show)
        self._timer.daemon = True
        self._progress = _make_progress()

    def __enter__(self) -> Bars:
        if self._terminal:
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            self._closed = True
            if self.visible:
                self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            self._update(stage, done, total)
            if not self._terminal:
                self._line(stage, done, total)

    def _show(self) -> None:
        with self._lock:
            if not self._closed:
                self._progress.start()
                self.visible = True

    def _update(self, stage: str, done: int, total: int) -> None:
        known = total or None
        task = self._stages.get(stage)
        if task is None:
            for earlier in self._progress.tasks:  # a sweep has many stages; those that are done make room
                earlier.visible = not earlier.finished
            self._stages[stage] = self._progress.add_task(stage, total=known, completed=done, amount="")
            task = self._stages[stage]
        elif done < self._progress.tasks[task].completed:
            self._progress.reset(task, total=known, completed=done)
        self._progress.update(task, total=known, completed=done, amount=_amount(stage, done, total))

    def _line(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        due = now - self._last_line >= INTERVAL or (
            stage != self._last_stage and now - self._last_line >= DELAY
        )
        if now - self._start >= DELAY and due:
            self._last_line, self._last_stage = now, stage
            print(f"{stage} {_amount(stage, done, total)}".rstrip(), file=sys.stderr, flush=True)


def _make_console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _make_progress() -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=_make_console(),
        transient=True,
    )


def _amount(stage: str, done: int, total: int) -> str:
    if stage in _BYTES:
        return f"{done / 1e6:.0f}/{total / 1e6:.0f} MB"
    return f"{done}/{total}" if total else ""
