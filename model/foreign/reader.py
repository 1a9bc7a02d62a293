"""Another library's folder shown as one of ours: same tensors, same config, translated as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...quant.config import QuantConfig, QuantSpec, Rule
from ...quant.formats import FORMATS
from ...quant.tensor import QuantizedTensor, Shape, layout
from ..quantization_entry import METHOD, quantization_entry, read_entry
from ..reader import INDEX, SINGLE, CheckpointReader, inside, read_json
from ..safetensors_header import CheckpointError
from .formats import METHODS
from .stored import Stored


class ForeignReader(CheckpointReader):
    """A :class:`.CheckpointReader` over a folder of another library, in the names, dtypes and config of ours.

    One weight is translated at a time, when one of its tensors is asked for.

    Attributes:
        foreign: ``quantization_config`` as it stands in the folder.
        stored: path -> :class:`.Stored` of every quantized weight.
        decoded: paths of weights that no spec of ours holds; they are shown as fp32 weights.

    Raises:
        CheckpointError: see :class:`.CheckpointReader`; also a method that is not known here, or a config and
            tensors that disagree.
    """

    def __init__(self, folder: str | Path) -> None:
        # our name -> path, dtype, shape; empty while the finders look at the folder as it is
        self._shown: dict[str, tuple[str, torch.dtype, tuple[int, ...]]] = {}
        super().__init__(folder)
        where = str(self.folder / "config.json")
        self.foreign = foreign_entry(self.folder, self.config)
        if self.foreign is None:
            raise CheckpointError(f"{where} has no quantization_config of another library")
        method = METHODS.get(str(self.foreign.get("quant_method")))
        if method is None:
            raise CheckpointError(
                f"{where}: quant_method is {str(self.foreign.get('quant_method'))[:80]!r}; known are {METHOD}, "
                f"{', '.join(METHODS)}: load it with the library that made it, or start from its source"
            )
        self.stored: dict[str, Stored] = method(self, self.foreign, where)
        if not self.stored:
            raise CheckpointError(f"{where} says that the folder is quantized, but no tensor of it is")
        self.decoded = [path for path, stored in self.stored.items() if stored.spec is None]
        taken = {name for stored in self.stored.values() for name in stored.tensors.values()}
        for path, stored in self.stored.items():
            for leaf, (dtype, shape) in _shown(stored).items():
                self._shown[f"{path}.{leaf}"] = (path, dtype, shape)
        self.raw_names = self.names
        self.names = sorted({*(name for name in self.names if name not in taken), *self._shown})
        self._last: tuple[str, Mapping[str, Tensor]] | None = None
        specs = {path: stored.spec for path, stored in self.stored.items() if stored.spec is not None}
        self.config = {k: v for k, v in self.config.items() if k != "quantization_config"}
        if specs:
            self.config["quantization_config"] = entry_of_specs(specs)

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        if name in self._shown:
            return self._shown[name][1:]
        return super().info(name)

    def nbytes(self, name: str) -> int:
        dtype, shape = self.info(name)
        return dtype.itemsize * torch.Size(shape).numel()

    def shard(self, name: str) -> str:
        if name in self._shown:
            return super().shard(next(iter(self.stored[self._shown[name][0]].tensors.values())))
        return super().shard(name)

    def tensor(self, name: str) -> Tensor:
        if name in self._shown:
            path = self._shown[name][0]
            return self._translated(path)[name.removeprefix(f"{path}.")]
        return super().tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor(name)[start:stop] if name in self._shown else super().rows(name, start, stop)

    def prefetch(self, name: str) -> None:
        if name in self._shown:
            for theirs in self.stored[self._shown[name][0]].tensors.values():
                super().prefetch(theirs)
        else:
            super().prefetch(name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self.tensor(name)

    def _translated(self, path: str) -> Mapping[str, Tensor]:
        if self._last is None or self._last[0] != path:
            stored = self.stored[path]
            theirs = {leaf: super(ForeignReader, self).tensor(n) for leaf, n in stored.tensors.items()}
            try:
                if stored.spec is None:
                    assert stored.decode is not None
                    ours: Mapping[str, Tensor] = {"weight": stored.decode(theirs)}
                else:
                    ours = stored.reader.read(theirs, stored.spec, stored.shape).tensors
            except (ValueError, TypeError, RuntimeError) as error:
                raise CheckpointError(f"{self.folder}: {path}: {error}") from error
            self._last = (path, ours)
        return self._last[1]


def open_checkpoint(source: Path) -> CheckpointReader:
    """The tensors of a checkpoint under our names and config, whichever library wrote it.

    Raises:
        CheckpointError: it cannot be read, or a library wrote it that is not known here.
    """
    if source.is_file() and source.suffix == ".gguf":
        from .gguf_reader import GGUFCheckpoint

        return GGUFCheckpoint(source)
    if not source.is_dir():
        raise CheckpointError(f"there is no folder {source}")
    files = sorted(source.glob("*.gguf"))
    if len(files) == 1 and not any((source / name).exists() for name in (SINGLE, INDEX)):
        return open_checkpoint(inside(source, files[0].name))
    config = read_json(source, "config.json")
    if foreign_entry(source, config) is None:
        return CheckpointReader(source)
    return ForeignReader(source)


def config_of(source: Path) -> dict[str, Any]:
    """What config.json says, or would say of a GGUF file; another library's quantization as that library wrote it."""
    if source.is_file():
        return open_checkpoint(source).config
    return read_json(source, "config.json")


