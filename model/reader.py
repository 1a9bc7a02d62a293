"""Read a Hugging Face folder of safetensors: strictly, memory-mapped, and never anything but data."""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .quantization_entry import is_guard
from .safetensors_header import MAX_JSON_BYTES, CheckpointError, Entry, parse_json, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# what a model needs, and nothing that could be run
_WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "LICENSE*", "NOTICE*"]
_UNWANTED = ["consolidated*", "original/*", "*/*.safetensors", "onnx/*", "*.bin.index.json"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# below this a tensor is read, above it is mapped: a map costs a page table entry and a file descriptor
_READ_BELOW = 1 << 16


def resolve_source(source: str | Path) -> Path:
    """A model's folder: ``source`` itself, or the local copy of a hub name (``mistralai/Mistral-7B-v0.1``).

    A hub name is fetched (safetensors, JSON, tokenizer and licence files only) or found in the hub's cache.

    Raises:
        CheckpointError: there is no such folder, and no such name on the hub or no way to reach it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{source} is a file; expected the folder of a model, or a hub name")
    name = str(source)
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or ".." in name:
        raise CheckpointError(f"there is no folder {source}; expected the folder of a model, or a hub name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # no base class is shared by what it raises, nor stable across its versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} is no folder here, and the hub gave nothing by that name ({reason}); check the name, "
            "the connection and, for a gated model, `hf auth login`, or give a folder"
        ) from error


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` of a folder.

    Raises:
        CheckpointError: not the plain name of a regular file there, or a link that leads out. The hub's
            cache, whose snapshots are links into the ``blobs`` beside them, counts as inside.
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
        raise CheckpointError(f"{folder}: {name[:200]!r} is not the plain name of a file in this folder")
    home = folder.resolve()
    try:
        real = (folder / name).resolve()
    except (RuntimeError, OSError) as error:  # links in a circle
        raise CheckpointError(f"{folder / name} is a link that leads nowhere ({error})") from None
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.parent == root for root in allowed):
        raise CheckpointError(
            f"{folder / name} is a link that leads out of the folder, to {real}; put the file itself there"
        )
    if not real.exists():
        raise CheckpointError(f"{folder / name} is missing; fetch it, or the whole folder, again")
    if not stat.S_ISREG(real.stat().st_mode):
        raise CheckpointError(f"{folder / name} is no regular file")
    return real


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder.

    Raises:
        CheckpointError: missing, leading out of the folder, too large, or not a JSON object.
    """
    path = inside(folder, name)
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{folder / name} is larger than {MAX_JSON_BYTES} bytes: no checkpoint's JSON")
    return parse_json(data, str(folder / name))


class CheckpointReader:
    """The tensors of a Hugging Face folder, by name; every header and the index are checked on construction.

    Nothing is loaded before it is asked for. Tensors are private maps of the files: writing to one does not
    reach the disk, and a file that somebody else overwrites in place changes under its readers (Brise itself
    only ever renames a whole folder).

    Attributes:
        folder: what was opened.
        config: config.json.
        names: every tensor, in the order of the names.

    Raises:
        CheckpointError: see :mod:`.safetensors_header`; also a missing config or shard, a tensor that is in
            two shards or elsewhere than the index says, a path that leads out of the folder, weights in
            pickles only.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"there is no folder {self.folder}")
        self.config: dict[str, Any] = read_json(self.folder, "config.json")
        self._files: dict[str, BinaryIO] = {}
        self._where: dict[str, tuple[str, Entry]] = {}
        weight_map = self._weight_map()
        for shard in [SINGLE] if weight_map is None else sorted(set(weight_map.values())):
            self._open(shard)
        if weight_map is not None:
            self._check_index(weight_map)
        for name in [n for n in self._where if self._hides(n)]:
            del self._where[name]
        self.names: list[str] = sorted(self._where)

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor. Raises CheckpointError for a name that is not there."""
        entry = self._find(name)[1]
        return entry.dtype, entry.shape

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor on disk."""
        return self._find(name)[1].nbytes

    def shard(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return self._find(name)[0]

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, in its stored dtype: a map of its own, given back when the tensor goes."""
        shard, entry = self._find(name)
        file = self._files[shard]
        if entry.nbytes < _READ_BELOW:
            raw = torch.empty(entry.nbytes, dtype=torch.uint8)
            if os.preadv(file.fileno(), [raw.numpy().data], entry.begin) != entry.nbytes:
                raise CheckpointError(f"{self.folder / shard} became shorter while it was read")
            return raw.view(entry.dtype).view(entry.shape)
        start = entry.begin - entry.begin % mmap.ALLOCATIONGRANULARITY
        return _typed(self._map(shard, start, entry.end - start), entry, entry.begin - start)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, shard by shard: one map a shard, held for as long as any of its tensors lives."""
        for shard in self._files:
            names = [name for name in self.names if self._where[name][0] == shard]
            end = max((self._where[name][1].end for name in names), default=0)
            whole = self._map(shard, 0, end) if end else torch.empty(0, dtype=torch.uint8)
            for name in names:
                entry = self._where[name][1]
                yield name, _typed(whole, entry, entry.begin)

    def _hides(self, name: str) -> bool:
        """Whether a tensor is the guard of a quantized folder (:func:`.quantization_entry.guard_of`)."""
        entry = self._where[name][1]
        codes = name.removesuffix("weight") + "qweight"
        return name.endswith(".weight") and codes in self._where and is_guard(entry.dtype, entry.shape)

    def _find(self, name: str) -> tuple[str, Entry]:
        if name not in self._where:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self._where[name]

    def _map(self, shard: str, start: int, length: int) -> Tensor:
        try:
            view = mmap.mmap(self._files[shard].fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder / shard}: {length} bytes cannot be mapped into memory ({error})"
            ) from error
        return torch.frombuffer(view, dtype=torch.uint8)

    def _weight_map(self) -> dict[str, str] | None:
        """Tensor -> shard as the index says, or None for a single file without one."""
        folder = self.folder
        single, index = _exists(folder / SINGLE), _exists(folder / INDEX)
        if not index:
            if not single:
                raise CheckpointError(_what_else(folder))
            return None
        data = read_json(folder, INDEX)
        weight_map = data.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX} must have a weight_map of tensor names to file names")
        if single and SINGLE not in weight_map.values():
            raise CheckpointError(
                f"{folder} has both {SINGLE} and an {INDEX} that does not name it: which one holds the "
                "model? Remove the other"
            )
        return weight_map

    def _open(self, shard: str) -> None:
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{self.folder / INDEX} names {shard[:200]!r}; expected files that end in .safetensors"
            )
        file = inside(self.folder, shard).open("rb")
        self._files[shard] = file
        for name, entry in read_header(file, str(self.folder / shard)).items():
            if name in self._where:
                raise CheckpointError(
                    f"{self.folder}: the tensor {name} is in two shards, {self._where[name][0]} and {shard}"
                )
            self._where[name] = (shard, entry)

    def _check_index(self, weight_map: dict[str, str]) -> None:
        index = self.folder / INDEX
        for name, shard in weight_map.items():
            if name not in self._where:
                raise CheckpointError(f"{index} says that {shard} holds {name}, but it does not")
            if self._where[name][0] != shard:
                raise CheckpointError(
                    f"{index} says that {shard} holds {name}, but {self._where[name][0]} does"
                )
        for name, (shard, _) in self._where.items():
            if name not in weight_map:
                raise CheckpointError(f"{self.folder / shard} holds {name}, which {index} does not list")


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _typed(raw: Tensor, entry: Entry, offset: int) -> Tensor:
    data = raw[offset : offset + entry.nbytes]
    if offset % entry.dtype.itemsize or not entry.nbytes:
        data = data.clone()  # a file that starts its tensors at odd places: no dtype can be laid over them
    return data.view(entry.dtype).view(entry.shape)


def _what_else(folder: Path) -> str:
    """Why a folder without model.safetensors and index is refused."""
    if pickles := sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern)):
        return (
            f"{folder} has its weights in a pickle only ({pickles[0]}), which can run code when it is "
            "read, so it never is; where you trust it, convert it to safetensors (load it with "
            "transformers, then save_pretrained)"
        )
    if shards := sorted(p.name for p in folder.glob("*.safetensors")):
        return f"{folder} has {shards[0]} but neither {SINGLE} nor {INDEX}; fetch the index as well"
    if ggufs := sorted(p.name for p in folder.glob("*.gguf")):
        return f"{folder} has only {ggufs[0]}; convert it first (brise.model.gguf.convert_gguf)"
    return f"{folder} has neither {SINGLE} nor {INDEX}; expected a Hugging Face folder of safetensors"
