"""How the GPU benchmark measures: graphs of launches on many copies, sides that take turns, ceilings, rows.

Everything here but :class:`GraphTimer` runs on any device, so that tests run it where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.budget import relative_error
from .timing import Spread

Call = Callable[[], Any]
# weights of one measurement in all: more than any L2 holds, so that no replay finds them there
COPIES_BYTES = 240_000_000
# a replay shorter than this measures the launch of the graph
SHORTEST_REPLAY = 200e-6
ROUNDS = 7


class Timer(Protocol):
    """How calls are timed."""

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        """A function that makes all calls once, one after another, and returns the seconds of one on average."""
        ...

    def synchronize(self) -> None: ...


class GraphTimer:
    """CUDA graphs: all calls are captured into one, whose replay two events enclose."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compile, and let libraries set up what a capture must not see
                for call in calls[:2]:
                    call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.synchronize()
        once = self._capture(calls, 1, stream)
        seconds = self._replay(once)
        repeats = max(1, int(SHORTEST_REPLAY / max(seconds, 1e-9)) + 1)
        graph = once if repeats == 1 else self._capture(calls, repeats, stream)
        return lambda: self._replay(graph) / (repeats * len(calls))

    def _capture(
        self, calls: Sequence[Call], repeats: int, stream: torch.cuda.Stream
    ) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # the stream that was warmed up: elsewhere each split product would clear counters of its own in the graph
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                for call in calls:
                    call()
        graph.replay()
        self.synchronize()
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class WallTimer:
    """The clock on the wall, for calls that are done when they return."""

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        def once() -> float:
            begin = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - begin) / len(calls)

        return once

    def synchronize(self) -> None:
        pass


@dataclass(frozen=True)
class Goal:
    """Of one figure of ours: ``limit`` is to be reached, ``aim`` is what we hope for, ``floor`` what physics allows.

    ``unit`` is us, TFLOP/s, tok/s, or "x SIDE": how many times as fast as that side. ``higher``: more is better.
    """

    floor: float | None
    limit: float
    aim: float
    unit: str
    higher: bool = False

    def met(self, value: float) -> str:
        """``aim``, ``limit`` or ``open``."""
        better = (lambda a, b: a >= b) if self.higher else (lambda a, b: a <= b)
        return "aim" if better(value, self.aim) else "limit" if better(value, self.limit) else "open"


@dataclass
class Side:
    """One way to compute the result: ``calls`` on as many copies of its inputs as the protocol asks for.

    The first of them gives the result that is checked: a tensor, or several.
    """

    calls: Sequence[Call]


@dataclass
class Problem:
    """One case made ready on a device: ours first, then the peers; peers that cannot take part, and why."""

    sides: dict[str, Side]
    # what the first call of every side should give, in float64
    exact: Tensor
    # the part of a result that ``exact`` is about, where all of it would be too much in float64
    pick: Callable[[Any], Tensor] = lambda result: result
    missing: dict[str, str] = field(default_factory=dict)
    # largest relative error that ours may make: twice that of eager code of the same dtype
    allowed: float = 0.0
    flops: float = 0.0
    nbytes: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True)
class Case:
    """What one row measures. ``make`` puts it on a device; ``labels`` go into the row as they are."""

    family: str
    name: str
    labels: dict[str, Any]
    make: Callable[[torch.device], Problem]
    goal: Goal | None = None
    priority: int = 9
    # by the clock on the wall: what looks at the device itself, as a whole generation does, fits into no graph
    eager: bool = False
    rounds: int = ROUNDS


