"""How a command ends: exit codes, and errors of one line."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any, cast

import typer
from typer.core import TyperGroup

from .session import Session

FAILED, USAGE, INTERRUPTED = 1, 2, 130
# newer typers bring their own click, older ones import it: this is the one public way to the class in both
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
# their messages say it all; the others' make no sense without the class's name
_PLAIN = (ValueError, ImportError, OSError, ArithmeticError)


class Application(TyperGroup):
    """The root command. Whatever happens below it ends in an exit code and at most one line on stderr."""

    def main(
        self,
        args: Any = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        session = Session()
        words = sys.argv[1:] if args is None else list(args)
        code = FAILED
        try:
            value = super().main(
                words,
                prog_name or "brise",
                complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                obj=session,
                **extra,
            )
            code = value if isinstance(value, int) else 0
            sys.stdout.flush()
            if code == INTERRUPTED:
                raise KeyboardInterrupt
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
            _report(session, session.last_words or "interrupted")
        except BrokenPipeError:
            # the reader has gone; what Python still holds back for it must not raise again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = FAILED
        except _UsageError as error:
            # raised while the options were being read, perhaps before --json was
            session.json = session.json or "--json" in words
            code = USAGE
            _report(
                session, f"{one_line(cast(Any, error).format_message())} {_where_to_look(error)}".rstrip()
            )
        except Exception as error:  # the one place where every error ends
            if session.debug:
                traceback.print_exc()
            _report(session, describe(error, session.debug))
        sys.exit(code)


def describe(error: BaseException, debug: bool = False) -> str:
    """An error in one line; one that nobody foresaw carries its class and how to see where it arose."""
    # what was added on the way up, say that a job can be resumed
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}{notes}"
    text = one_line(str(error)) + notes
    if text and (isinstance(error, _PLAIN) or type(error).__module__.startswith("brise.")):
        return text
    hint = "" if debug else " (--debug shows where)"
    return f"{type(error).__name__}{': ' if text else ''}{text}{hint}"


def one_line(text: str) -> str:
    return " ".join(text.split())


def _where_to_look(error: Any) -> str:
    ctx = getattr(error, "ctx", None)
    return f"(see {ctx.command_path} --help)" if ctx is not None else ""


def _report(session: Session, message: str) -> None:
    session.note(f"brise: {message}")
    if session.json:
        session.write_json({"error": message})
