"""Sides that take turns, and what is said of their times."""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

T = TypeVar("T")
WARMUP = 2


class BenchError(RuntimeError):
    """The two sides do not give the same, so a comparison of their times would mean nothing."""


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile over the repetitions (linear between neighbours)."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        p20, p80 = (statistics.quantiles(values, n=10, method="inclusive")[i] for i in (1, 7))
        return cls(statistics.median(values), p20, p80)

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        """``median (p20–p80)``, each times ``scale``."""
        median, p20, p80 = (f"{value * scale:.{digits}f}" for value in (self.median, self.p20, self.p80))
        return f"{median} ({p20}–{p80})"


def take_turns(operations: dict[str, Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Seconds of every timed turn, a list a side. Who follows whom changes from turn to turn, and no side follows
    itself where there are others: it would find the caches as it left them."""
    times: dict[str, list[float]] = {side: [] for side in operations}
    chance, order = random.Random(0), list(operations)
    for turn in range(WARMUP + repeats):
        last = order[-1]
        chance.shuffle(order)
        if order[0] == last:
            order.reverse()
        for side in order:
            begin = time.perf_counter()
            operations[side]()
            seconds = time.perf_counter() - begin
            if turn >= WARMUP:
                times[side].append(seconds)
    return list(times.values())


def in_child(function: Callable[..., T], *args: Any) -> T:
    """The function's value, from a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def bitsandbytes_module() -> Any:
    try:
        import bitsandbytes.functional
        import bitsandbytes.nn
    except ImportError as error:
        raise ImportError('the comparison needs bitsandbytes: pip install "brise[peers]"') from error
    return bitsandbytes


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
