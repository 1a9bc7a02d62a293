"""Ten configurations from the Hessians of one pass, against a full run for each: the time, and what it costs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ..model.hessian_store import gather_hessians
from ..model.stream import quantize_checkpoint
from ..quant.config import Calibration, QuantConfig, QuantSpec, Rule
from ..quant.gptq import GPTQOptions
from .calibration import calibration_windows
from .model_info import ModelInfo, model_info
from .provenance import Provenance, collect

Progress = Callable[[str, int, int], None]
_BODY = ("*layers.*",)


def ten_specs() -> dict[str, QuantSpec]:
    """Bits, groups, damping, format and order, each changed from int4 in groups of 64."""

    def spec(fmt: str, group: int | None, symmetric: bool = True, **options: object) -> QuantSpec:
        return QuantSpec(
            format=fmt,
            algorithm="gptq",
            group_size=group,
            symmetric=symmetric,
            options=GPTQOptions(**options),  # type: ignore[arg-type]
        )

    return {
        "int4-g64": spec("int4", 64),
        "int4-g32": spec("int4", 32),
        "int4-row": spec("int4", None),
        "int4-g64-asym": spec("int4", 64, False),
        "int4-g64-damp0.1": spec("int4", 64, damp=0.1),
        "int4-g64-in-order": spec("int4", 64, act_order=False),
        "int3-g64": spec("int3", 64),
        "int2-g64": spec("int2", 64),
        "nf4": spec("nf4", 64),
        "int8": spec("int8", None),
    }


@dataclass(frozen=True)
class CalibrateBench:
    """Seconds.

    Attributes:
        gather: of the one pass. solve: of each configuration from its Hessians, writing included.
        exact: of full sequential runs of the first configurations; fewer than all are scaled to all.
        ratio: of the full runs' time to that of the pass and all the solving.
    """

    model: ModelInfo
    calibration: dict[str, object]
    gather: float
    solve: dict[str, float]
    exact: dict[str, float]
    ratio: float
    provenance: Provenance

    def in_words(self) -> str:
        once = self.gather + sum(self.solve.values())
        measured = len(self.exact) == len(self.solve)
        full = f"{once * self.ratio:.0f} s" + ("" if measured else f" (scaled from {len(self.exact)})")
        return (
            f"{len(self.solve)} configurations of {self.model.name}: one pass {self.gather:.0f} s and solving "
            f"{sum(self.solve.values()):.0f} s, against full runs of {full}: {self.ratio:.1f} times faster."
        )


def bench_calibrate(
    source: Path,
    calibration: Calibration,
    *,
    exact: int | None = None,
    specs: dict[str, QuantSpec] | None = None,
    work: Path | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> CalibrateBench:
    """Time both ways on ``source``.

    Args:
        exact: full runs to make, the first ones; None makes all.
        specs: in place of :func:`ten_specs`.
        work: where the checkpoints are made; each goes when it is timed.
    """
    import torch

    specs = specs or ten_specs()
    exact = len(specs) if exact is None else exact
    if not 1 <= exact <= len(specs):
        raise ValueError(f"expected 1 to {len(specs)} full runs, got {exact}")
    origin = collect(
        torch.device("cpu"), 0, command
    )  # of the code that begins, not of what is there at the end
    ids = calibration_windows(source, calibration)
    once = dataclasses.replace(calibration, hessians="once", target="quantized", true_sequential=False)
    full = dataclasses.replace(calibration, hessians="sequential", target="quantized", true_sequential=True)
    solve: dict[str, float] = {}
    runs: dict[str, float] = {}
    total = 1 + len(specs) + exact
    tell = progress or (lambda *_: None)
    with TemporaryDirectory(prefix="brise-bench-", dir=work) as folder:
        place = Path(folder)
        begin = time.perf_counter()
        gather_hessians(source, ids, place / "hessians")
        gather = time.perf_counter() - begin
        tell("calibrate once", 1, total)
        for how, seconds, names in ((once, solve, list(specs)), (full, runs, list(specs)[:exact])):
            for name in names:
                begin = time.perf_counter()
                config = QuantConfig((Rule(_BODY, specs[name]),), how)
                quantize_checkpoint(
                    source,
                    place / "made",
                    config,
                    calibration=ids,
                    overwrite=True,
                    hessians=place / "hessians",
                )
                seconds[name] = time.perf_counter() - begin
                tell("calibrate once", 1 + len(solve) + len(runs), total)
    mean = sum(runs.values()) / len(runs)
    return CalibrateBench(
        model_info(source),
        once.to_dict(),
        gather,
        solve,
        runs,
        mean * len(specs) / (gather + sum(solve.values())),
        origin,
    )
