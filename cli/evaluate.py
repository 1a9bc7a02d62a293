"""``brise eval``: what one checkpoint costs and gives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    Batch,
    Batches,
    Bos,
    BosOption,
    Contexts,
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
    numbers,
    speed_protocol,
    torch_dtype,
    window_count,
)
from .session import Debug, Json, session_of
from .sources import SRC_HELP, fetched

if TYPE_CHECKING:
    from rich.console import Console

    from ..eval.record import Row

EPILOG = """
[bold]brise eval build/nf4 --baseline smollm2-135m[/bold]

[bold]brise eval build/nf4 --baseline smollm2-135m --text corpus.txt --windows 0 --out results/mine[/bold]

[bold]brise eval smollm2-135m --no-speed --json[/bold]

[bold]brise eval ./Mistral-7B-v0.1 --protocol gptq-2048 --dtype float16 --device cuda[/bold]

[bold]brise eval build/nf4 --task lambada_offline:300 --task arc_easy_offline:200 --out results/mine[/bold]
"""


def evaluate(
    ctx: typer.Context,
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help=SRC_HELP)],
    baseline: Annotated[
        str | None,
        typer.Option(help="The model it was made from; without it there is no divergence.", metavar="SRC"),
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
    batches: Batches = "",
    contexts: Contexts = "",
    task: Tasks = None,
    baseline_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep the baseline's predictions there, in 16 bits, and take them from there."
        ),
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Append the row to DIR/runs.jsonl, for brise report.")
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a checkpoint: perplexity, divergence from its baseline, tasks, memory and speed."""
    session = session_of(ctx)
    folder = fetched(checkpoint, session)
    against = None if baseline is None else fetched(baseline, session)

    from ..eval.evaluate import evaluate
    from ..eval.provenance import command_line
    from ..eval.record import ROWS, append_row

    with session.progress() as bars:
        row = evaluate(
            folder,
            baseline=against,
            text=text,
            protocol=protocol,
            windows=window_count(windows, protocol),
            length=length,
            stride=stride,
            bos=bos.value,
            batch=batch,
            dtype=torch_dtype(dtype),
            device=device,
            speed=speed_protocol(speed),
            seed=seed,
            batches=numbers(batches),
            contexts=numbers(contexts),
            tasks=task or (),
            baseline_cache=baseline_cache,
            out=out,
            command=command_line(),
            progress=bars,
        )
    if out is not None:
        append_row(out / ROWS, row)
    session.finish(row.to_dict(), lambda console: show_row(console, row))


def show_row(console: Console, row: Row) -> None:
    """One row, a figure a line; what was not measured is not there."""
    from rich.table import Table

    from ..eval.memory import human_bytes
    from ..eval.report import pm, spread

    table = Table(box=None, show_header=False, pad_edge=False)
    p, m = row.protocol, row.memory
    table.add_row("model", row.name)
    table.add_row("protocol", p.name)
    table.add_row("text", f"{p.text}, {p.windows} windows of {p.length} tokens, {p.dtype} on {p.device}")
    table.add_row("perplexity", pm(row.perplexity.value, row.perplexity.stderr, 3))
    if row.words is not None:
        table.add_row("perplexity by the word", pm(row.words.value, row.words.stderr, 3))
        table.add_row("bits a byte", f"{row.words.bits_per_byte:.4f}")
    if row.relative is not None:
        table.add_row("against baseline", pm(row.relative.value, row.relative.stderr, 2, 100, "+") + " %")
    if row.divergence is not None:
        table.add_row("KL divergence", pm(row.divergence.kl, row.divergence.kl_stderr, 5) + " nats a token")
        table.add_row("same first choice", pm(row.divergence.top1, row.divergence.top1_stderr, 2, 100) + " %")
    if row.divergence is not None and (d := row.divergence.details) is not None:
        tail = (d.median, d.p90, d.p99, d.p999)
        table.add_row("KL median, p90, p99, p99.9", ", ".join(f"{q.value:.3g}" for q in tail))
        table.add_row("same five", f"{d.top5.value:.2%}")
        table.add_row(
            "the true token", f"{d.true_token.value:+.3%} in the mean, {d.true_token_rms.value:.3%} rms"
        )
    for task, score in (row.tasks or {}).items():
        table.add_row(task, f"{score.metric} {pm(score.value, score.stderr, 3)}, {score.items} items")
    table.add_row("stored", f"{human_bytes(m.bytes)}, {m.bits_per_weight:.3f} bits per weight in all")
    table.add_row("KV cache", f"{human_bytes(m.kv_cache)} at {m.kv_length} tokens")
    if m.process_peak is not None:
        table.add_row("process peak", human_bytes(m.process_peak))
    if m.gpu_peak is not None:
        table.add_row("GPU peak", human_bytes(m.gpu_peak))
    for point in row.speeds or ():
        table.add_row(
            f"batch {point.batch}, context {point.context}",
            f"decode {spread(point.decode)} tokens/s, {point.bandwidth / 1e9:.3g} GB/s; "
            f"prefill {spread(point.prefill)}",
        )
    if row.speed is not None:
        table.add_row("prefill", f"{spread(row.speed.prefill)} tokens/s, median (p20–p80)")
        table.add_row("decode", f"{spread(row.speed.decode)} tokens/s")
    console.print(table)


def add_to(app: typer.Typer) -> None:
    app.command("eval", epilog=EPILOG)(evaluate)
