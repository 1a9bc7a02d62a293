"""A quantized checkpoint shown as the plain one that it stands for, to be quantized again."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...quant.config import QuantSpec
from ...quant.tensor import QuantizedTensor, Shape
from ..reader import CheckpointReader
from ..skeleton import stored_dtype
from .gguf_reader import GGUFCheckpoint, write_tokenizer
from .reader import open_checkpoint, quantized, shape_of, specs_of


class DecodedSource:
    """A :class:`brise.model.source.Source` over a quantized checkpoint: every weight decoded as it is asked for.

    Decoded rows are fp32; a copy has the model's dtype, as that of any weight that is not quantized.

    Attributes:
        folder: of what goes along with the weights.
        specs: path -> spec of what is decoded.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self.folder = reader.folder
        self._files: tempfile.TemporaryDirectory[str] | None = None
        if isinstance(reader, GGUFCheckpoint):
            # what goes along with a folder lies inside the file
            self._files = tempfile.TemporaryDirectory()
            self.folder = Path(self._files.name)
            write_tokenizer(reader, self.folder)
        self._dtype = stored_dtype(reader)
        self.specs: dict[str, QuantSpec] = {
            path: spec for path, spec in specs_of(reader).items() if f"{path}.qweight" in reader.names
        }
        self.config: dict[str, Any] = {k: v for k, v in reader.config.items() if k != "quantization_config"}
        self._shapes: dict[str, Shape] = {
            f"{path}.weight": shape_of(reader, path, spec) for path, spec in self.specs.items()
        }
        plain = [n for n in reader.names if n.rpartition(".")[0] not in self.specs or n.endswith(".bias")]
        self.names = sorted([*plain, *self._shapes])
        self._last: tuple[str, QuantizedTensor] | None = None

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        if name in self._shapes:
            return self._dtype, self._shapes[name]
        return self._reader.info(name)

    def shard(self, name: str) -> str:
        return self._reader.shard(self._some(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._shapes:
            return self._reader.rows(name, start, stop)
        from ...quant.dequantize import dequantize_rows

        path = name.removesuffix(".weight")
        if self._last is None or self._last[0] != path:
            self._last = (path, quantized(self._reader, path, self.specs[path]))
        return dequantize_rows(self._last[1], start, stop, torch.float32)

    def prefetch(self, name: str) -> None:
        self._reader.prefetch(self._some(name))

    def identity(self) -> dict[str, Any]:
        return self._reader.identity()

    def check_unchanged(self) -> None:
        self._reader.check_unchanged()

    def _some(self, name: str) -> str:
        return f"{name.removesuffix('.weight')}.qweight" if name in self._shapes else name


def open_decoded(source: Path) -> DecodedSource:
    """The source of a quantized checkpoint, ours or another library's, or of a GGUF file.

    Raises:
        CheckpointError: it cannot be read.
    """
    return DecodedSource(open_checkpoint(source))
