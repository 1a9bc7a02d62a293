"""``brise surface``: quality and memory against window and cache precision together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    Batch,
    Device,
    DtypeOption,
    EvalLength,
    ProtocolName,
    ScoredText,
    WindowCount,
    torch_dtype,
    window_count,
)
from .session import Debug, Json, session_of
from .sources import SRC_HELP, fetched, resolve

if TYPE_CHECKING:
    from rich.console import Console

    from ..eval.record import Row

EPILOG = """
[bold]brise surface build/nf4 build/int4 --baseline ./Mistral-7B-v0.1 --sliding own,1024,256 --cache model,int8,int4
--length 4096 --out results/surface[/bold]
"""


def surface(
    ctx: typer.Context,
    checkpoints: Annotated[list[str], typer.Argument(metavar="CKPT...", help=SRC_HELP)],
    baseline: Annotated[
        str, typer.Option(metavar="SRC", help="The unquantized model, with its own window and cache.")
    ],
    sliding: Annotated[
        str, typer.Option(metavar="own,256", help="Sliding windows, in tokens; own is the model's.")
    ] = "own",
    cache: Annotated[
        str,
        typer.Option(
            metavar="model,int8",
            help="Of the KV cache: model, bfloat16, float16, float8, int8, int4.",
        ),
    ] = "model,int8,int4",
    protocol: ProtocolName = "free",
    text: ScoredText = None,
    windows: WindowCount = None,
    length: EvalLength = 1024,
    batch: Batch = 1,
    dtype: DtypeOption = None,
    device: Device = "cpu",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Append the rows to DIR/runs.jsonl.")
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Measure checkpoints under every window and every precision of the KV cache.

    The cache is simulated: what attention reads is rounded as it would be stored. Its bytes are counted; its
    speed is not measured.
    """
    session = session_of(ctx)
    sizes = sliding_windows(sliding)
    folders = [resolve(checkpoint, session) for checkpoint in checkpoints]

    from ..eval.evaluate import baseline_of
    from ..eval.provenance import command_line
    from ..eval.record import ROWS, append_row
    from ..eval.setting import make_setting
    from ..eval.surface import measure_surface

    how: dict[str, Any] = {
        "text": text,
        "protocol": protocol,
        "windows": window_count(windows, protocol),
        "length": length,
        "batch": batch,
        "dtype": torch_dtype(dtype),
        "device": device,
        "command": command_line(),
    }
    rows: list[Row] = []
    with session.progress() as bars:
        setting = make_setting(folders[0], **how)
        against = baseline_of(fetched(baseline, session), setting, progress=bars)
        precisions = [part.strip() for part in cache.split(",") if part.strip()]
        for folder in folders:
            found = measure_surface(folder, setting, against, sizes, precisions, progress=bars)
            rows += found
            for row in found if out is not None else []:
                append_row(out / ROWS, row, once=True)  # type: ignore[operator]
    session.finish({"rows": [row.to_dict() for row in rows]}, lambda console: _show(console, rows))


def sliding_windows(text: str) -> list[int | None]:
    """``"own,256"`` as windows; None is the model's own.

    Raises:
        ValueError: anything but positive whole numbers and own, with commas between.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part == "own" or (part.isdigit() and int(part)) for part in parts):
        raise ValueError(f"expected windows as numbers or own, with commas between, got {text!r}")
    return [None if part == "own" else int(part) for part in parts]


def _show(console: Console, rows: list[Row]) -> None:
    from rich.table import Table

    from ..eval.report import pm

    table = Table(box=None, pad_edge=False)
    table.add_column("model, window and cache")
    for heading in ("weights, MB", "KV cache, MB", "perplexity", "against baseline, %", "KL"):
        table.add_column(heading, justify="right")
    for row in rows:
        assert row.variant is not None and row.relative is not None and row.divergence is not None
        table.add_row(
            row.name,
            f"{row.memory.bytes / 1e6:.1f}",
            f"{row.variant.kv_bytes / 1e6:.2f}",
            pm(row.perplexity.value, row.perplexity.stderr, 2),
            pm(row.relative.value, row.relative.stderr, 2, 100, "+"),
            pm(row.divergence.kl, row.divergence.kl_stderr, 4),
        )
    console.print(table)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(surface)
