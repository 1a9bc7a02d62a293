"""``brise sweep`` and ``brise report``: many configurations of one model, their table and their picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import FAILED
from .options import (
    Batch,
    Bos,
    BosOption,
    Device,
    DtypeOption,
    EvalLength,
    ProtocolName,
    ScoredText,
    Seed,
    Stride,
    Tasks,
    TimeIt,
    WindowCount,
    speed_protocol,
    torch_dtype,
    window_count,
)
from .quantize import load_config
from .session import Debug, Json, session_of
from .sources import SRC_HELP, fetched

if TYPE_CHECKING:
    from rich.console import Console

    from ..eval.record import Row
    from ..eval.sweep import SweepResult


class EngineName(StrEnum):
    local = "local"
    ray = "ray"


SWEEP_EPILOG = """
[bold]brise sweep results/smollm2/sweep.yaml --out results/smollm2 --jobs 2[/bold]

[bold]brise sweep --model smollm2-135m --configs int8,nf4,gptq-nf4 --out results/mine[/bold]

[bold]brise sweep --model ./checkpoint --configs nf4,mine.yaml --out results/mine --text corpus.txt#evaluation
--calibration-text corpus.txt#calibration --calibration-windows 128[/bold]
"""
REPORT_EPILOG = "[bold]brise report results/demo[/bold]"


def sweep(
    ctx: typer.Context,
    spec: Annotated[
        Path | None,
        typer.Argument(
            metavar="[SPEC]", help="A YAML file of models, configs and metrics, in place of options."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For runs.jsonl, table.md and the pictures.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="SRC", help=SRC_HELP)] = None,
    configs: Annotated[
        str,
        typer.Option(
            "--configs", "-c", metavar="A,B,C", help="Presets and config files, with commas between."
        ),
    ] = "",
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For the quantized checkpoints; the default is --out's."),
    ] = None,
    protocol: ProtocolName = "free",
    text: ScoredText = None,
    windows: WindowCount = None,
    length: EvalLength = 1024,
    stride: Stride = None,
    bos: BosOption = Bos.auto,
    batch: Batch = 1,
    dtype: DtypeOption = None,
    device: Device = "cpu",
    speed: TimeIt = True,
    task: Tasks = None,
    seed: Seed = 0,
    calibration_text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="In place of what the configs say; names as in --text.")
    ] = None,
    calibration_windows: Annotated[
        int | None, typer.Option(min=1, help="In place of what the configs say; the rows say so.")
    ] = None,
    once: Annotated[
        bool,
        typer.Option(
            "--calibrate-once/--sequential",
            help="All Hessians from one pass over the unquantized model: many configs in the time of a few.",
        ),
    ] = False,
    draws: Annotated[
        int, typer.Option(min=0, help="Make each calibrated config on so many draws of its text.")
    ] = 0,
    jobs: Annotated[
        int, typer.Option(min=0, help="Cells at once, each in a process of its own; 0 runs them in this one.")
    ] = 0,
    engine: Annotated[
        EngineName, typer.Option(help="local, or ray for a cluster (pip install brise[ray]).")
    ] = EngineName.local,
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster; without it one is started here.")
    ] = None,
    gpus: Annotated[float, typer.Option(min=0, help="Per cell, on Ray.")] = 0,
    retries: Annotated[int, typer.Option(min=0, help="Of a cell whose worker dies, on Ray.")] = 3,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            metavar="MINUTES",
            help="End a cell that takes longer, and go on; each then runs in a process of its own.",
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write table and picture at the end.")
    ] = True,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize models in several ways, and measure each against its source under one protocol.

    What is done already is not done again. A configuration that fails does not stop the others, but then the
    command ends with exit code 1.
    """
    session = session_of(ctx)
    seconds = None if timeout is None else 60 * timeout
    if out is None:
        raise typer.BadParameter("say where the rows go", param_hint="'--out'")
    if report and importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the picture needs matplotlib: pip install "brise[demo]", or pass --no-report')
    options: dict[str, Any] = {
        "checkpoints": checkpoints,
        "note": session.note if spec or jobs or timeout or engine == EngineName.ray else None,
    }
    run: Callable[..., SweepResult]
    if spec is not None:
        if model is not None or configs:
            raise typer.BadParameter("a file says both itself", param_hint="'--model', '--configs'")
        from ..eval.spec import load_spec, run_spec

        plan = load_spec(spec)
        run = partial(run_spec, plan, out, resolve=lambda name: fetched(name, session))
    else:
        names = [name.strip() for name in configs.split(",") if name.strip()]
        if model is None or not names:
            raise typer.BadParameter("give both, or a file", param_hint="'--model', '--configs'")
        for name in names:  # a slip shows before anything is downloaded
            load_config(name)

        from ..eval.sweep import run_sweep

        run = partial(run_sweep, fetched(model, session), names, out)
        options |= {
            "text": text,
            "protocol": protocol,
            "windows": window_count(windows, protocol),
            "length": length,
            "stride": stride,
            "bos": bos.value,
            "batch": batch,
            "dtype": torch_dtype(dtype),
            "device": device,
            "speed": speed_protocol(speed),
            "tasks": task or (),
            "seed": seed,
            "calibration_text": calibration_text,
            "calibration_windows": calibration_windows,
            "calibrate_once": once,
            "draws": draws,
        }
    from ..eval.provenance import command_line

    if engine == EngineName.ray:
        from ..eval.engine_ray import OnRay

        options["engine"] = OnRay(address, gpus=gpus, retries=retries, timeout=seconds)
    elif jobs or timeout is not None:
        from ..eval.engines import Processes

        options["engine"] = Processes(max(1, jobs), timeout=seconds)
    with session.progress() as bars:
        result = run(command=command_line(), progress=bars, **options)
    for problem in result.problems:
        session.note(problem)
    files: list[Path] = []
    if report and result.rows:
        from ..eval.report import write_report

        files = write_report(out).files
    document = {
        "out": str(out),
        "rows": [row.to_dict() for row in result.rows],
        "skipped": result.skipped,
        "failures": {failure.name: str(failure) for failure in result.failures},
        "files": [str(file) for file in files],
    }
    session.finish(document, lambda console: _show(console, result.rows, result.skipped, files))
    for failure in result.failures:
        session.note(f"brise: {failure}")
    if result.failures:
        raise typer.Exit(FAILED)