def is_foreign(source: Path) -> bool:
    """Whether :func:`open_checkpoint` would translate: a GGUF file, or a folder that another library quantized.

    Not so for float8 weights, which are no integers with a grid (:class:`brise.model.source.Float8Source`).
    """
    if source.is_file():
        return source.suffix == ".gguf"
    if not (source / "config.json").exists():
        return False
    entry = foreign_entry(source, read_json(source, "config.json"))
    known = entry is not None and entry.get("quant_method") in METHODS
    return known and entry is not None and entry.get("format") not in ("float-quantized", "naive-quantized")


def foreign_entry(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What another library says of its quantization in config.json, or in quantize_config.json as GPTQ once did."""
    entry = config.get("quantization_config")
    if entry is None and (folder / "quantize_config.json").exists():
        return {"quant_method": "gptq", **read_json(folder, "quantize_config.json")}
    if not isinstance(entry, dict) or entry.get("quant_method") == METHOD:
        return None
    return entry


def entry_of_specs(specs: Mapping[str, QuantSpec]) -> dict[str, Any]:
    """Our ``quantization_config`` for weights that came with these specs."""
    by_spec: dict[QuantSpec, list[str]] = {}
    for path, spec in specs.items():
        by_spec.setdefault(spec, []).append(path)
    rules = tuple(Rule(tuple(paths), spec) for spec, paths in by_spec.items())
    return quantization_entry(QuantConfig(rules), {path: (spec, "") for path, spec in specs.items()})


def specs_of(reader: CheckpointReader) -> dict[str, QuantSpec]:
    """Path -> spec of every quantized module of an opened checkpoint; empty where none is."""
    entry = reader.config.get("quantization_config")
    return {} if entry is None else read_entry(entry, str(reader.folder / "config.json"))[1]


def shape_of(reader: CheckpointReader, path: str, spec: QuantSpec) -> Shape:
    """(N, K) of a quantized weight, from the shapes of its tensors.

    Raises:
        CheckpointError: they are no matrices, or missing.
    """
    codes = reader.info(f"{path}.qweight")[1]
    scales = reader.info(f"{path}.scales")[1]
    if len(codes) != 2 or len(scales) != 2:
        raise CheckpointError(
            f"{reader.folder}: {path}: qweight is {list(codes)} and scales {list(scales)}, expected two sizes each"
        )
    if spec.group_size is not None:
        return codes[0], scales[1] * spec.group_size
    return codes[0], codes[1] * 8 // FORMATS[spec.format].bits


def quantized(reader: CheckpointReader, path: str, spec: QuantSpec) -> QuantizedTensor:
    """One quantized weight of an opened checkpoint.

    Raises:
        CheckpointError: its tensors are not those of its spec.
    """
    shape = shape_of(reader, path, spec)
    try:
        return QuantizedTensor(spec, shape, {n: reader.tensor(f"{path}.{n}") for n in layout(spec, shape)})
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{reader.folder}: {path}: {error}") from error


def _shown(stored: Stored) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    if stored.spec is None:
        return {"weight": (torch.float32, stored.shape)}
    return layout(stored.spec, stored.shape)
