"""The exact predictions of a sweep's source, in a file that its processes share.

What is kept is what :class:`brise.eval.scoring.Baseline` holds, to the bit: last hidden states and sums; the head is
read from the source again. So a cell in another process has the very figures that it would have had in this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path

import torch

from ..model.checkpoint import load_model
from .model_info import ModelInfo
from .scoring import Baseline, Scores, measure_baseline
from .setting import Setting


def baseline_path(folder: Path, info: ModelInfo, setting: Setting) -> Path:
    """Where the predictions of a source under a setting are kept in ``folder``."""
    what = [info.sha256, setting.windows.sha256, str(setting.dtype), setting.device.type]
    return folder / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.safetensors"


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write what ``baseline`` holds; the file appears whole."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    scores = baseline.scores
    save_file({"hidden": baseline.hidden, "nll": scores.nll, "tokens": scores.tokens}, temporary)
    os.replace(temporary, path)


def read_baseline(path: Path, source: Path, setting: Setting, info: ModelInfo) -> Baseline:
    """The predictions in ``path``, with the head of the checkpoint in ``source``."""
    from safetensors.torch import load_file

    data = load_file(path)
    head = load_model(source, dtype=setting.dtype, device=str(setting.device)).get_output_embeddings()
    assert isinstance(head, torch.nn.Module)
    scores = Scores(data["tokens"], data["nll"], windows=setting.windows)
    return Baseline(setting.windows, data["hidden"], head, scores, info)


def shared_baseline(folder: Path, source: Path, setting: Setting, info: ModelInfo) -> Baseline:
    """The predictions from ``folder``, measured and put there if they are not.

    A machine that does not see the others' disk comes to its own; of several processes one measures.
    """
    from filelock import FileLock

    path = baseline_path(folder, info, setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.is_file():
            return read_baseline(path, source, setting, info)
        model = load_model(source, dtype=setting.dtype, device=str(setting.device))
        baseline = measure_baseline(model, setting.windows, batch=setting.batch, info=info)
        write_baseline(path, baseline)
        return baseline
