"""``config.json["quantization_config"]``: every rule resolved, so that a folder says what its tensors are.

``{"quant_method": "brise", "format_version": 1, "config": the rules as given, "specs": [spec], "modules":
{path: index into specs}}``. A head that is tied to a quantized embedding is a module like any other, without
tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.config import ConfigError, QuantConfig, QuantSpec, Rule
from ..quant.linear import QuantEmbedding, QuantLinear
from .safetensors_header import CheckpointError

METHOD = "brise"
FORMAT_VERSION = 1
_KEYS = {"quant_method", "format_version", "config", "specs", "modules"}


def quantization_entry(
    config: QuantConfig, specs: Mapping[str, tuple[QuantSpec | None, str]]
) -> dict[str, Any]:
    """The entry for a model, JSON-ready.

    Args:
        config: the rules as they were given.
        specs: what :func:`brise.quant.apply.resolve` made of them: path -> (spec or None, why).
    """
    chosen = {path: spec for path, (spec, _) in specs.items() if spec is not None}
    table = list(dict.fromkeys(chosen.values()))
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "specs": [spec.to_dict() for spec in table],
        "modules": {path: table.index(spec) for path, spec in chosen.items()},
    }


def read_entry(entry: Any, where: str) -> tuple[QuantConfig, dict[str, QuantSpec]]:
    """The rules, and path -> spec of every quantized module.

    Args:
        entry: what ``config.json`` has under ``quantization_config``.
        where: the file, for messages.

    Raises:
        CheckpointError: another library's method, another version, or not what the module's docstring says.
    """
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{where}: quantization_config must be an object, got {type(entry).__name__}")
    if entry.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{where}: expected quant_method {METHOD!r}, got {_cut(entry.get('quant_method'))}: another "
            "library quantized this folder; load it with that one, or start from its unquantized source"
        )
    if entry.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: this version reads format_version {FORMAT_VERSION}, the folder has "
            f"{_cut(entry.get('format_version'))}; install the version of brise that wrote it, or a newer one"
        )
    if set(entry) != _KEYS:
        unlike = sorted(map(str, set(entry) ^ _KEYS))
        raise CheckpointError(
            f"{where}: quantization_config must have exactly {', '.join(sorted(_KEYS))}; missing or unknown: "
            f"{_cut(', '.join(unlike))}"
        )
    listed, modules = entry["specs"], entry["modules"]
    if not isinstance(listed, list) or not all(isinstance(spec, Mapping) for spec in listed):
        raise CheckpointError(f"{where}: specs in quantization_config must be a list of objects")
    if not isinstance(modules, Mapping) or not modules:
        raise CheckpointError(f"{where}: modules in quantization_config must map module paths to specs")
    try:
        config = QuantConfig.from_dict(entry["config"])
        specs = [QuantSpec.from_dict(spec) for spec in listed]
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: quantization_config: {error}") from error
    for path, index in modules.items():
        if type(index) is not int or not 0 <= index < len(specs):
            raise CheckpointError(
                f"{where}: module {path} has the spec {_cut(index)}, expected 0..{len(specs) - 1}"
            )
    return config, {path: specs[index] for path, index in modules.items()}


def entry_of(model: nn.Module, config: QuantConfig | None = None) -> dict[str, Any] | None:
    """The entry for a model in memory, from its modules; None where none is quantized.

    Args:
        config: the rules that it was quantized by. Left out, they are written module by module.
    """
    specs = {
        path: (module.spec, "")
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear | QuantEmbedding)
    }
    if not specs:
        return None
    if config is None:
        by_spec: dict[QuantSpec, list[str]] = {}
        for path, (spec, _) in specs.items():
            by_spec.setdefault(spec, []).append(path)
        config = QuantConfig(tuple(Rule(tuple(paths), spec) for spec, paths in by_spec.items()))
    return quantization_entry(config, specs)


def guard_of(entry: Any, names: Iterable[str]) -> tuple[str, Tensor] | None:
    """A tensor of no bytes that keeps other loaders from taking a quantized folder for a plain one.

    transformers without our plug-in warns of the unknown method, finds no ``X.weight``, and goes on with
    random numbers in its place. A stored ``X.weight`` of the wrong shape stops it with an error, so one is
    stored. Our own reader does not show it.

    Args:
        entry: ``quantization_config`` of the folder, if any.
        names: the tensors of the folder.
    Returns:
        Name and tensor, or None for a folder that is not quantized.
    """
    if not isinstance(entry, Mapping) or entry.get("quant_method") != METHOD:
        return None
    present = set(names)
    path = next((path for path in entry["modules"] if f"{path}.qweight" in present), None)
    return None if path is None else (f"{path}.weight", torch.empty(0, dtype=torch.uint8))


def is_guard(dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a stored ``X.weight`` of a quantized X is the tensor of :func:`guard_of`."""
    return dtype == torch.uint8 and shape == (0,)


def _cut(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= 120 else text[:117] + "..."
