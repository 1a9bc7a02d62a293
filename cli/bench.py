"""``brise bench``: our speed and memory beside others', in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .bench_decode import EPILOG as DECODE_EPILOG
from .bench_decode import decode
from .session import Debug, Json, session_of
from .sources import fetched

EPILOG = """
[bold]brise bench cpu[/bold]

[bold]brise bench cpu --gptq smollm2-135m --windows 64[/bold]
"""
COMPILE_EPILOG = """
[bold]brise bench compile[/bold]

[bold]brise bench compile --kernel matmul-int4 --arch 90[/bold]

[bold]brise bench compile --out results[/bold]
"""
GPU_EPILOG = """
[bold]brise bench gpu[/bold]

[bold]brise bench gpu --minutes 3 --kernel "int4 float16" --no-tune[/bold]
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
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config", "-c", help="For --gptq, as often as wanted. Default: GPTQ as published, and ours."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows for --gptq.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a calibration window for --gptq.")] = 1024,
    out: Annotated[Path, typer.Option(metavar="DIR", help="For cpu.jsonl and cpu.md.")] = Path("results"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """NF4 and quantized Linear layers on the CPU beside bitsandbytes, and what GPTQ takes.

    Both sides take turns in one process, and must give equal results before anything is timed. Measure on a
    machine that does nothing else.
    """
    session = session_of(ctx)
    source = None if gptq is None else fetched(gptq, session)

    from ..eval.bench_cpu import GPTQ_CONFIGS, GptqJob, run_bench, write_bench
    from ..eval.provenance import command_line

    jobs = []
    if source is not None:
        jobs = [GptqJob(source, name, windows, length) for name in config or GPTQ_CONFIGS]
    with session.progress() as bars:
        rows = run_bench(size, repeats, jobs, command=command_line(), progress=bars)
    files = write_bench(out, rows)
    session.finish(
        {"rows": rows, "files": [str(file) for file in files]},
        lambda console: print(files[1].read_text(), end=""),
    )


@bench.command("compile", epilog=COMPILE_EPILOG)
def compile_(
    ctx: typer.Context,
    arch: Annotated[
        list[int] | None,
        typer.Option(metavar="CC", help="80 for sm_80; give it twice for two. Default: all."),
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only configurations whose name holds this.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Bring compile.jsonl in this folder up to date.")
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Compile every kernel configuration that ships; no GPU is needed.

    Registers, spills, shared memory and instructions of each, for each architecture. Exit code 1 where one spills,
    takes too much shared memory, or lacks the instructions it is made for.
    """
    session = session_of(ctx)

    from ..eval.bench_compile import compile_rows, table, write_rows

    with session.progress() as bars:
        rows = compile_rows(arch or (), kernel, progress=bars)
    files = [] if out is None else [str(write_rows(out, rows))]
    faulty = sum(bool(row["faults"]) for row in rows)
    session.finish(
        {"rows": rows, "faulty": faulty, "files": files}, lambda console: print(table(rows), end="")
    )
    if faulty:
        session.note(f"brise: {faulty} of {len(rows)} configurations have faults")
        raise typer.Exit(1)


@bench.command(epilog=GPU_EPILOG)
def gpu(
    ctx: typer.Context,
    minutes: Annotated[float, typer.Option(min=0.1, help="No case is begun later than this.")] = 8.0,
    kernel: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only cases whose family or name holds this.")
    ] = None,
    tune: Annotated[bool, typer.Option(help="Look for the best launches first.")] = True,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Files go to DIR/gpu.")] = Path("results"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Check every kernel on the GPU against float64, tune it, and time it beside its peers.

    Rows are written as they come, the most telling first: a run that is cut short keeps what it has measured. Exit
    code 1 where a kernel was wrong.
    """
    session = session_of(ctx)

    from ..eval.bench_gpu import run_gpu
    from ..eval.provenance import command_line

    with session.progress() as bars:
        run = run_gpu(out, minutes=minutes, kernel=kernel, tuned=tune, command=command_line(), progress=bars)
    files = [str(file) for file in run.files]
    session.finish(
        {"rows": run.rows, "files": files, "wrong": run.wrong, "left_out": run.left_out},
        lambda console: print(run.files[1].read_text(), end=""),
    )
    if run.wrong:
        session.note(f"brise: {run.wrong} cases are wrong, see {files[0]}")
        raise typer.Exit(1)


bench.command(epilog=DECODE_EPILOG)(decode)


def add_to(app: typer.Typer) -> None:
    app.add_typer(bench, name="bench")
