"""A cell of a sweep: one model under one configuration, made and measured, here or in another process."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.checkpoint import load_tokenizer
from ..model.stream import quantize_checkpoint
from ..quant.config import QuantConfig
from .baseline_file import baseline_path, shared_baseline, write_baseline
from .data import Bos, Text, calibration_ids
from .evaluate import measure_checkpoint, measure_source
from .memory import check_ledger, ledger_of_checkpoint, predict_ledger
from .model_info import ModelInfo, model_info
from .record import ROWS, Row, read_rows
from .setting import Setting, without_timing

Progress = Callable[[str, int, int], None]
SOURCE = "source"
CELLS = ".cells"  # what each checkpoint was made of, and how long it took
BASELINES = "baselines"
HESSIANS = "hessians"


@dataclass(frozen=True)
class Cell:
    """One configuration of one model; ``config`` None is the model itself, with which the others are compared.

    Everything in it can be sent to another process.

    Attributes:
        key: of its row. source: the folder of the model. store: where configuration NAME becomes a checkpoint.
        out: the folder of the rows. text: for calibration, where the configuration needs any.
        timed: False where only the baseline's predictions are missing, and its row is there.
    """

    name: str
    key: str
    config: QuantConfig | None
    source: Path
    info: ModelInfo
    store: Path
    out: Path
    setting: Setting
    text: Text | None
    bos: Bos
    timed: bool = True

    @property
    def folder(self) -> Path:
        return self.store / self.name

    @property
    def marker(self) -> Path:
        return self.store / CELLS / f"{self.name}.json"

    @property
    def baselines(self) -> Path:
        return self.store / CELLS / BASELINES

    @property
    def identity(self) -> str:
        assert self.config is not None
        return checkpoint_identity(self.info, self.config, self.text, self.bos)

    def run(self, progress: Progress) -> Row:
        """Make the checkpoint unless it is there, check its ledger, evaluate it.

        Of several sweeps at work on one folder one does it; the others wait, and take its row.
        """
        from filelock import FileLock

        self.marker.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.marker.with_suffix(".lock")):
            if self.timed and (row := self._done_meanwhile()) is not None:
                return row
            return self._run(progress)

    def _done_meanwhile(self) -> Row | None:
        rows, _ = read_rows(self.out / ROWS)
        # a source's row is of use only beside its predictions
        if self.config is None and not baseline_path(self.baselines, self.info, self.setting).is_file():
            return None
        return next((row for row in reversed(rows) if row.key == self.key), None)

    def _run(self, progress: Progress) -> Row:
        if self.config is None:
            return self._run_source(progress)
        from transformers import MistralConfig

        data = json.loads((self.source / "config.json").read_text())
        predicted = predict_ledger(MistralConfig.from_dict(data), self.config)
        seconds = self._made_before()
        if seconds is None:
            seconds = self._quantize(self.config, progress)
        check_ledger(predicted, ledger_of_checkpoint(self.folder))
        return measure_checkpoint(
            self.folder,
            self.setting,
            shared_baseline(self.baselines, self.source, self.setting, self.info),
            info=model_info(self.folder),
            name=self.name,
            key=self.key,
            quantize_seconds=seconds,
            out=self.out,
            progress=progress,
        )

    def _run_source(self, progress: Progress) -> Row:
        how = self.setting if self.timed else without_timing(self.setting)
        row, baseline = measure_source(
            self.source,
            how,
            info=self.info,
            name=SOURCE,
            key=self.key,
            out=self.out,
            progress=progress,
        )
        write_baseline(baseline_path(self.baselines, self.info, self.setting), baseline)
        return row

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

    def _quantize(self, config: QuantConfig, progress: Progress) -> float:
        ids = None
        if config.needs_calibration:
            assert self.text is not None
            ids = calibration_ids(
                self.text,
                load_tokenizer(self.source),
                windows=config.calibration.windows,
                length=config.calibration.length,
                seed=config.calibration.seed,
                bos=self.bos,
            )
        # only what a sweep left may be replaced: another folder of this name is the user's
        ours = self.marker.is_file()
        if ours or not self.folder.exists():
            self._mark(None)
        begin = time.perf_counter()

        def report(what: str, done: int, total: int) -> None:
            progress("quantize", done, total)

        quantize_checkpoint(
            self.source,
            self.folder,
            config,
            calibration=ids,
            overwrite=ours,
            # shared by all cells of the sweep that take them from one pass
            hessians=self.store / CELLS / HESSIANS,
            progress=report,
        )
        seconds = time.perf_counter() - begin
        self._mark(seconds)
        return seconds


def checkpoint_identity(info: ModelInfo, config: QuantConfig, text: Text | None, bos: Bos) -> str:
    """What a checkpoint is made of: the source and the configuration, calibration text included."""
    data = [info.sha256, config.to_dict(), None if text is None else text.sha256, bos]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
