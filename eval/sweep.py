"""Models under a list of configurations: quantize each, evaluate it against its source, append a row.

What was done before is not done again: a cell whose row is there is skipped, a checkpoint that was made but
not evaluated is used. A cell that fails is reported and does not stop the others. Rows are written by one process,
the one that was asked for the sweep, each under a lock and once.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.checkpoint import resolve_source
from ..quant.config import QuantConfig
from .baseline_file import baseline_path
from .cells import SOURCE, Cell, checkpoint_identity
from .data import Bos, Text, check_disjoint, load_text
from .engines import Engine, Inline
from .evaluate import row_key
from .model_info import model_info
from .record import ROWS, NotFiniteError, Row, append_row, read_rows
from .setting import Setting, make_setting

Progress = Callable[[str, int, int], None]
Note = Callable[[str], None]


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
    text: str | None = None,
    bos: Bos = "auto",
    calibration_windows: int | None = None,
    calibration_text: str | None = None,
    calibrate_once: bool = False,
    draws: int = 0,
    engine: Engine | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
    **setting: Any,
) -> SweepResult:
    """Quantize and evaluate ``model`` under every configuration; rows go to ``out/runs.jsonl``.

    Args:
        model: a folder or a hub name, not quantized.
        configs: presets or files (:meth:`QuantConfig.load`), or configurations by name.
        out: the folder of the rows, and of the items of tasks.
        checkpoints: where configuration NAME becomes the checkpoint ``NAME``; None is ``out``.
        text, bos, setting: see :func:`brise.eval.setting.make_setting`.
        calibration_windows, calibration_text: in place of what the configurations say; the rows say so.
        calibrate_once: all Hessians from one pass over the unquantized model (:mod:`brise.model.hessian_store`).
        draws: make each calibrated configuration so many times, each on windows of another seed, as NAME.d0 and so on
            (the rows' spread is what the choice of text does); 0 makes it once, on the text's first windows.
        engine: where cells run; None is here, one after the other.
        progress: called with (stage, done, total); stages of a cell begin with its name, ``cells`` counts them.
        note: called with a line on how far the sweep is and how long it will take, after every cell, and with one on
            why a cell failed.

    Raises:
        ConfigError: a configuration that cannot be read; nothing has run then.
        TextError: calibration and evaluation share passages, or a text is missing or too short.
        RecordError: ``out/runs.jsonl`` holds something else than rows.
    """
    plan = plan_configs(configs, calibration_windows, calibration_text, calibrate_once, draws)
    out = Path(out)
    store = out if checkpoints is None else Path(checkpoints)
    source = resolve_source(model)
    info = model_info(source, str(model))
    how = make_setting(source, text, bos=bos, cache_dir=cache_dir, **setting)
    evaluation = load_text(how.windows.text_name, "evaluation", cache_dir)
    texts = _calibration_texts(plan, evaluation, cache_dir)
    rows, problems = read_rows(out / ROWS)
    done = {row.key: row for row in rows}
    base = Cell(SOURCE, "", None, source, info, store, out, how, None, bos)
    cells = {SOURCE: dataclasses.replace(base, key=_key(how, info.sha256))}
    for name, config in plan.items():
        words = texts[config.calibration.text] if config.needs_calibration else None
        key = _key(how, name, checkpoint_identity(info, config, words, bos))
        cells[name] = dataclasses.replace(base, name=name, key=key, config=config, text=words)
    skipped = [name for name, cell in cells.items() if cell.key in done]
    run = _Run(out, engine or Inline(), progress or (lambda *_: None), note or (lambda _: None))
    run.rows = {name: done[cells[name].key] for name in skipped}
    missing = [cell for name, cell in cells.items() if name not in skipped]
    if len(missing) > 1 and run.engine.width > 1 and (how.speed is not None or how.batches):
        run.note(
            "speeds are timed while other cells run beside: take none from these rows, or time them one at a time"
        )
    if missing:
        kept = baseline_path(base.baselines, info, how)
        if SOURCE not in run.rows:
            run.all([missing.pop(0)])
        elif not kept.is_file():
            # only its predictions are missing: it is not timed again
            run.again(dataclasses.replace(cells[SOURCE], timed=False))
        if SOURCE in run.rows and not run.failures:
            run.all(missing)
        if not run.failures:
            kept.unlink(missing_ok=True)
            kept.with_suffix(".lock").unlink(missing_ok=True)
    return SweepResult([run.rows[n] for n in cells if n in run.rows], skipped, run.failures, problems)


class _Run:
    """What has come of the cells so far."""

    def __init__(self, out: Path, engine: Engine, progress: Progress, note: Note) -> None:
        self.out, self.engine, self.progress, self.note = out, engine, progress, note
        self.rows: dict[str, Row] = {}
        self.failures: list[Failure] = []

    def all(self, cells: Sequence[Cell]) -> None:
        """Run the cells, and write each row as it comes."""
        begin = time.monotonic()
        for number, (cell, result) in enumerate(self.engine.run(cells, self.progress), 1):
            if not isinstance(result, Exception):
                try:
                    append_row(self.out / ROWS, result, once=True)
                    self.rows[cell.name] = result
                except NotFiniteError as error:  # measured, and no figure that a row can hold
                    result = error
            if isinstance(result, Exception):
                self.failures.append(Failure(cell.name, result))
                # at once: the other cells may fail for the same reason, and take hours to do so
                self.note(f"{cell.name} failed: {type(result).__name__}: {result}")
            self.progress("cells", number, len(cells))
            passed = time.monotonic() - begin
            self.note(how_far(number, len(cells), len(self.failures), passed, self.engine.width))

    def again(self, cell: Cell) -> None:
        """Run a cell whose row is there."""
        for _, result in self.engine.run([cell], self.progress):
            if isinstance(result, Exception):
                self.failures.append(Failure(cell.name, result))


def how_far(done: int, cells: int, failed: int, seconds: float, width: int = 1) -> str:
    """``12 of 24 cells, 1 failed, about 35 min left``; as many as ran in the time so far will run in as much again.

    Of ``width`` cells at once those that still run are half done, on the average, when another ends.
    """
    parts = [f"{done} of {cells} cells"]
    if failed:
        parts.append(f"{failed} failed")
    if left := cells - done:
        half = min(width - 1, left) / 2
        ahead = seconds / (done + half) * (left - half)
        for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
            if ahead >= 2 * size or size == 1.0:
                parts.append(f"about {ahead / size:.0f} {unit} left")
                break
    return ", ".join(parts)


def _key(setting: Setting, *what: Any) -> str:
    return row_key(setting.protocol, *what, *([setting.extra] if setting.extra else []))


def plan_configs(
    configs: Sequence[str | Path] | Mapping[str, QuantConfig],
    windows: int | None = None,
    text: str | None = None,
    once: bool = False,
    draws: int = 0,
) -> dict[str, QuantConfig]:
    """Name -> configuration, all of them read before anything runs; calibration named anew where asked for.

    Raises:
        ConfigError: a configuration that cannot be read.
        ValueError: two of one name, or a name that cannot be a folder's.
    """
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
    if once:
        change |= {"hessians": "once", "target": "quantized", "true_sequential": False}
    out: dict[str, QuantConfig] = {}
    for name, chosen in plan.items():
        if not chosen.needs_calibration:
            out[name] = chosen
            continue
        for seed in range(draws) if draws else [None]:
            own = change if seed is None else {**change, "seed": seed}
            changed = dataclasses.replace(chosen.calibration, **own)
            out[name if seed is None else f"{name}.d{seed}"] = dataclasses.replace(
                chosen, calibration=changed
            )
    return out


def _calibration_texts(
    plan: Mapping[str, QuantConfig], evaluation: Text, cache_dir: str | Path | None
) -> dict[str, Text]:
    """The calibration texts by name, each checked to share nothing with the evaluation's."""
    names = {config.calibration.text for config in plan.values() if config.needs_calibration}
    texts = {name: load_text(name, "calibration", cache_dir) for name in sorted(names)}
    for text in texts.values():
        check_disjoint(text, evaluation)
    return texts
