"""What SRC may be on the command line: a folder, a named asset, or a hub name."""

from __future__ import annotations

from pathlib import Path

from .session import Session

SRC_HELP = "A checkpoint: a folder, an asset (see [bold]brise fetch --help[/bold]) or a hub name."


def fetched(source: str, session: Session) -> str:
    """``source`` as the library takes it: an asset becomes its folder, fetched if need be.

    A folder comes first. Hub names have a slash and assets have none, so neither can stand in for the other.

    Raises:
        AssetError: the asset could not be fetched.
    """
    from ..eval.assets import ASSETS, fetch

    if Path(source).is_dir() or source not in ASSETS:
        return source
    with session.progress() as bars:
        return str(fetch(source, progress=bars))


def resolve(source: str, session: Session) -> Path:
    """The folder of a checkpoint; an asset or a hub model that is not here yet is fetched.

    Raises:
        AssetError, CheckpointError: it is neither a folder, an asset nor a hub name, or could not be fetched.
    """
    from ..model.checkpoint import resolve_source

    return resolve_source(fetched(source, session))
