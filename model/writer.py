"""Write a Hugging Face folder of safetensors: streamed, sharded, atomic, the same bytes every time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .atomic import AtomicFolder, write_file
from .quantization_entry import guard_of
from .reader import INDEX
from .safetensors_header import DTYPE_NAMES, CheckpointError
from .shards import Planned, final_name, lay_out_shard
from .tensor_files import inside

# What goes with the weights from the folder they come from. Its README is not: it describes other weights.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
)
_SPOOL = "spool"
_CHUNK = 1 << 24


class CheckpointWriter:
    """Takes tensors one by one and writes them to shards in a temporary folder beside ``out``.

    Used as a context manager; :meth:`finish` renames the folder to ``out``. Leaving without it, by an error
    or not, leaves nothing behind and ``out`` as it was. At no time is more than one tensor held in memory; a
    shard takes twice its room on the disk while it is put in order.

    Args:
        out: the folder to write.
        overwrite: whether a checkpoint that is there may be replaced, with all that is in its folder.
        max_shard_bytes: a tensor that would make a shard larger than this begins the next one.

    Raises:
        CheckpointError: ``out`` exists and may not be replaced.
    """

    def __init__(
        self, out: str | Path, *, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000
    ) -> None:
        if max_shard_bytes < 1:
            raise CheckpointError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
        self.out = Path(out)
        self.max_shard_bytes = max_shard_bytes
        self._overwrite = overwrite
        self._folder: AtomicFolder | None = None
        self._spool: BinaryIO | None = None
        # tensors of the shard being filled: name -> (dtype, shape, begin and end in the spool)
        self._pending: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
        self._filled = 0
        self._total = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()

    def __enter__(self) -> CheckpointWriter:
        self._folder = AtomicFolder(self.out, overwrite=self._overwrite)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._spool is not None:
            self._spool.close()
            self._spool = None
        if self._folder is not None:
            self._folder.discard()
            self._folder = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one dense tensor, of any device and strides.

        Raises:
            CheckpointError: the name was there already or is none, or the tensor has no data or a dtype that
                safetensors does not know.
        """
        path = self._path()
        if not name or name == "__metadata__":
            raise CheckpointError(f"{name!r} cannot be the name of a tensor")
        if name in self._names:
            raise CheckpointError(f"the tensor {name} was added twice")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{name}: expected a dense tensor with data, of a dtype of safetensors; got {tensor.dtype}, "
                f"{tensor.layout}, on {tensor.device}"
            )
        nbytes = tensor.numel() * tensor.element_size()
        if self._pending and self._filled + nbytes > self.max_shard_bytes:
            self._close_shard()
        if self._spool is None:
            self._spool = (path / _SPOOL).open("w+b", buffering=0)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, nbytes, _CHUNK):
            _write_all(self._spool, data[start : start + _CHUNK].data)
        self._names.add(name)
        begin, self._filled = self._filled, self._filled + nbytes
        self._pending[name] = (tensor.dtype, tuple(tensor.shape), begin, self._filled)

    def finish(
        self,
        config: Mapping[str, Any],
        copy_from: str | Path | None = None,
        extra_files: Mapping[str, str] | None = None,
    ) -> Path:
        """Write config.json, the index, what goes along, wait for the disk, and rename; returns ``out``.

        Args:
            config: contents of config.json. An ``auto_map`` is left out: no code is copied for it to name.
            copy_from: a folder whose tokenizer, generation config, chat template and licence go along.
            extra_files: more files, plain name -> text; one that is also in ``copy_from`` wins over it.

        Raises:
            CheckpointError: no tensor was added, a name in ``extra_files`` is no plain file name or is taken,
                or a file of ``copy_from`` is a link that leads out of it.
        """
        path = self._path()
        guard = guard_of(config.get("quantization_config"), self._names)
        if guard is not None:
            self.add(*guard)
        if self._pending:
            self._close_shard()
        if not self._shards:
            raise CheckpointError(f"no tensor was added to {self.out}")
        shards = [(f"shard-{number}", names) for number, names in enumerate(self._shards)]
        complete_folder(path, shards, self._total, config, copy_from, extra_files)
        folder, self._folder = self._folder, None
        assert folder is not None
        try:
            folder.commit()
        except BaseException:
            folder.discard()
            raise
        return self.out

    def _path(self) -> Path:
        if self._folder is None:
            raise CheckpointError("the writer is not open: use it in a with block, and finish it once")
        return self._folder.path

    def _close_shard(self) -> None:
        """Header and tensors of the spool to a file of its own, in the order that safetensors itself has."""
        path = self._path()
        spool = self._spool
        assert spool is not None
        shard = lay_out_shard(
            [Planned(name, dtype, shape) for name, (dtype, shape, _, _) in self._pending.items()]
        )
        with (path / f"shard-{len(self._shards)}").open("xb", buffering=0) as file:
            _write_all(file, memoryview(shard.header))
            for name in shard.begins:
                _, _, begin, end = self._pending[name]
                _copy_range(spool, file, begin, end - begin)
            os.fsync(file.fileno())
        spool.close()
        (path / _SPOOL).unlink()
        self._spool = None
        self._shards.append(list(shard.begins))
        self._total += self._filled
        self._pending, self._filled = {}, 0


def complete_folder(
    path: Path,
    shards: Sequence[tuple[str, Iterable[str]]],
    total: int,
    config: Mapping[str, Any],
    copy_from: str | Path | None,
    extra_files: Mapping[str, str] | None,
) -> None:
    """Give the shards of a folder their names, and write everything beside them: see :meth:`CheckpointWriter.finish`.

    Args:
        shards: the present name of each file, and its tensors. total: bytes of all tensors.
    """
    count = len(shards)
    weight_map: dict[str, str] = {}
    for number, (present, names) in enumerate(shards):
        final = final_name(number, count)
        os.rename(path / present, path / final)
        weight_map.update(dict.fromkeys(names, final))
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(path / INDEX, _json(index))
    contents = {key: value for key, value in config.items() if key != "auto_map"}
    write_file(path / "config.json", _json(contents))
    extra = dict(extra_files or {})
    for name, text in extra.items():
        if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
            raise CheckpointError(f"{name!r} is not the plain name of a file")
        if (path / name).exists():
            raise CheckpointError(f"{name} is written by the checkpoint itself; choose another name")
        write_file(path / name, text.encode("utf-8"))
    if copy_from is not None:
        _copy_companions(Path(copy_from), path, set(extra))


def _copy_companions(source: Path, path: Path, taken: set[str]) -> None:
    found = {p.name for pattern in COMPANIONS for p in source.glob(pattern)}
    for name in sorted(found - taken):
        with inside(source, name).open("rb") as original, (path / name).open("xb") as copy:
            shutil.copyfileobj(original, copy)
            copy.flush()
            os.fsync(copy.fileno())


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def _write_all(file: BinaryIO, data: memoryview) -> None:
    """An unbuffered write may take less than it was given."""
    while data:
        data = data[file.write(data) :]


def _copy_range(source: BinaryIO, sink: BinaryIO, begin: int, length: int) -> None:
    source.seek(begin)
    while length:
        block = source.read(min(length, _CHUNK))
        if not block:
            raise CheckpointError("the temporary file of the writer was cut short by somebody else")
        _write_all(sink, memoryview(block))
        length -= len(block)
