"""``brise compare``, ``brise rerun``, ``brise baseline``: two checkpoints in pairs, a row again, predictions kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import FAILED
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
    from ..eval.record import Row

COMPARE_EPILOG = """
[bold]brise compare nf4 int4-g64 --rows results/demo[/bold]  two rows, by name, of one folder

[bold]brise compare build/nf4 build/int4 --baseline smollm2-135m --windows 32[/bold]  two checkpoints
"""
RERUN_EPILOG = "[bold]brise rerun results/demo nf4[/bold]"
BASELINE_EPILOG = """
[bold]brise baseline ./model base.kld --protocol llamacpp-512 --text wiki.test.raw[/bold]
"""


def compare(
    ctx: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, or a row's name with --rows.")],
    b: Annotated[str, typer.Argument(metavar="B", help="As A.")],
    rows: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compare rows that were measured, of DIR/runs.jsonl.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="SRC", help="Compare in KL to this model besides.")
    ] = None,
    protocol: ProtocolName = "free",
    text: ScoredText = None,
    windows: WindowCount = None,
    length: EvalLength = 1024,
    batch: Batch = 1,
    dtype: DtypeOption = None,
    device: Device = "cpu",
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Say whether A is better than B on the same windows (and items of tasks), or whether it may be chance."""
    session = session_of(ctx)
    if rows is not None:
        from ..eval.rerun import find_row

        found = [find_row(rows, name) for name in (a, b)]
    else:
        from ..eval.evaluate import baseline_of, evaluate
        from ..eval.provenance import command_line
        from ..eval.setting import make_setting

        folders = [resolve(name, session) for name in (a, b)]
        how: dict[str, Any] = {
            "text": text,
            "protocol": protocol,
            "windows": window_count(windows, protocol),
            "length": length,
            "batch": batch,
            "dtype": torch_dtype(dtype),
            "device": device,
        }
        with session.progress() as bars:
            against = None
            if baseline is not None:
                setting = make_setting(folders[0], **how)
                against = baseline_of(fetched(baseline, session), setting, progress=bars)
            found = [
                evaluate(folder, baseline=against, command=command_line(), progress=bars, **how)
                for folder in folders
            ]
    sentences, document = _paired(found[0], found[1], a, b, rows)
    session.finish(document, lambda console: print("\n".join(sentences)))


def _paired(first: Row, second: Row, a: str, b: str, folder: Path | None) -> tuple[list[str], dict[str, Any]]:
    from ..eval.compare import compare_sums, mcnemar
    from ..eval.tasks import read_items

    if first.sums is None or second.sums is None:
        lacking = a if first.sums is None else b
        raise ValueError(f"{lacking} was measured before sums by window were kept: measure it again")
    if first.protocol.identity() | {"speed": None} != second.protocol.identity() | {"speed": None}:
        raise ValueError(f"{a} and {b} were measured under different protocols: that is no comparison")
    # KL to one model and KL to another are two quantities
    one_baseline = (first.baseline and first.baseline.sha256) == (second.baseline and second.baseline.sha256)
    one, two = first.sums, second.sums
    if not one_baseline:
        one, two = (dataclasses.replace(sums, kl=None) for sums in (one, two))
    paired = compare_sums(one, two)
    sentences = [comparison.in_words(a, b) for comparison in paired]
    if first.sums.kl and second.sums.kl and not one_baseline:
        sentences.append(f"KL is not compared: {a} and {b} were measured against different baselines.")
    document: dict[str, Any] = {"a": a, "b": b, "windows": [dataclasses.asdict(c) for c in paired]}
    tasks = []
    for name, score in (first.tasks or {}).items():
        other = (second.tasks or {}).get(name)
        if folder is None or other is None:
            continue
        if other.items_sha256 != score.items_sha256:
            sentences.append(f"{name} is not compared: the items of {a} and {b} are not the same ones.")
            continue
        items = [read_items(folder, row.key, name, score.metric) for row in (first, second)]
        test = mcnemar(name, items[0], items[1])
        tasks.append(dataclasses.asdict(test))
        sentences.append(test.in_words(a, b))
    return sentences, {**document, "tasks": tasks, "in_words": sentences}


def rerun(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the rows.")],
    row: Annotated[str, typer.Argument(metavar="ROW", help="Its name, or the beginning of its key.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="The source; by default the asset or hub name in the row."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Where the row's text is now, if it was a file elsewhere.")
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Repeat a row: make its checkpoint again, measure it, and compare the figures to the bit.

    On the machine, versions and threads of then the figures of quality agree. Exit code 1 where they do not.
    """
    from ..eval.provenance import command_line
    from ..eval.rerun import find_row
    from ..eval.rerun import rerun as repeat

    session = session_of(ctx)
    before = find_row(folder, row)
    source = model or (before.baseline or before.model).name
    with session.progress() as bars:
        found = repeat(before, fetched(source, session), text=text, command=command_line(), progress=bars)
    document = {
        "agrees": found.agrees,
        "in_words": found.in_words(),
        "figures": [dataclasses.asdict(figure) for figure in found.figures],
        "changed": found.changed,
        "row": found.now.to_dict(),
    }
    session.finish(document, lambda console: print(found.in_words()))
    if not found.agrees:
        raise typer.Exit(FAILED)


def baseline(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="SRC", help=SRC_HELP)],
    out: Annotated[Path, typer.Argument(metavar="FILE", help="A .kld file of llama.cpp's kind.")],
    protocol: ProtocolName = "llamacpp-512",
    text: ScoredText = None,
    windows: WindowCount = None,
    dtype: DtypeOption = None,
    device: Device = "cpu",
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model's predictions in 16 bits as llama.cpp does, to compare its quantizations or ours with."""
    session = session_of(ctx)
    folder = resolve(model, session)

    from ..eval.logprobs import write_kld
    from ..eval.setting import make_setting
    from ..model.checkpoint import load_model

    setting = make_setting(
        folder,
        text,
        protocol=protocol,
        windows=window_count(windows, protocol),
        dtype=torch_dtype(dtype),
        device=device,
    )
    with session.progress() as bars:
        loaded = load_model(folder, dtype=setting.dtype, device=str(setting.device))
        scores = write_kld(out, loaded, setting.windows, progress=bars)
    document = {
        "file": str(out),
        "bytes": out.stat().st_size,
        "windows": setting.windows.count,
        "perplexity": dataclasses.asdict(scores.perplexity),
    }
    session.finish(document, lambda console: print(out))


def add_to(app: typer.Typer) -> None:
    app.command(epilog=COMPARE_EPILOG)(compare)
    app.command(epilog=RERUN_EPILOG)(rerun)
    app.command(epilog=BASELINE_EPILOG)(baseline)
