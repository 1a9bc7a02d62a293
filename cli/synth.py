"""``brise synth``: checkpoints of full size with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .session import Debug, Json, session_of

EPILOG = """
[bold]brise synth mistral-7b build/7b[/bold]  14.5 GB

[bold]brise synth mistral-7b build/7b-2 --layers 2[/bold]  two blocks of the full width

[bold]brise synth mistral-tiny build/tiny --shard-size 100000[/bold]
"""


def synth(
    ctx: typer.Context,
    size: Annotated[
        str,
        typer.Argument(metavar="SIZE", help="mistral-7b, mistral-1b, mistral-100m or mistral-tiny."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks, in place of the size's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights: the same seed, the same bytes.")] = 0,
    shard_size: Annotated[int, typer.Option(min=1, help="Bytes of a shard at most.")] = 5_000_000_000,
    tokenizer: Annotated[
        bool,
        typer.Option("--tokenizer/--no-tokenizer", help="Add the tokenizer of Mistral-7B v0.1, fetched."),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint with Mistral's shapes and names and random weights.

    For tests and benchmarks of size: realistic spreads, some outlier channels, and for one seed always the same bytes.
    """
    from ..model.synth import SIZES

    session = session_of(ctx)
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are {', '.join(SIZES)}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another folder, or pass --overwrite to replace it")

    from ..eval.assets import fetch
    from ..model.synth import write_synth

    chosen = SIZES[size] if layers is None else dataclasses.replace(SIZES[size], blocks=layers)
    with session.progress() as bars:
        file = fetch("mistral-tokenizer", progress=bars) / "tokenizer.model" if tokenizer else None
        count = write_synth(
            chosen,
            out,
            file,
            seed=seed,
            overwrite=overwrite,
            max_shard_bytes=shard_size,
            progress=lambda what, done, total: bars(what, done >> 20, total >> 20),
        )
    session.finish(
        {"path": str(out), "size": size, "parameters": count, "seed": seed},
        lambda console: print(f"{out}: {count:,} parameters, bf16"),
    )


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(synth)
