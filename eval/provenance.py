"""Where a figure comes from: versions, machine, commit, command, time."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from ..kernels import native

# the commit of this process's code, once it was asked for
_code: list[str | None] = []
_PACKAGES = ("brise", "torch", "transformers", "safetensors", "numpy", "triton", "datasets", "lm_eval")


@dataclass(frozen=True)
class Provenance:
    """Of one row.

    Attributes:
        versions: of python and the packages that the figures rest on; those not installed are left out. ``native`` is
            the processor that the compiled products of the CPU are for, left out where nothing could be compiled.
        device: the processor's or GPU's name as the system gives it.
        threads: of torch on the CPU.
        seed: of everything random in the measurement.
        commit: of the checkout that holds the package when the measuring began (:func:`code_commit`), ``-dirty`` where
            tracked files differed (but for ``results``, where rows are written); None elsewhere.
        command: as it was typed, or None where a program called the library.
        time: UTC, ISO 8601, to the second.
        batch: windows of a forward pass: sums come out otherwise, in their last bits, with others.
    """

    versions: dict[str, str]
    device: str
    threads: int
    seed: int
    commit: str | None
    command: str | None
    time: str
    batch: int = 1


def collect(device: torch.device, seed: int, command: str | None = None, batch: int = 1) -> Provenance:
    """The provenance of a measurement made here and now on ``device``."""
    return Provenance(
        versions=versions(),
        device=device_name(device),
        threads=torch.get_num_threads(),
        seed=seed,
        commit=code_commit(),
        command=command,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        batch=batch,
    )


def command_line() -> str:
    """The command that started this process, without the folders of the program itself."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if native.active() is not None:
        found["native"] = native.processor()
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def code_commit() -> str | None:
    """The commit of this process's code: :func:`commit` as it was when this was first called.

    What measures calls it before it begins, so that a row which comes hours later names the code that computed it,
    whatever was committed meanwhile.
    """
    if not _code:
        _code.append(commit())
    return _code[0]


def inherit_code(parent: str | None) -> None:
    """In a process that runs what its parent had imported: its code is the parent's."""
    _code[:] = [parent]


def commit(root: Path | None = None) -> str | None:
    """The commit of the checkout whose top folder is ``root`` (this package's by default), or None."""
    root = root or Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or a repository without a commit
        return None
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def hash_files(files: Iterable[Path]) -> str:
    """sha256 over the names and contents of files, in the order of their names."""
    total = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            total.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def model_hash(folder: Path) -> str:
    """sha256 of what makes a model: its config.json and its safetensors files, or its one GGUF file.

    The version of the library that wrote config.json says nothing about the model and is left out.
    """
    if folder.is_file():
        return hash_files([folder])
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    text = json.dumps(config, sort_keys=True) + hash_files(folder.glob("*.safetensors"))
    return hashlib.sha256(text.encode()).hexdigest()
