"""The command ``brise``. Nothing heavy is imported here: each command imports what it runs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from . import (
    assets,
    bench,
    bench_stream,
    calibrate,
    compare,
    evaluate,
    export,
    generate,
    ledger,
    plan,
    quantize,
    surface,
    sweep,
    synth,
    verify,
)
from .errors import USAGE, Application

app = typer.Typer(
    cls=Application,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"brise {version('brise')}")
        raise typer.Exit


@app.callback(
    epilog="Example: [bold]brise quantize $(brise fetch smollm2-135m) build/nf4 --config nf4[/bold]",
)
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize Mistral models, and measure honestly what it cost."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(USAGE)


for group in (
    assets,
    quantize,
    export,
    verify,
    ledger,
    plan,
    evaluate,
    sweep,
    compare,
    calibrate,
    surface,
    generate,
    synth,
    bench,
    bench_stream,
):
    group.add_to(app)


def main() -> None:
    """The console script."""
    try:
        app()
    except KeyboardInterrupt:  # between the end of the command and that of the program
        raise SystemExit(130) from None
