"""``brise bench decode``: generation beside transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .session import Debug, Json, session_of
from .sources import resolve

EPILOG = """
[bold]brise bench decode[/bold]

[bold]brise bench decode --batch 1 --prompt 128 --new-tokens 128[/bold]

[bold]brise bench decode --device cuda --minutes 9[/bold]
"""


def decode(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Option("--model", metavar="SRC", help="The checkpoint that is continued on a CPU.")
    ] = "smollm2-135m",
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch", min=1, help="Prompts at once; may be repeated. Default: 1 and 8, on a GPU also 32."
        ),
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(
            "--prompt", min=1, help="Tokens of a prompt; may be repeated. Default: 128, on a GPU also 4096."
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens written to each.")] = 64,
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each side.")] = 5,
    memory: Annotated[bool, typer.Option(help="Measure peaks, on a CPU in processes of their own.")] = True,
    device: Annotated[
        str, typer.Option(help="cpu: a checkpoint in fp32. cuda: Mistral-7B's shape with random weights.")
    ] = "cpu",
    minutes: Annotated[
        float, typer.Option(min=0.1, help="On a GPU: nothing is begun later than this.")
    ] = 9.0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="For decode.jsonl and decode.md.")] = Path(
        "results"
    ),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Tokens a second, time to the first, memory and bytes a second, beside transformers' generate in the same run.

    The tokens must be the same before anything is timed. Measure on a machine that does nothing else.
    """
    session = session_of(ctx)
    source = resolve(model, session) if device == "cpu" else None

    from ..eval.bench_decode import run_cpu, write_rows
    from ..eval.bench_decode_gpu import run_gpu
    from ..eval.provenance import command_line

    with session.progress() as bars:
        if source is not None:
            rows = []
            for length in prompt or (128,):
                rows += run_cpu(
                    source,
                    batches=batch or (1, 8),
                    prompt=length,
                    new=new_tokens,
                    rounds=rounds,
                    memory=memory,
                    command=command_line(),
                    progress=bars,
                )
            files = write_rows(out, rows)
        else:
            rows, files = run_gpu(
                out,
                device=device,
                batches=batch or (1, 8, 32),
                prompts=prompt or (128, 4096),
                new=new_tokens,
                rounds=rounds,
                minutes=minutes,
                command=command_line(),
                progress=bars,
            )
    session.finish(
        {"rows": rows, "files": [str(file) for file in files]},
        lambda console: print(files[1].read_text(), end=""),
    )