def report(
    ctx: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of a sweep, with its runs.jsonl.")
    ],
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Write the table and the picture of the rows in DIR/runs.jsonl."""
    from ..eval.report import write_report

    session = session_of(ctx)
    written = write_report(folder)
    for problem in written.problems:
        session.note(problem)
    files = [str(file) for file in written.files]
    session.finish({"files": files, "left_out": written.problems}, lambda console: print("\n".join(files)))


def _show(console: Console, rows: list[Row], skipped: list[str], files: list[Path]) -> None:
    """A table for each protocol and source: figures of two are never in one."""
    from ..eval.report import group_rows, title

    groups = group_rows(rows)
    for group in groups:
        if len(groups) > 1:
            print(f"\n{title(group)}")
        keys = {row.key for row in group.rows}
        _show_table(console, [row for row in rows if row.key in keys], skipped)
    for file in files:
        print(file)


def _show_table(console: Console, rows: list[Row], skipped: list[str]) -> None:
    from rich.table import Table

    from ..eval.report import pm, spread

    table = Table(box=None, pad_edge=False)
    table.add_column("configuration")
    for heading in ("MB", "bits/weight", "perplexity", "KL", "same first choice", "decode, tokens/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        d = row.divergence
        table.add_row(
            row.name + (" (done before)" if row.name in skipped else ""),
            f"{row.memory.bytes / 1e6:.1f}",
            f"{row.memory.bits_per_weight:.2f}",
            pm(row.perplexity.value, row.perplexity.stderr, 2),
            "" if d is None else pm(d.kl, d.kl_stderr, 4),
            "" if d is None else pm(d.top1, d.top1_stderr, 1, 100) + " %",
            "" if row.speed is None else spread(row.speed.decode),
        )
    console.print(table)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=SWEEP_EPILOG)(sweep)
    app.command(epilog=REPORT_EPILOG)(report)
