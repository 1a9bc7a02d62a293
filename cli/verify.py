"""``brise verify``: what is wrong with a checkpoint of any format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import FAILED
from .options import EvalLength, EvalText, EvalWindows
from .session import Debug, Json, session_of
from .sources import SRC_HELP, resolve

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from ..model.foreign.doctor import Examination
    from .session import Session

EPILOG = """
[bold]brise verify some-model-GPTQ[/bold]

[bold]brise verify build/int4 --against smollm2-135m[/bold]  every weight against its original

[bold]brise verify build/int4 --against smollm2-135m --kl 0.5 --windows 4[/bold]  its predictions as well
"""


def verify(
    ctx: typer.Context,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help=SRC_HELP + " Of any format that is read.")
    ],
    against: Annotated[
        str | None, typer.Option(metavar="SRC", help="The checkpoint it was made from.")
    ] = None,
    kl: Annotated[
        float | None,
        typer.Option(min=0.0, help="Nats a token that its predictions may diverge from those of SRC."),
    ] = None,
    text: EvalText = "boolq",
    windows: EvalWindows = 4,
    length: EvalLength = 512,
    json_: Json = False,
    debug: Debug = False,
) -> int:
    """Examine a checkpoint: tensors against config, scales, zero points, codes, and what it was made from.

    The exit code is 1 where something is wrong; each finding names its module.
    """
    session = session_of(ctx)
    if kl is not None and against is None:
        raise ValueError("--kl compares predictions with those of SRC: name it with --against")
    from ..model.foreign.doctor import examine

    folder = resolve(checkpoint, session)
    source = None if against is None else resolve(against, session)
    with session.progress() as bars:
        found = examine(folder, source, progress=lambda what, done, total: bars("verify", done, total))
    divergence = None
    if kl is not None and source is not None and found.healthy:
        divergence = _divergence(session, folder, source, text, windows, length)
        if not divergence <= kl:
            found.add("the model", f"its predictions diverge by {divergence:.4f} nats a token, above {kl:g}")
    document = {
        "checkpoint": checkpoint,
        "against": against,
        "healthy": found.healthy,
        "modules": found.modules,
        "findings": [{"module": f.module, "what": f.what} for f in found.findings],
        "errors": found.errors,
        "kl": divergence,
    }
    session.finish(document, lambda console: _show(console, document, found))
    return 0 if found.healthy else FAILED


def _divergence(session: Session, folder: Path, source: Path, text: str, windows: int, length: int) -> float:
    from ..eval.evaluate import evaluate

    with session.progress() as bars:
        row = evaluate(
            folder, baseline=source, text=text, windows=windows or None, length=length, progress=bars
        )
    assert row.divergence is not None
    return float(row.divergence.kl)


def _show(console: Console, document: dict[str, Any], found: Examination) -> None:
    for finding in found.findings:
        console.print(str(finding), markup=False, soft_wrap=True)
    if found.errors:
        worst = max(found.errors, key=lambda path: found.errors[path])
        console.print(f"largest weight error {found.errors[worst]:.3e} (squared, relative), of {worst}")
    if document["kl"] is not None:
        console.print(f"divergence {document['kl']:.4f} nats a token")
    verdict = "nothing is wrong" if found.healthy else f"{len(found.findings)} findings"
    console.print(f"{document['checkpoint']}: {verdict} ({found.modules} quantized modules)")


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(verify)
