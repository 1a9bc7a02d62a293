"""A llama-type GGUF file shown as a folder of ours: its blocks of 32 as quantized weights, the rest in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...quant.interop.ggml import BLOCKS
from ...quant.tensor import QuantizedTensor, layout
from ..gguf import GGUFError, GGUFTensor, dequantize_tensor, in_order, open_gguf, plan_tensors, read_config
from ..gguf_tokenizer import save_tokenizer
from ..reader import CheckpointReader
from ..safetensors_header import CheckpointError
from ..skeleton import UNFIT
from .reader import entry_of_specs

_PLAIN = ("F32", "F16", "BF16")


class GGUFCheckpoint(CheckpointReader):
    """A :class:`.CheckpointReader` over a GGUF file.

    Q4_0, Q4_1 and Q8_0 become quantized weights with the very codes and scales of the file. What has no spec of
    ours (K-quants and the like) is decoded by the ``gguf`` package, and named in :attr:`decoded`.

    Attributes:
        folder: the file.
        decoded: paths of the weights that were quantized in the file and are shown in fp32.

    Raises:
        CheckpointError: no GGUF, or nothing that makes a Mistral.
        ImportError: the ``gguf`` package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path
        try:
            self.gguf = open_gguf(path)
            known = read_config(self.gguf)
            self._plan = plan_tensors(self.gguf, known)
            self.config = _config(known)
        except GGUFError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except UNFIT as error:  # values of the wrong kind under the right keys
            raise CheckpointError(
                f"{path}: its keys make no model: {type(error).__name__}: {error}"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self.gguf.tensors}
        self._specs = {}
        self.decoded: list[str] = []
        for name, planned in self._plan.items():
            kind = self._tensors[planned.source].tensor_type.name
            path_of = name.removesuffix(".weight")
            if kind in BLOCKS:
                self._specs[path_of] = BLOCKS[kind].spec
            elif kind not in _PLAIN:
                self.decoded.append(path_of)
        self._shown: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, planned in self._plan.items():
            spec = self._specs.get(name.removesuffix(".weight"))
            if spec is None:
                self._shown[name] = (torch.float32, planned.shape)
                continue
            for leaf, shown in layout(spec, (planned.shape[0], planned.shape[1])).items():
                self._shown[f"{name.removesuffix('.weight')}.{leaf}"] = shown
        self.names = sorted(self._shown)
        specs = dict(self._specs)
        if known["tie_word_embeddings"] and "model.embed_tokens" in specs:
            specs["lm_head"] = specs["model.embed_tokens"]
        if specs:
            self.config["quantization_config"] = entry_of_specs(specs)
        self._last: tuple[str, QuantizedTensor] | None = None
        self._identity = self.identity()

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        if name not in self._shown:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self._shown[name]

    def nbytes(self, name: str) -> int:
        dtype, shape = self.info(name)
        return dtype.itemsize * torch.Size(shape).numel()

    def shard(self, name: str) -> str:
        return self.folder.name

    def tensor(self, name: str) -> Tensor:
        self.info(name)
        path, _, leaf = name.rpartition(".")
        if path not in self._specs:
            planned = self._plan[name]
            try:
                return dequantize_tensor(self._tensors[planned.source], planned.heads)
            except GGUFError as error:
                raise CheckpointError(f"{self.folder}: {error}") from error
        if self._last is None or self._last[0] != path:
            self._last = (path, self._read(path, self._plan[f"{path}.weight"]))
        return self._last[1].tensors[leaf]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor(name)[start:stop]

    def prefetch(self, name: str) -> None:
        """The file is mapped: pages are read as they are touched."""

    def identity(self) -> dict[str, Any]:
        status = self.folder.stat()
        return {self.folder.name: [status.st_size, status.st_mtime_ns]}

    def check_unchanged(self) -> None:
        if self.identity() != self._identity:
            raise CheckpointError(f"{self.folder} was changed while it was read")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self.tensor(name)

    def _read(self, path: str, planned: GGUFTensor) -> QuantizedTensor:
        stored = self._tensors[planned.source]
        blocks = torch.from_numpy(stored.data.copy()).view(planned.shape[0], -1)
        if planned.heads:
            blocks = in_order(blocks, planned.heads)
        shape = (planned.shape[0], planned.shape[1])
        return BLOCKS[stored.tensor_type.name].read(blocks, self._specs[path], shape)


def write_tokenizer(reader: GGUFCheckpoint, folder: Path) -> None:
    """The tokenizer of a file as tokenizer.json and tokenizer_config.json; nothing where the file has none."""
    kind = reader.gguf.fields.get("tokenizer.ggml.model")
    if kind is None or kind.contents() == "no_vocab":
        return
    try:
        save_tokenizer(
            reader.gguf,
            folder,
            vocab_size=reader.config["vocab_size"],
            max_length=reader.config["max_position_embeddings"],
        )
    except GGUFError as error:
        raise CheckpointError(f"{reader.folder}: {error}") from error


def _config(known: dict[str, Any]) -> dict[str, Any]:
    from transformers import MistralConfig

    config = MistralConfig(**known).to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    return {**config, "dtype": "float32"}