def copies_for(nbytes: int, total: int = COPIES_BYTES) -> int:
    """How many copies of ``nbytes`` make ``total``, at least one."""
    return max(1, -(-total // max(1, nbytes)))


def measure(case: Case, device: torch.device, timer: Timer, rounds: int | None = None) -> dict[str, Any]:
    """Check one case against float64 and time all its sides in turns; a JSON-ready row.

    A side whose result is wrong by more than the budget (ours) or cannot be had (a peer) has no time in the row.
    """
    try:
        problem = case.make(device)
    except RuntimeError as error:  # no memory, say: the other cases go on
        problem = Problem({}, torch.zeros(0), missing={"ours": f"{type(error).__name__}: {error}"[:300]})
    rounds = rounds or case.rounds
    if case.eager:
        timer = WallTimer()
    ours = next(iter(problem.sides), "ours")
    errors, missing, repeats = {}, dict(problem.missing), None
    steps: dict[str, Callable[[], float]] = {}
    for name, side in problem.sides.items():
        try:
            out = side.calls[0]()
            timer.synchronize()
            errors[name] = relative_error(problem.pick(out), problem.exact)
            if name == ours:
                repeats = all(_same(out, side.calls[0]()) for _ in range(3))
                if not errors[name] <= problem.allowed:
                    missing[name] = f"wrong: relative error {errors[name]:.3g}, allowed {problem.allowed:.3g}"
                    continue
                if not repeats:
                    missing[name] = "other bits in another run"
                    continue
            steps[name] = timer.prepare(side.calls)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            # a peer that refuses this shape is no reason to lose the row; ours that fails is told as loudly
            missing[name] = f"{type(error).__name__}: {error}"[:300]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps) if turn % 2 else reversed(list(steps)):
            times[name].append(steps[name]())
    spreads = {name: Spread.of(values) for name, values in times.items()}
    row: dict[str, Any] = {
        "family": case.family,
        "case": case.name,
        **case.labels,
        "ours": ours,
        "ok": ours in spreads,
        "repeatable": repeats,
        "seconds": {name: dataclasses.asdict(spread) for name, spread in spreads.items()},
        "errors": {name: (value if value == value else None) for name, value in errors.items()},
        "allowed": problem.allowed,
        "missing": missing,
        "rounds": rounds,
        "flops": problem.flops,
        "bytes": problem.nbytes,
        "tokens": problem.tokens,
    }
    return {**row, "goal": judge(case.goal, row)}


def _same(a: Any, b: Any) -> bool:
    """The same bits, of one tensor or of several."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(_same(x, y) for x, y in zip(a, b, strict=True))


def judge(goal: Goal | None, row: dict[str, Any]) -> dict[str, Any] | None:
    """The goal beside what was reached: microseconds, TFLOP/s, tokens a second, or the speed relative to a side."""
    if goal is None:
        return None
    ours = row["seconds"].get(row["ours"], {}).get("median")
    value: float | None = None
    if ours:
        if goal.unit == "us":
            value = ours * 1e6
        elif goal.unit == "TFLOP/s":
            value = row["flops"] / ours / 1e12
        elif goal.unit == "tok/s":
            value = row["tokens"] / ours
        elif (peer := row["seconds"].get(goal.unit.removeprefix("x "))) is not None:
            value = peer["median"] / ours
    return {**dataclasses.asdict(goal), "value": value, "met": None if value is None else goal.met(value)}


def ceilings(device: torch.device, timer: Timer, scale: float = 1.0, rounds: int = ROUNDS) -> dict[str, Any]:
    """What the device can do: bytes/s read and copied, FLOP/s of a bf16 product, seconds of an empty graph node.

    ``scale`` shrinks the sizes, for tests.
    """
    n = max(64, int(8192 * scale))
    count = max(1024, int((1 << 29) * scale * scale))
    source = torch.randn(count, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    tiny = torch.zeros(1, device=device)
    calls: dict[str, list[Call]] = {
        "read": [lambda: torch.sum(source, dtype=torch.float32)],
        "copy": [lambda: target.copy_(source)],
        "product": [lambda: a @ b],
        "node": [lambda: tiny.zero_()] * 200,
    }
    steps = {name: timer.prepare(call) for name, call in calls.items()}
    times = {name: Spread.of([step() for _ in range(rounds)]) for name, step in steps.items()}
    return {
        "family": "ceilings",
        "read_bytes_per_second": source.nbytes / times["read"].median,
        "copy_bytes_per_second": 2 * source.nbytes / times["copy"].median,
        "flops_per_second": 2 * n**3 / times["product"].median,
        "product": n,
        "node_seconds": times["node"].median,
        "seconds": {name: dataclasses.asdict(spread) for name, spread in times.items()},
    }


class RowFile:
    """Rows as JSON lines, each on the disk as soon as it is written, in place of an older run's."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._file = path.open("w")

    def add(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(row)

    def close(self) -> None:
        self._file.close()
