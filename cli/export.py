"""``brise export``: a checkpoint in the format of another library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .session import Debug, Json, session_of
from .sources import SRC_HELP, resolve

if TYPE_CHECKING:
    from rich.console import Console

    from ..model.foreign.plan import Plan

EPILOG = """
[bold]brise export build/nf4-dq build/nf4-bnb --format bitsandbytes[/bold]  lossless

[bold]brise export build/gptq-int4-g128 build/marlin --format gptq[/bold]

[bold]brise export TheBloke/some-model-GPTQ build/ct --format compressed-tensors --plan[/bold]  says what it would cost
"""


def export(
    ctx: typer.Context,
    src: Annotated[
        str, typer.Argument(metavar="SRC", help=SRC_HELP + " Ours, or any format that is written.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder (for gguf: the file) to make.")],
    format: Annotated[str, typer.Option("--format", "-f", help="One of the formats below.")],
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Allow weights that cannot be kept to be rounded anew.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would happen, and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub name of the model it was made from, for the model card.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Put SRC's rows of DIR/runs.jsonl into the model card.")
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Upload OUT to this repository of the Hugging Face hub."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository a private one.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Write SRC in the format of another library, and say before what that keeps.

    A conversion is lossless, or keeps the codes and rounds scales, or needs re-quantization: then it is refused
    unless --requantize is there. OUT appears when it is complete, or not at all, with a model card.
    """
    session = session_of(ctx)
    if out.exists() and not overwrite and not plan:
        raise FileExistsError(f"{out} exists; choose another one, or pass --overwrite to replace it")
    if push_to_hub is not None and plan:
        raise ValueError("--plan writes nothing, so there is nothing for --push-to-hub")
    from ..model.foreign.export import export_checkpoint, lookup, plan_export

    lookup(format)
    folder = resolve(src, session)
    if plan:
        made = plan_export(folder, format)
    else:
        figures = None if results is None else _figures(results, folder)
        with session.progress() as bars:
            made = export_checkpoint(
                folder,
                out,
                format,
                requantize=requantize,
                overwrite=overwrite,
                base_model=base_model,
                figures=figures,
                announce=lambda plan: session.note(plan.describe()),
                progress=lambda what, done, total: bars("export", done, total),
            )
    if push_to_hub is not None:
        _push(out, push_to_hub, private)
    document = {"path": None if plan else str(out), "hub": push_to_hub, **made.to_dict()}
    session.finish(document, lambda console: _show(console, made, None if plan else out))


def _figures(results: Path, folder: Path) -> str:
    """The rows of ``results`` that were measured of this very checkpoint, as a table.

    Raises:
        ValueError: there is none.
    """
    from ..eval.provenance import model_hash
    from ..eval.record import ROWS, read_rows
    from ..eval.report import group_rows, markdown

    sha256 = model_hash(folder)
    rows = [row for row in read_rows(results / ROWS)[0] if row.model.sha256 == sha256]
    if not rows:
        raise ValueError(f"{results / ROWS} has no row of {folder}; run brise eval {folder} --out {results}")
    return "\n".join(markdown(group) for group in group_rows(rows))


def _push(out: Path, name: str, private: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=out, commit_message="Add the quantized model")


def _show(console: Console, plan: Plan, out: Path | None) -> None:
    console.print(plan.describe() + ("" if out is None else f"\n{out}"))


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(export)
