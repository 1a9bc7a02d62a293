"""The folder for what is made or fetched once and can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The cache folder: the argument, else $BRISE_CACHE, else $XDG_CACHE_HOME/brise, else ~/.cache/brise."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    if own := os.environ.get("BRISE_CACHE"):
        return Path(own).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "brise"
    return Path.home() / ".cache" / "brise"
