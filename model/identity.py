"""What makes a job, so that an unfinished one is only gone on with where it is the same."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.config import QuantConfig
from .source import Source
from .trouble import Policy

# what a model and its tokenizer are read from; other files beside them may be the job's own
_ENDINGS = (".gguf", ".jinja", ".json", ".model", ".safetensors")


def files_of(checkpoint: Path) -> dict[str, list[int]]:
    """The files of a checkpoint, a folder or a single one, as they are now: size and time in ns of each."""
    files = [checkpoint]
    if checkpoint.is_dir():
        files = sorted(p for p in checkpoint.iterdir() if p.suffix in _ENDINGS and p.is_file())
    return {p.name: [(status := p.stat()).st_size, status.st_mtime_ns] for p in files}


def goes_on(part: str, old: Any, new: Any) -> bool:
    """Whether steps that were finished under a part ``old`` of an identity are what they would be under ``new``.

    Of the policy what was to fail may change: none of it was met in a finished step.
    """
    if part != "policy" or old is None or new is None:
        return bool(old == new)
    return all(old.get(kind) in ("fail", action) for kind, action in new.items())


def job_identity(
    source: Source,
    config: QuantConfig,
    policy: Policy,
    max_shard_bytes: int,
    ids: Tensor | None,
    world: int,
    device: torch.device,
) -> dict[str, Any]:
    """The parts of a quantization job by name, JSON-ready.

    Under calibration the versions and numbers on which the last bit of a sum depends are among them.

    Args:
        ids: calibration windows int64 [windows, length], None where there are none.
        world: processes of the job. device: where they compute.
    """
    out: dict[str, Any] = {
        "brise": version("brise"),
        "config": config.to_dict(),
        "policy": policy.to_dict(),
        "max_shard_bytes": max_shard_bytes,
        "source": source.identity(),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
    }
    if ids is not None:
        out["calibration windows"] = hashlib.sha256(
            repr(tuple(ids.shape)).encode() + ids.contiguous().numpy().tobytes()
        ).hexdigest()
        out["torch"] = torch.__version__
        out["threads"] = torch.get_num_threads()
        out["processes"] = world
    return out
