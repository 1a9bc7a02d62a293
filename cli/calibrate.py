"""``brise calibrate``: the Hessians of one pass, what they are worth, and what they save."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .session import Debug, Json, session_of
from .sources import SRC_HELP, resolve

if TYPE_CHECKING:
    from rich.console import Console

    from ..eval.calibration import CalibrationReport

EPILOG = """
[bold]brise calibrate smollm2-135m --out .cache/hessians --windows 64[/bold]

[bold]brise calibrate smollm2-135m --out results/calibrate-once --windows 16 --benchmark --exact 2[/bold]
"""
REPORT = "calibration.json"
BENCH = "calibrate-once.jsonl"


def calibrate(
    ctx: typer.Context,
    src: Annotated[str, typer.Argument(metavar="SRC", help=SRC_HELP)],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="For the Hessians and calibration.json; of a benchmark, its row."),
    ],
    text: Annotated[str, typer.Option(help="Names as in brise eval.")] = "boolq",
    windows: Annotated[int, typer.Option(min=1)] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Draw the windows' places; without it they are the text's first."),
    ] = None,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Time ten configs from one pass against full runs of them.")
    ] = False,
    exact: Annotated[
        int | None, typer.Option(min=1, help="Full runs of the benchmark; fewer than ten are scaled.")
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Gather all Hessians of a model in one pass, and say what the calibration set is and how good they are.

    brise sweep --calibrate-once solves many configurations from them.
    """
    session = session_of(ctx)
    folder = resolve(src, session)

    from ..eval.bench_calibrate import bench_calibrate
    from ..eval.calibration import report_calibration
    from ..eval.provenance import command_line
    from ..quant.config import Calibration

    wanted = Calibration(text=text, windows=windows, length=length, seed=seed)
    if exact is not None and not benchmark:
        raise typer.BadParameter("is for --benchmark", param_hint="'--exact'")
    out.mkdir(parents=True, exist_ok=True)
    if benchmark:
        with session.progress() as bars:
            timed = bench_calibrate(
                folder, wanted, exact=exact, work=out, command=command_line(), progress=bars
            )
        document = dataclasses.asdict(timed)
        with (out / BENCH).open("a") as file:
            file.write(json.dumps(document) + "\n")
        session.finish(document, lambda console: print(timed.in_words()))
        return
    with session.progress() as bars:
        found = report_calibration(folder, wanted, out, progress=bars)
    document = dataclasses.asdict(found)
    (out / REPORT).write_text(json.dumps(document, indent=1) + "\n")
    session.finish(document, lambda console: _show(console, found))


def _show(console: Console, report: CalibrationReport) -> None:
    from rich.table import Table

    print(
        f"{report.tokens:,} tokens of {report.text} ({report.windows} x {report.length}), "
        f"{report.distinct:,} distinct, "
        f"{report.padding} of padding, {report.bos} windows with BOS; text {report.text_sha256[:16]}, tokens "
        f"{report.ids_sha256[:16]}"
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("Hessian of", "rank", "dead", "condition", "damping", "condition then"):
        table.add_column(heading, justify="left" if heading.startswith("Hess") else "right")
    for h in report.hessians:
        figures = (h.condition, h.damping, h.damped_condition)
        texts = ["none" if value is None else f"{value:.3g}" for value in figures]
        table.add_row(" ".join(h.modules), f"{h.rank} of {h.width}", str(h.dead), *texts)
    console.print(table)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(calibrate)
