"""``brise bench``: our speed and memory beside others', in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .session import Debug, Json, session_of
from .sources import fetched

EPILOG = """
[bold]brise bench cpu[/bold]

[bold]brise bench cpu --gptq smollm2-135m --windows 64[/bold]
"""

bench = typer.Typer(help="Measure our speed and memory beside others' in one run.", no_args_is_help=False)


@bench.callback()
def root() -> None:
    """Measure our speed and memory beside others' in one run."""


@bench.command(epilog=EPILOG)
def cpu(
    ctx: typer.Context,
    size: Annotated[int, typer.Option(min=64, help="Rows and columns of the weight.")] = 4096,
    repeats: Annotated[int, typer.Option(min=3, help="Timed repetitions of each side.")] = 15,
    gptq: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="Also time GPTQ of this checkpoint, in a process of its own."),
    ] = None,
    config: Annotated[str, typer.Option("--config", "-c", help="For --gptq.")] = "gptq-int4-g64",
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows for --gptq.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a calibration window for --gptq.")] = 1024,
    out: Annotated[Path, typer.Option(metavar="DIR", help="For cpu.jsonl and cpu.md.")] = Path("results"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """NF4 quantization and dequantization on the CPU beside bitsandbytes, and what GPTQ takes.

    Both sides take turns in one process, and must give equal results before anything is timed. Measure on a
    machine that does nothing else.
    """
    session = session_of(ctx)
    source = None if gptq is None else fetched(gptq, session)

    from ..eval.bench_cpu import GptqJob, run_bench, write_bench
    from ..eval.provenance import command_line

    job = None if source is None else GptqJob(source, config, windows, length)
    with session.progress() as bars:
        rows = run_bench(size, repeats, job, command=command_line(), progress=bars)
    files = write_bench(out, rows)
    session.finish(
        {"rows": rows, "files": [str(file) for file in files]},
        lambda console: print(files[1].read_text(), end=""),
    )


def add_to(app: typer.Typer) -> None:
    app.add_typer(bench, name="bench")
