"""``brise bench gpu``: every kernel checked against float64, tuned, and timed beside its peers, in one run.

Rows are on the disk as they come, the most telling first, so that a run that is cut short is worth what it has
measured. The protocol is in :mod:`.gpu_protocol`, the cases are in the gpu_* files of their families.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..kernels import tuning
from . import gpu_attention, gpu_decode, gpu_generate, gpu_matmul, gpu_step
from .gpu_protocol import Case, GraphTimer, RowFile, Timer, ceilings, measure
from .gpu_table import markdown
from .gpu_tune import tune
from .provenance import collect
from .timing import version_of

Progress = Callable[[str, int, int], None]
# of the time that tuning may take
TUNING_SHARE = 0.35
FAMILIES: tuple[Callable[[], list[Case]], ...] = (
    gpu_matmul.cases,
    gpu_attention.cases,
    gpu_decode.cases,
    gpu_step.cases,
    gpu_generate.cases,
)


class NoGpuError(RuntimeError):
    """There is no GPU to measure."""


@dataclasses.dataclass(frozen=True)
class GpuRun:
    """What a run gave: its rows, its files, how many cases were wrong, and how many the time did not allow."""

    rows: list[dict[str, Any]]
    files: list[Path]
    wrong: int
    left_out: int


def all_cases(pattern: str | None = None) -> list[Case]:
    """Those whose family or name holds ``pattern``, the most telling first.

    Raises:
        ValueError: no case does.
    """
    found = [case for family in FAMILIES for case in family()]
    kept = [c for c in found if pattern is None or pattern in f"{c.family} {c.name}"]
    if not kept:
        raise ValueError(
            f"no case has {pattern!r} in its name; families: {', '.join({c.family for c in found})}"
        )
    return sorted(kept, key=lambda case: case.priority)


def run_gpu(
    folder: str | Path,
    *,
    minutes: float = 8.0,
    kernel: str | None = None,
    tuned: bool = True,
    command: str | None = None,
    progress: Progress | None = None,
) -> GpuRun:
    """Measure the GPU at hand into ``folder``/gpu: <device>.jsonl, <device>.md and what tuning found.

    Raises:
        NoGpuError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise NoGpuError(
            f"no GPU: torch {torch.__version__} sees no CUDA device; "
            "`brise bench compile` shows what can be known of the kernels without one"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    return run_cases(
        all_cases(kernel),
        device,
        GraphTimer(device),
        Path(folder) / "gpu",
        minutes=minutes,
        tuner=tune if tuned else None,
        command=command,
        progress=progress,
    )


def run_cases(
    cases: list[Case],
    device: torch.device,
    timer: Timer,
    folder: Path,
    *,
    minutes: float,
    tuner: Callable[..., tuple[tuning.Tuned, list[dict[str, Any]]]] | None = None,
    scale: float = 1.0,
    command: str | None = None,
    progress: Progress | None = None,
) -> GpuRun:
    """The run itself, on any device and with any timer; ``scale`` shrinks the ceilings' sizes."""
    begin = time.monotonic()
    origin = dataclasses.asdict(collect(device, 0, command))
    for package in ("bitsandbytes", "gemlite"):
        origin["versions"][package] = version_of(package)
    name = re.sub(r"[^a-z0-9]+", "-", origin["device"].lower()).strip("-")
    file = RowFile(folder / f"{name}.jsonl")
    table = folder / f"{name}.md"
    files = [file.path, table]
    say = progress or (lambda *_: None)
    left_out = 0
    try:
        file.add({**ceilings(device, timer, scale), "provenance": origin})
        if tuner is not None:
            say("tuning", 0, 0)
            files.append(
                _tune(tuner, device, timer, file, folder, origin, begin + 60 * minutes * TUNING_SHARE)
            )
        for i, case in enumerate(cases):
            if time.monotonic() - begin > 60 * minutes:
                left_out = len(cases) - i
                break
            say("cases", i, len(cases))
            file.add({**measure(case, device, timer), "provenance": origin})
            table.write_text(markdown(file.rows, len(cases) - i - 1))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        file.close()
    measured = [row for row in file.rows if "ok" in row]
    return GpuRun(file.rows, files, sum(not row["ok"] for row in measured), left_out)


def _tune(
    tuner: Callable[..., tuple[tuning.Tuned, list[dict[str, Any]]]],
    device: torch.device,
    timer: Timer,
    file: RowFile,
    folder: Path,
    origin: dict[str, Any],
    deadline: float,
) -> Path:
    """Find the launches, use them from here on, and write them where they can be committed from."""
    found, rows = tuner(
        device, timer, deadline=deadline, origin={k: origin[k] for k in ("device", "versions")}
    )
    for row in rows:
        file.add({**row, "provenance": origin})
    arch = "cpu"
    if device.type == "cuda":
        from ..kernels.launch import architecture

        arch = architecture(device) or "unknown"
    tuning.use(arch, found)
    path = folder / f"{arch}.json"
    path.write_text(found.to_json())
    return path
