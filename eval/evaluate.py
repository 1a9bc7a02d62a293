"""Evaluate a checkpoint: one row of everything that can be measured of it under one protocol."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..model.checkpoint import load_model, load_tokenizer, resolve_source
from .data import Text
from .logprobs import cache_key, load_baseline, read_kld, save_baseline
from .memory import gpu_peak, kv_cache_bytes, ledger_of_checkpoint, loaded_bytes, process_peak
from .memory_peaks import current_peak, measure_peaks, start_phase
from .model_info import ModelInfo, model_info, quantization_of
from .provenance import collect
from .record import METRICS_VERSION, LayerError, Memory, Protocol, Row
from .scoring import Baseline, Predictions, Scores, measure_baseline, score
from .setting import Setting, make_setting
from .speed import measure_speed, measure_speeds
from .tasks import Item, TaskScore, run_tasks, write_items

__all__ = ["Setting", "evaluate", "make_setting", "measure_checkpoint", "measure_source", "row_key"]

Progress = Callable[[str, int, int], None]
_REPORT = "quantization_report.json"


def evaluate(
    checkpoint: str | Path,
    *,
    baseline: str | Path | Predictions | None = None,
    text: str | Text | None = None,
    name: str | None = None,
    baseline_cache: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **setting: Any,
) -> Row:
    """Measure one checkpoint, quantized or not.

    Args:
        checkpoint: a folder or a hub name.
        baseline: what it is compared with: a folder, a hub name, or predictions on the same windows.
        text, setting: see :func:`make_setting`.
        name: of the row; the checkpoint's own name by default.
        baseline_cache: a folder where the baseline's predictions are kept in 16 bits, so that the next one need not run
            it; None compares with the exact ones. The row's protocol says which.
        out: where the items of tasks are kept.
        progress: called with (stage, done, total).

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        NonFiniteError: the model's predictions are not finite.
        ValueError: the baseline cuts the text into other tokens, see :func:`brise.eval.scoring.score`.
    """
    folder = resolve_source(checkpoint)
    how = make_setting(folder, text, **setting)
    if isinstance(baseline, str | Path):
        baseline = baseline_of(baseline, how, baseline_cache, progress)
    return measure_checkpoint(
        folder,
        how,
        baseline,
        info=model_info(folder, str(checkpoint)),
        name=name,
        out=None if out is None else Path(out),
        progress=progress,
    )


def baseline_of(
    model: str | Path, setting: Setting, cache: str | Path | None = None, progress: Progress | None = None
) -> Predictions:
    """The predictions of ``model`` on the setting's windows; with a cache from there, where it has been before.

    ``model`` may be llama.cpp's file of them (``.kld``); then the setting must be of the protocol ``llamacpp-512``.
    """
    windows = setting.windows
    if str(model).endswith(".kld") and Path(model).is_file():
        bos = int(windows.ids[0, 0]) if windows.bos else None
        return read_kld(Path(model), bos)[0]
    source = resolve_source(model)
    info = model_info(source, str(model))
    folder = None
    if cache is not None:
        folder = Path(cache) / cache_key(info, windows, setting.dtype, setting.device.type)
        if folder.is_dir():
            return load_baseline(folder, windows)
    loaded = load_model(source, dtype=setting.dtype, device=str(setting.device))
    if folder is None:
        return measure_baseline(loaded, windows, batch=setting.batch, info=info, progress=progress)
    save_baseline(loaded, windows, info, folder, batch=setting.batch, progress=progress)
    return load_baseline(folder, windows)


def measure_checkpoint(
    folder: Path,
    setting: Setting,
    baseline: Predictions | None = None,
    *,
    info: ModelInfo | None = None,
    name: str | None = None,
    key: str | None = None,
    quantize_seconds: float | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Row:
    """The row of the checkpoint in ``folder``. ``key`` is its own by default, see :func:`row_key`."""
    return _measure(folder, setting, baseline, info, name, key, quantize_seconds, out, progress)[0]


def measure_source(
    folder: Path,
    setting: Setting,
    *,
    info: ModelInfo | None = None,
    name: str | None = None,
    key: str | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Row, Baseline]:
    """The row of the model that others are compared with, and the baseline for them, from one pass."""
    row, measured = _measure(folder, setting, None, info, name, key, None, out, progress, keep=True)
    assert measured is not None
    return row, measured


def _measure(
    folder: Path,
    setting: Setting,
    baseline: Predictions | None,
    info: ModelInfo | None,
    name: str | None,
    key: str | None,
    quantize_seconds: float | None,
    out: Path | None,
    progress: Progress | None,
    keep: bool = False,
) -> tuple[Row, Baseline | None]:
    info = info or model_info(folder)
    ledger = ledger_of_checkpoint(folder)
    peak_is_ours = start_phase()
    model = load_model(folder, dtype=setting.dtype, device=str(setting.device))
    load_peak = current_peak(setting.device)
    measured = None
    scores: Scores
    if keep:
        measured = measure_baseline(model, setting.windows, batch=setting.batch, info=info, progress=progress)
        scores = measured.scores
    else:
        scores = score(model, setting.windows, baseline, batch=setting.batch, progress=progress)
    speed = None
    if setting.speed is not None:
        speed = measure_speed(model, setting.speed, seed=setting.seed, progress=progress)
    memory = Memory(
        **ledger.to_dict(),
        kv_cache=kv_cache_bytes(model.config, setting.windows.length, dtype=setting.dtype),
        kv_length=setting.windows.length,
        loaded=loaded_bytes(model),
        process_peak=process_peak() if peak_is_ours else None,
        gpu_peak=gpu_peak(setting.device),
    )
    peaks = speeds = None
    if setting.speed is not None:
        peaks = measure_peaks(model, load_peak, setting.speed.prompt, setting.speed.new_tokens, setting.seed)
    if setting.batches and setting.contexts:
        speeds = measure_speeds(
            model, setting.batches, setting.contexts, setting.speed, seed=setting.seed, progress=progress
        )
    tasks: dict[str, TaskScore] | None = None
    items: dict[str, list[Item]] = {}
    if setting.tasks:
        tasks, items = run_tasks(
            model,
            load_tokenizer(folder),
            setting.tasks,
            batch=setting.batch,
            cache_dir=setting.cache_dir,
            progress=progress,
        )
    against = None if baseline is None else baseline.info
    protocol = setting.protocol
    if baseline is not None:
        protocol = dataclasses.replace(protocol, baseline=baseline.precision)
    own = row_key(protocol, info.sha256, against.sha256 if against else None, *_extra(setting))
    row = Row(
        metrics=METRICS_VERSION,
        key=key or own,
        name=name or info.name,
        model=info,
        baseline=against,
        config=quantization_of(folder),
        protocol=protocol,
        perplexity=scores.perplexity,
        relative=scores.relative,
        divergence=scores.divergence,
        memory=memory,
        speed=speed,
        quantize_seconds=quantize_seconds,
        provenance=collect(setting.device, setting.seed, setting.command, setting.batch),
        words=scores.words,
        sums=scores.sums,
        layers=layer_errors(folder),
        tasks=tasks,
        peaks=peaks,
        speeds=speeds,
    )
    if out is not None and items:
        write_items(out, row.key, items)
    return row, measured


def layer_errors(folder: Path) -> list[LayerError] | None:
    """The errors of the quantized modules as the maker of a checkpoint reported them; None where nobody did."""
    path = folder / _REPORT
    if not path.is_file():
        return None
    modules = json.loads(path.read_text())["modules"]
    found = [
        LayerError(m["path"], m["relative_error"], m["output_error"])
        for m in modules
        if m["spec"] is not None
    ]
    return found or None


def row_key(protocol: Protocol, *what: Any) -> str:
    """What makes a row: the metrics version, the protocol, and the hashes or configurations in ``what``."""
    data = [METRICS_VERSION, protocol.identity(), *what]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _extra(setting: Setting) -> list[Any]:
    return [setting.extra] if setting.extra else []
