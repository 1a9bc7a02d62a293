"""Read a Hugging Face folder of safetensors: strictly, memory-mapped, and never anything but data."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from .quantization_entry import is_guard
from .safetensors_header import MAX_JSON_BYTES, CheckpointError, parse_json
from .tensor_files import TensorFiles, inside, listed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# what a model needs, and nothing that could be run
_WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "LICENSE*", "NOTICE*"]
_UNWANTED = ["consolidated*", "original/*", "*/*.safetensors", "onnx/*", "*.bin.index.json"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_source(source: str | Path) -> Path:
    """A model's folder or GGUF file: ``source`` itself, or the local copy of a hub name (``mistralai/Mistral-7B``).

    A hub name is fetched (safetensors, JSON, tokenizer and licence files only) or found in the hub's cache.

    Raises:
        CheckpointError: there is no such folder, and no such name on the hub or no way to reach it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() or (folder.is_file() and folder.suffix == ".gguf"):
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


class CheckpointReader(TensorFiles):
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
        if not Path(folder).is_dir():
            raise CheckpointError(f"there is no folder {folder}")
        super().__init__(folder)
        self.config: dict[str, Any] = read_json(self.folder, "config.json")
        weight_map = self._weight_map()
        wanted = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
        if bad := [shard for shard in wanted if not shard.endswith(".safetensors")]:
            raise CheckpointError(
                f"{self.folder / INDEX} names {bad[0][:200]!r}; expected files that end in .safetensors"
            )
        self.open(wanted)
        if weight_map is not None:
            self._check_index(weight_map)
        self.hide([n for n in self.names if self._hides(n)])

    def identity(self) -> dict[str, Any]:
        """As of the shards, and the hash of config.json."""
        config = (self.folder / "config.json").read_bytes()
        return {"config.json": hashlib.sha256(config).hexdigest(), **super().identity()}

    def _hides(self, name: str) -> bool:
        """Whether a tensor is the guard of a quantized folder (:func:`.quantization_entry.guard_of`)."""
        entry = self._where[name][1]
        codes = name.removesuffix("weight") + "qweight"
        return name.endswith(".weight") and codes in self._where and is_guard(entry.dtype, entry.shape)

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

    def _check_index(self, weight_map: dict[str, str]) -> None:
        index = self.folder / INDEX
        wrong = []
        for name, shard in weight_map.items():
            found = self._where[name][0] if name in self._where else None
            if found != shard:
                does = "it does not" if found is None else f"{found} does"
                wrong.append(f"says that {shard} holds {name}, but {does}")
        if wrong:
            raise CheckpointError(f"{index} {listed(wrong, '; ')}")
        if unlisted := [
            f"{name} in {shard}" for name, (shard, _) in self._where.items() if name not in weight_map
        ]:
            raise CheckpointError(f"{self.folder} holds {listed(unlisted)}, which {index} does not list")


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


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
