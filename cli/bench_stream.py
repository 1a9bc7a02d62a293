"""``brise bench stream``: what quantizing a checkpoint of full size takes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .bench import bench
from .session import Debug, Json, session_of
from .sources import SRC_HELP, resolve

EPILOG = """
[bold]brise synth mistral-7b build/7b && brise synth mistral-7b build/7b-2 --layers 2[/bold]

[bold]brise bench stream build/7b --gptq build/7b-2[/bold]
"""


def stream(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help=SRC_HELP)],
    config: Annotated[str, typer.Option("--config", "-c", help="A plain preset or file.")] = "nf4-dq-all",
    gptq: Annotated[str | None, typer.Option(metavar="SRC", help="Also run GPTQ on this checkpoint.")] = None,
    gptq_config: Annotated[str, typer.Option(help="For --gptq.")] = "gptq-int4-g128",
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows for --gptq.")] = 32,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a calibration window for --gptq.")] = 512,
    text: Annotated[
        str | None, typer.Option(help="Calibration text for --gptq, in place of the config's.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Turns of each side of the comparison.")] = 5,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where checkpoints are made and removed again.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="For stream.jsonl and stream.md.")] = Path(
        "results"
    ),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a whole checkpoint, generate from it, and GPTQ another: time, cores, peak memory.

    Beside it one block by bitsandbytes, in turns; both must give the same codes. Measure on a machine that does
    nothing else.
    """
    session = session_of(ctx)
    folder = resolve(source, session)
    second = None if gptq is None else resolve(gptq, session)

    from ..eval.bench_stream import run_bench, write_bench
    from ..eval.provenance import command_line

    with tempfile.TemporaryDirectory(dir=work) as scratch, session.progress() as bars:
        rows = run_bench(
            folder,
            Path(scratch),
            config=config,
            gptq=second,
            gptq_config=gptq_config,
            windows=windows,
            length=length,
            text=text,
            repeats=repeats,
            command=command_line(),
            progress=bars,
        )
    files = write_bench(out, rows)
    session.finish(
        {"rows": rows, "files": [str(file) for file in files]},
        lambda console: print(files[1].read_text(), end=""),
    )


def add_to(app: typer.Typer) -> None:
    bench.command(epilog=EPILOG)(stream)
