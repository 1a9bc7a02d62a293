"""One model under a list of configurations: quantize each, evaluate it against the source, append a row.

What was done before is not done again: a cell whose row is there is skipped, a checkpoint that was made but
not evaluated is used. A cell that fails is reported and does not stop the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..model.checkpoint import load_tokenizer, resolve_source
from ..model.stream import quantize_checkpoint
from ..quant.config import QuantConfig
from .data import Bos, Text, calibration_ids, check_disjoint, load_text
from .evaluate import Setting, make_setting, measure_checkpoint, measure_source, row_key
from .memory import check_ledger, ledger_of_checkpoint, predict_ledger
from .model_info import ModelInfo, model_info
from .record import ROWS, Row, append_row, read_rows
from .scoring import Baseline
from .speed import SpeedProtocol

Progress = Callable[[str, int, int], None]
SOURCE = "source"
CELLS = ".cells"  # what each checkpoint was made of, and how long it took


@dataclass(frozen=True)
class Failure:
    """A cell that could not be done: its name and the error."""

    name: str
    error: Exception

    def __str__(self) -> str:
        return f"{self.name}: {type(self.error).__name__}: {self.error}"


@dataclass(frozen=True)
class SweepResult:
    """Of one sweep.

    Attributes:
        rows: of the source and all cells that are done, in the order asked for.
        skipped: names of those whose row was there before.
        failures: cells that failed; a command should exit non-zero where there are any.
        problems: what was left out on reading the file of rows.
    """

    rows: list[Row]
    skipped: list[str]
    failures: list[Failure]
    problems: list[str]


def run_sweep(
    model: str | Path,
    configs: Sequence[str | Path] | Mapping[str, QuantConfig],
    out: str | Path,
    *,
    checkpoints: str | Path | None = None,
    text: str = "boolq",
    windows: int | None = 16,
    length: int = 1024,
    stride: int | None = None,
    bos: Bos = "auto",
    batch: int = 1,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    speed: SpeedProtocol | None = None,
    calibration_windows: int | None = None,
    calibration_text: str | None = None,
    seed: int = 0,
    command: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Quantize and evaluate ``model`` under every configuration; rows go to ``out/runs.jsonl``.

    Args:
        model: a folder or a hub name, not quantized.
        configs: presets or files (:meth:`QuantConfig.load`), or configurations by name.
        out: the folder of the rows.
        checkpoints: where configuration NAME becomes the checkpoint ``NAME``; None is ``out``.
        text .. speed: see :func:`brise.eval.evaluate.make_setting`.
        calibration_windows, calibration_text: in place of what the configurations say; the rows say so.
        progress: called with (stage, done, total); stages of a cell begin with its name.

    Raises:
        ConfigError: a configuration that cannot be read; nothing has run then.
        TextError: calibration and evaluation share passages, or a text is missing or too short.
        RecordError: ``out/runs.jsonl`` holds something else than rows.
    """
    plan = _plan(configs, calibration_windows, calibration_text)
    out = Path(out)
    store = out if checkpoints is None else Path(checkpoints)
    source = resolve_source(model)
    info = model_info(source, str(model))
    evaluation = load_text(text, "evaluation", cache_dir)
    setting = make_setting(
        source,
        evaluation,
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
    texts = _calibration_texts(plan, evaluation, cache_dir)
    rows, problems = read_rows(out / ROWS)
    done = {row.key: row for row in rows}
    cells = {
        name: _Cell(name, config, source, info, store, setting, texts, bos) for name, config in plan.items()
    }
    keys = {SOURCE: row_key(setting.protocol, info.sha256)}
    keys |= {name: row_key(setting.protocol, name, cell.identity) for name, cell in cells.items()}
    skipped = [name for name, key in keys.items() if key in done]
    result: dict[str, Row] = {name: done[keys[name]] for name in skipped}
    failures: list[Failure] = []

    if len(skipped) < len(keys):
        # where only its predictions are missing, the source is not timed again
        how = dataclasses.replace(setting, speed=None) if SOURCE in result else setting
        row, baseline = measure_source(
            source, how, info=info, name=SOURCE, progress=_staged(progress, SOURCE)
        )
        if SOURCE not in result:
            result[SOURCE] = dataclasses.replace(row, key=keys[SOURCE])
            append_row(out / ROWS, result[SOURCE])
        for name, cell in cells.items():
            if name in result:
                continue
            try:
                result[name] = cell.run(baseline, keys[name], _staged(progress, name))
                append_row(out / ROWS, result[name])
            except Exception as error:  # the other cells go on; this one is reported with its error
                failures.append(Failure(name, error))
    return SweepResult([result[name] for name in keys if name in result], skipped, failures, problems)


@dataclass(frozen=True)
class _Cell:
    """One configuration of a sweep."""

    name: str
    config: QuantConfig
    source: Path
    info: ModelInfo
    store: Path
    setting: Setting
    texts: Mapping[str, Text]
    bos: Bos

    @property
    def folder(self) -> Path:
        return self.store / self.name

    @property
    def marker(self) -> Path:
        return self.store / CELLS / f"{self.name}.json"

    @property
    def identity(self) -> str:
        """What the checkpoint is made of: the source and the configuration, calibration text included."""
        text = self.texts[self.config.calibration.text].sha256 if self.config.needs_calibration else None
        data = [self.info.sha256, self.config.to_dict(), text, self.bos]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def run(self, baseline: Baseline, key: str, progress: Progress) -> Row:
        """Make the checkpoint unless it is there, check its ledger, evaluate it."""
        from transformers import MistralConfig

        data = json.loads((self.source / "config.json").read_text())
        predicted = predict_ledger(MistralConfig.from_dict(data), self.config)
        seconds = self._made_before()
        if seconds is None:
            seconds = self._quantize(progress)
        check_ledger(predicted, ledger_of_checkpoint(self.folder))
        return measure_checkpoint(
            self.folder,
            self.setting,
            baseline,
            info=model_info(self.folder),
            name=self.name,
            key=key,
            quantize_seconds=seconds,
            progress=progress,
        )

    def _made_before(self) -> float | None:
        """The seconds that making this very checkpoint took, or None if it is not there."""
        if not self.folder.exists() or not self.marker.is_file():
            return None
        marker: dict[str, Any] = json.loads(self.marker.read_text())
        return marker["seconds"] if marker["identity"] == self.identity else None

    def _mark(self, seconds: float | None) -> None:
        """Say that the folder is this sweep's, and, once it is whole, how long it took."""
        self.marker.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.marker.with_suffix(".tmp")
        temporary.write_text(json.dumps({"identity": self.identity, "seconds": seconds}) + "\n")
        temporary.replace(self.marker)

    def _quantize(self, progress: Progress) -> float:
        calibration = self.config.calibration
        ids = None
        if self.config.needs_calibration:
            ids = calibration_ids(
                self.texts[calibration.text],
                load_tokenizer(self.source),
                windows=calibration.windows,
                length=calibration.length,
                bos=self.bos,
            )
        # only what a sweep left may be replaced: another folder of this name is the user's
        ours = self.marker.is_file()
        if ours or not self.folder.exists():
            self._mark(None)
        begin = time.perf_counter()
        quantize_checkpoint(
            self.source,
            self.folder,
            self.config,
            calibration=ids,
            overwrite=ours,
            progress=lambda what, done, total: progress("quantize", done, total),
        )
        seconds = time.perf_counter() - begin
        self._mark(seconds)
        return seconds


def _plan(
    configs: Sequence[str | Path] | Mapping[str, QuantConfig], windows: int | None, text: str | None
) -> dict[str, QuantConfig]:
    """Name -> configuration, all of them read before anything runs."""
    if isinstance(configs, Mapping):
        plan = dict(configs)
    else:
        plan = {}
        for config in configs:
            name = Path(config).stem if Path(config).suffix else str(config)
            if name in plan:
                raise ValueError(f"two configurations are named {name}")
            plan[name] = QuantConfig.load(config)
    for name in plan:
        if name == SOURCE or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(
                f"a configuration cannot be named {name!r}: it becomes a folder's name beside {SOURCE}"
            )
    change: dict[str, Any] = {
        key: value for key, value in (("windows", windows), ("text", text)) if value is not None
    }
    return {
        name: dataclasses.replace(config, calibration=dataclasses.replace(config.calibration, **change))
        if config.needs_calibration
        else config
        for name, config in plan.items()
    }


def _calibration_texts(
    plan: Mapping[str, QuantConfig], evaluation: Text, cache_dir: str | Path | None
) -> dict[str, Text]:
    """The calibration texts by name, each checked to share nothing with the evaluation's."""
    names = {config.calibration.text for config in plan.values() if config.needs_calibration}
    texts = {name: load_text(name, "calibration", cache_dir) for name in sorted(names)}
    for text in texts.values():
        check_disjoint(text, evaluation)
    return texts


def _staged(progress: Progress | None, name: str) -> Progress:
    """``progress`` with the cell's name before the stage."""
    if progress is None:
        return lambda *_: None
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)
