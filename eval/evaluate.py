"""Evaluate a checkpoint: one row of everything that can be measured of it under one protocol."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..model.checkpoint import load_model, load_tokenizer, resolve_source
from .data import Bos, Text, Windows, load_text, make_windows
from .memory import gpu_peak, kv_cache_bytes, ledger_of_checkpoint, loaded_bytes, process_peak, reset_peak
from .model_info import ModelInfo, model_info, quantization_of
from .provenance import collect
from .record import METRICS_VERSION, Memory, Protocol, Row
from .scoring import Baseline, Scores, measure_baseline, score
from .speed import SpeedProtocol, measure_speed

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Setting:
    """How every model of a comparison is measured: the same windows, precision, device and timing."""

    windows: Windows
    dtype: torch.dtype
    device: torch.device
    batch: int = 1
    speed: SpeedProtocol | None = None
    seed: int = 0
    command: str | None = None

    @property
    def protocol(self) -> Protocol:
        w = self.windows
        return Protocol(
            text=w.text_name,
            text_sha256=w.text_sha256,
            tokens_sha256=w.sha256,
            windows=w.count,
            length=w.length,
            stride=w.stride,
            scored_tokens=w.scored_tokens,
            bos=w.bos,
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device.type,
            speed=self.speed,
        )


def make_setting(
    source: Path,
    text: str | Text = "boolq",
    *,
    windows: int | None = 16,
    length: int = 1024,
    stride: int | None = None,
    bos: Bos = "auto",
    batch: int = 1,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    speed: SpeedProtocol | None = None,
    seed: int = 0,
    command: str | None = None,
    cache_dir: str | Path | None = None,
) -> Setting:
    """The setting for ``source``, a checkpoint's folder, whose tokenizer cuts the text.

    Args:
        text: see :func:`brise.eval.data.load_text`.
        windows, length, stride, bos: see :func:`brise.eval.data.make_windows`; windows None takes all.
        dtype: of the computation; None is the checkpoint's own.
        speed: what to time; None times nothing.

    Raises:
        TextError: no such text, or too short.
        ValueError: longer windows than the model has positions for.
    """
    config = json.loads((source / "config.json").read_text())
    if dtype is None:
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
        dtype = getattr(torch, name)
    positions = config.get("max_position_embeddings")
    if positions is not None and length > positions:
        raise ValueError(
            f"expected windows of at most {positions} tokens, the model's positions, got {length}"
        )
    if isinstance(text, str):
        text = load_text(text, "evaluation", cache_dir)
    cut = make_windows(text, load_tokenizer(source), length=length, count=windows, stride=stride, bos=bos)
    return Setting(cut, dtype, torch.device(device), batch, speed, seed, command)


def evaluate(
    checkpoint: str | Path,
    *,
    baseline: str | Path | Baseline | None = None,
    text: str | Text = "boolq",
    windows: int | None = 16,
    length: int = 1024,
    stride: int | None = None,
    bos: Bos = "auto",
    batch: int = 1,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    speed: SpeedProtocol | None = None,
    seed: int = 0,
    name: str | None = None,
    command: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Row:
    """Measure one checkpoint, quantized or not.

    Args:
        checkpoint: a folder or a hub name.
        baseline: what it is compared with: a folder, a hub name, or a Baseline of the same windows.
        text .. speed: see :func:`make_setting`.
        name: of the row; the checkpoint's own name by default.
        progress: called with (stage, done, total).

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        NonFiniteError: the model's predictions are not finite.
        ValueError: the baseline cuts the text into other tokens, see :func:`brise.eval.scoring.score`.
    """
    folder = resolve_source(checkpoint)
    setting = make_setting(
        folder,
        text,
        windows=windows,
        length=length,
        stride=stride,
        bos=bos,
        batch=batch,
        dtype=dtype,
        device=device,
        speed=speed,
        seed=seed,
        command=command,
        cache_dir=cache_dir,
    )
    if isinstance(baseline, str | Path):
        source = resolve_source(baseline)
        model = load_model(source, dtype=setting.dtype, device=str(setting.device))
        info = model_info(source, str(baseline))
        baseline = measure_baseline(model, setting.windows, batch=batch, info=info, progress=progress)
        del model
    return measure_checkpoint(
        folder, setting, baseline, info=model_info(folder, str(checkpoint)), name=name, progress=progress
    )


def measure_checkpoint(
    folder: Path,
    setting: Setting,
    baseline: Baseline | None = None,
    *,
    info: ModelInfo | None = None,
    name: str | None = None,
    key: str | None = None,
    quantize_seconds: float | None = None,
    progress: Progress | None = None,
) -> Row:
    """The row of the checkpoint in ``folder``. ``key`` is its own by default, see :func:`row_key`."""
    return _measure(folder, setting, baseline, info, name, key, quantize_seconds, progress)[0]


def measure_source(
    folder: Path,
    setting: Setting,
    *,
    info: ModelInfo | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> tuple[Row, Baseline]:
    """The row of the model that others are compared with, and the baseline for them, from one pass."""
    row, measured = _measure(folder, setting, None, info, name, None, None, progress, keep=True)
    assert measured is not None
    return row, measured


def _measure(
    folder: Path,
    setting: Setting,
    baseline: Baseline | None,
    info: ModelInfo | None,
    name: str | None,
    key: str | None,
    quantize_seconds: float | None,
    progress: Progress | None,
    keep: bool = False,
) -> tuple[Row, Baseline | None]:
    info = info or model_info(folder)
    ledger = ledger_of_checkpoint(folder)
    peak_is_ours = reset_peak()
    model = load_model(folder, dtype=setting.dtype, device=str(setting.device))
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
    against = None if baseline is None else baseline.info
    row = Row(
        metrics=METRICS_VERSION,
        key=key or row_key(setting.protocol, info.sha256, against.sha256 if against else None),
        name=name or info.name,
        model=info,
        baseline=against,
        config=quantization_of(folder),
        protocol=setting.protocol,
        perplexity=scores.perplexity,
        relative=scores.relative,
        divergence=scores.divergence,
        memory=memory,
        speed=speed,
        quantize_seconds=quantize_seconds,
        provenance=collect(setting.device, setting.seed, setting.command),
    )
    return row, measured


def row_key(protocol: Protocol, *what: Any) -> str:
    """What makes a row: the metrics version, the protocol, and the hashes or configurations in ``what``."""
    data = [METRICS_VERSION, dataclasses.asdict(protocol), *what]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
