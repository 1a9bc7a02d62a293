"""What a row says of a checkpoint: its name, its hash, its maker's note."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.foreign.reader import config_of
from ..model.quantization_entry import METHOD
from .assets import MANIFEST
from .provenance import model_hash


@dataclass(frozen=True)
class ModelInfo:
    """A checkpoint: its name (no path), the hash of its config and weights, and what its maker says of it."""

    name: str
    sha256: str
    note: str | None = None


def model_info(folder: Path, source: str | None = None) -> ModelInfo:
    """Name, hash and note of the checkpoint in ``folder``. ``source`` is how the user named it.

    The name carries no path: an asset's own, a hub's, or the folder's last part.
    """
    manifest = folder / MANIFEST
    if manifest.is_file() and quantization_of(folder) is None:  # a quantized copy is not the asset
        asset = json.loads(manifest.read_text())
        return ModelInfo(asset["name"], model_hash(folder), asset["gives"])
    hub = source is not None and not Path(source).expanduser().exists()
    return ModelInfo(str(source) if hub else folder.resolve().name, model_hash(folder))


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """How a checkpoint was quantized: our rules as given, another library's entry as it is, or None."""
    entry = config_of(folder).get("quantization_config")
    if isinstance(entry, dict) and entry.get("quant_method") == METHOD:
        rules: dict[str, Any] = entry["config"]
        return rules
    return entry
