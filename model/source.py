"""What a checkpoint is made from: tensors by Hugging Face's names, read rows at a time, whatever the files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .reader import CheckpointReader
from .safetensors_header import CheckpointError
from .tensor_files import listed

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# scales of activations: what is quantized here is not run in float8
_OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".k_scale", ".v_scale")
_PLAIN_SCALE, _BLOCK_SCALE = "_scale", "_scale_inv"


class Source(Protocol):
    """A model's tensors and config. :class:`.reader.CheckpointReader` is one.

    Attributes:
        folder: where the files are, and what goes along with them (the tokenizer).
        config: as config.json has it.
        names: every tensor, in the order of the names.
    """

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def names(self) -> list[str]: ...

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype that a copy has, and the shape."""
        ...

    def shard(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the first axis; where they were decoded, in fp32, which a copy rounds to its dtype."""
        ...

    def prefetch(self, name: str) -> None:
        """Let the system begin to read a tensor from the disk."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the files are, JSON-ready, to tell whether they are still the same."""
        ...

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a file was changed since it was opened."""
        ...


def open_source(folder: str | Path) -> Source:
    """The source in a folder: Hugging Face's safetensors, in float8 too, or Mistral's own consolidated ones.

    What another library quantized, or a GGUF file, is decoded as it is read.

    Raises:
        CheckpointError: it is none of them, or damaged.
    """
    from .consolidated import ConsolidatedSource, is_consolidated
    from .foreign.decoded import open_decoded
    from .foreign.reader import is_foreign

    if is_foreign(Path(folder)):
        return open_decoded(Path(folder))
    if is_consolidated(Path(folder)):
        return ConsolidatedSource(folder)
    reader = CheckpointReader(folder)
    if any(reader.info(name)[0] in FLOAT8 for name in reader.names):
        return Float8Source(reader)
    return reader


def check_apart(src: Path, out: Path) -> None:
    """Raises CheckpointError where writing ``out`` would replace ``src``, or a folder that it is in."""
    source, target = src.expanduser().resolve(), out.expanduser().resolve()
    if target == source or target in source.parents:
        raise CheckpointError(
            f"{out} is, or holds, the source {src}, which would be gone when it is replaced; choose another folder"
        )


def whole(source: Source, name: str) -> Tensor:
    """All of a tensor, in memory of its own."""
    _, shape = source.info(name)
    return source.rows(name, 0, shape[0] if shape else 1).view(shape)


class Float8Source:
    """A folder whose weights are float8 codes with scales beside them.

    ``X.weight_scale`` (one, or one a row) and ``X.weight_scale_inv`` (one a block of the config's
    ``weight_block_size``, or one where that is null) both multiply, as in compressed-tensors and in transformers'
    fine-grained fp8; without either the codes are the weights. Copies of what is not quantized have the config's dtype.

    Raises:
        CheckpointError: scales of a shape that fits no weight, or a quantization that is not float8.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self.folder = reader.folder
        self.config = dict(reader.config)
        entry = self.config.pop("quantization_config", None) or {}
        if entry and entry.get("quant_method") not in ("fp8", "compressed-tensors"):
            raise CheckpointError(
                f"{self.folder} is quantized by {entry.get('quant_method')!r} and holds float8 tensors: expected fp8 "
                "or compressed-tensors"
            )
        block = entry.get("weight_block_size") or (128, 128)
        self._block = (int(block[0]), int(block[1]))
        name = self.config.get("dtype", self.config.get("torch_dtype")) or "bfloat16"
        self._dtype = getattr(torch, str(name))
        self._scales = self._find_scales()
        taken = set(self._scales.values())
        self.names = [n for n in reader.names if n not in taken and not n.endswith(_OF_ACTIVATIONS)]

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        dtype, shape = self._reader.info(name)
        return (self._dtype if dtype in FLOAT8 else dtype), shape

    def shard(self, name: str) -> str:
        return self._reader.shard(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        raw = self._reader.rows(name, start, stop)
        if raw.dtype not in FLOAT8:
            return raw
        w = raw.to(torch.float32)
        scale = self._scales.get(name)
        if scale is None:
            return w
        s = whole(self._reader, scale).to(torch.float32)
        if s.numel() == 1:
            return w * s.view(())
        if not scale.endswith(_BLOCK_SCALE):
            return w * s.view(-1, 1)[start:stop]
        high, wide = self._block
        by_row = s[torch.arange(start, stop) // high]
        return w * by_row.repeat_interleave(wide, dim=1)[:, : w.shape[1]]

    def prefetch(self, name: str) -> None:
        self._reader.prefetch(name)

    def identity(self) -> dict[str, Any]:
        return self._reader.identity()

    def check_unchanged(self) -> None:
        self._reader.check_unchanged()

    def _find_scales(self) -> dict[str, str]:
        """Weight -> its scale."""
        found, wrong = {}, []
        for name in self._reader.names:
            for ending in (_BLOCK_SCALE, _PLAIN_SCALE):
                weight = name.removesuffix(ending)
                if weight != name and weight in self._reader.names:
                    if not self._fits(weight, name, ending):
                        wrong.append(f"{name} {list(self._reader.info(name)[1])}")
                    found[weight] = name
                    break
        if wrong:
            raise CheckpointError(f"{self.folder}: these scales fit no weight: {listed(wrong)}")
        return found

    def _fits(self, weight: str, scale: str, ending: str) -> bool:
        shape, got = self._reader.info(weight)[1], self._reader.info(scale)[1]
        if len(shape) != 2:
            return False
        if ending == _BLOCK_SCALE:
            blocks = tuple(-(-n // b) for n, b in zip(shape, self._block, strict=True))
            return got in ((), (1,), blocks)
        return got in ((), (1,), (1, 1), (shape[0],), (shape[0], 1))
