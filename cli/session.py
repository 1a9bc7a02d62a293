"""What one invocation of ``brise`` prints, and where: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from .progress import Bars

# columns of a table that goes to a file or a pipe, where there is no width to ask for
_PIPE_WIDTH = 160


class Session:
    """One invocation. The application makes it; commands find it in ``ctx.obj``."""

    def __init__(self) -> None:
        self.json = False
        self.debug = False
        # what an interrupt leaves to say: the interrupt itself is turned into others on its way up
        self.last_words = ""
        # kept aside: with --json, sys.stdout leads to stderr, so that no library's print gets in between
        self._stdout = sys.stdout

    def note(self, text: str) -> None:
        """A remark for a person, on stderr."""
        print(text, file=sys.stderr, flush=True)

    def finish(self, document: dict[str, Any], show: Callable[[Console], None]) -> None:
        """The command's result: ``document`` as the last line of stdout with ``--json``, else ``show``.

        Raises:
            ValueError: the document holds an infinity or a NaN, which JSON has not.
        """
        if self.json:
            self.write_json(document)
            return
        from rich.console import Console

        show(Console(width=None if self._stdout.isatty() else _PIPE_WIDTH, highlight=False))

    def write_json(self, document: dict[str, Any]) -> None:
        print(json.dumps(document, allow_nan=False, default=str), file=self._stdout, flush=True)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Bars]:
        """Progress bars on stderr for what takes more than a second; the value is the library's callback."""
        from .progress import Bars

        with Bars() as bars:
            yield bars


def session_of(ctx: typer.Context) -> Session:
    """The invocation's session."""
    session = ctx.find_root().obj
    assert isinstance(session, Session), "commands run under brise.cli.main.app"
    return session


def _want_json(ctx: typer.Context, value: bool) -> bool:
    if value:
        session_of(ctx).json = True
        ctx.with_resource(contextlib.redirect_stdout(sys.stderr))
    return value


def _want_debug(ctx: typer.Context, value: bool) -> bool:
    if value:
        session_of(ctx).debug = True
    return value


Json = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_want_json,
        is_eager=True,
        help="Make the last line of stdout one JSON document; the rest goes to stderr.",
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", callback=_want_debug, is_eager=True, help="Show the traceback of an error."),
]
