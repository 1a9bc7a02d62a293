"""A sweep written down: models x configurations x measurements, in YAML.

    models: [smollm2-135m]
    configs:
      - nf4                                  # a preset, or a file beside this one
      - name: mine                           # or a configuration, as in a file of its own
        rules: [{match: "*layers.*", format: int4, group_size: 32}]
      - {name: again, preset: nf4}           # or a preset under another name
    metrics:                                 # or a list of such: every cell is then measured under each
      windows: 16
      length: 1024
      speed: false
      tasks: ["lambada_offline:300"]
    calibration: {windows: 64, once: true}   # in place of what the configurations say; also text, and draws: 3

Under ``metrics`` stand the arguments of :func:`brise.eval.setting.make_setting`; ``speed`` is true, false, or a mapping
of :class:`brise.eval.speed.SpeedProtocol`. Unknown keys are errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..model.checkpoint import resolve_source
from ..quant.config import QuantConfig
from .data import FREE
from .protocols import PROTOCOLS
from .speed import SpeedProtocol
from .sweep import Failure, Note, Progress, SweepResult, plan_configs, run_sweep
from .tasks import TaskError, TaskRequest

METRICS = (
    "text",
    "protocol",
    "windows",
    "length",
    "stride",
    "bos",
    "batch",
    "dtype",
    "device",
    "speed",
    "seed",
    "batches",
    "contexts",
    "tasks",
)


class SpecError(ValueError):
    """A file that does not describe a sweep."""


@dataclass(frozen=True)
class SweepSpec:
    """What a file says: see the module's text. ``metrics`` are the arguments of ``make_setting``, one a measurement."""

    models: tuple[str, ...]
    configs: dict[str, QuantConfig]
    metrics: tuple[dict[str, Any], ...]
    calibration: dict[str, Any]

    @property
    def cells(self) -> int:
        """Rows in all, the sources' own included."""
        return len(self.models) * (len(self.configs) + 1) * len(self.metrics)


def load_spec(path: str | Path) -> SweepSpec:
    """Read a sweep's file; every configuration in it is read before anything runs.

    Raises:
        SpecError: not YAML, an unknown key, a missing part, or one of another type.
        ConfigError: a configuration that cannot be read.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping):
        raise SpecError(f"{path}: expected a mapping with models, configs and metrics, got {data!r}")
    _known(data, ("models", "configs", "metrics", "calibration"), str(path))
    models, configs = data.get("models"), data.get("configs")
    if models is None or not _strings(models):
        raise SpecError(f"{path}: models must be a list of folders, assets or hub names, got {models!r}")
    if not isinstance(configs, list) or not configs:
        raise SpecError(f"{path}: configs must be a list of presets, files and mappings, got {configs!r}")
    metrics = {} if data.get("metrics") is None else data["metrics"]
    entries = metrics if isinstance(metrics, list) else [metrics]
    if double := sorted({model for model in models if models.count(model) > 1}):
        raise SpecError(f"{path}: the model {double[0]} is named twice")
    plan: dict[str, QuantConfig] = {}
    for entry in configs:
        name, config = _config(entry, path)
        if name in plan:
            raise SpecError(f"{path}: two configurations are named {name}")
        plan[name] = config
    if not entries:
        raise SpecError(f"{path}: metrics must be a mapping or a list of mappings, got an empty list")
    return SweepSpec(
        tuple(models),
        plan_configs(plan),
        tuple(_metrics(e, path) for e in entries),
        _calibration({} if data.get("calibration") is None else data["calibration"], path),
    )


def run_spec(
    spec: SweepSpec,
    out: str | Path,
    *,
    resolve: Callable[[str], str] = str,
    checkpoints: str | Path | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
    **options: Any,
) -> SweepResult:
    """Run what is missing of ``spec``; ``options`` are those of :func:`brise.eval.sweep.run_sweep`.

    Args:
        resolve: makes of a model's name what ``run_sweep`` takes (an asset's folder).
    """
    store = Path(out) if checkpoints is None else Path(checkpoints)
    rows, skipped, failures, problems = [], [], [], []
    sources = {model: resolve(model) for model in spec.models}
    for source in sources.values():  # every model is found before the first is worked on
        resolve_source(source)
    runs = [(model, how) for model in spec.models for how in spec.metrics]
    for number, (model, how) in enumerate(runs, 1):
        if note is not None and len(runs) > 1:
            note(f"part {number} of {len(runs)}: {model}")
        try:
            result = run_sweep(
                sources[model],
                spec.configs,
                out,
                checkpoints=store if len(spec.models) == 1 else store / _place(model, spec.models),
                calibration_windows=spec.calibration.get("windows"),
                calibration_text=spec.calibration.get("text"),
                calibrate_once=spec.calibration.get("once", False),
                draws=spec.calibration.get("draws", 0),
                progress=progress,
                note=note,
                **how,
                **options,
            )
        except Exception as error:  # as with a cell: the other parts go on, and this one is reported
            if len(runs) == 1:
                raise
            failures.append(Failure(f"part {number} ({model})", error))
            if note is not None:
                note(f"{failures[-1]}")
            continue
        rows += result.rows
        skipped += result.skipped
        failures += result.failures
        problems = result.problems
    return SweepResult(rows, skipped, failures, problems)


def _place(model: str, models: tuple[str, ...]) -> str:
    """A folder's name for each model: checkpoints of several would lie on top of one another."""
    names = [Path(other).name for other in models]
    own = Path(model).name
    return own if names.count(own) == 1 else f"{own}-{models.index(model) + 1}"


def _config(entry: Any, path: Path) -> tuple[str, QuantConfig]:
    if isinstance(entry, Mapping):
        rest = dict(entry)
        name = rest.pop("name", None)
        if not isinstance(name, str):
            raise SpecError(f"{path}: a configuration written out needs a name, got {entry!r}")
        if "preset" in rest:
            _known(rest, ("preset",), f"{path}: configs: {name}")
            return name, QuantConfig.load(rest["preset"])
        return name, QuantConfig.from_dict(rest)
    if not isinstance(entry, str):
        raise SpecError(f"{path}: expected a preset, a file or a mapping, got {entry!r}")
    beside = path.parent / entry
    if beside.suffix and beside.is_file():
        return beside.stem, QuantConfig.load(beside)
    return Path(entry).stem if Path(entry).suffix else entry, QuantConfig.load(entry)


def _metrics(entry: Any, path: Path) -> dict[str, Any]:
    import torch

    if not isinstance(entry, Mapping):
        raise SpecError(f"{path}: metrics must be a mapping or a list of mappings, got {entry!r}")
    _known(entry, METRICS, f"{path}: metrics")
    out = dict(entry)
    where = f"{path}: metrics"
    for name in ("text", "protocol", "bos", "device"):
        _check(out, name, str, "a text", where)
    _check(out, "windows", int, "a whole number of at least 0", where, 0)
    _check(out, "seed", int, "a whole number of at least 0", where, 0)
    for name in ("length", "stride", "batch"):
        _check(out, name, int, "a whole number of at least 1", where, 1)
    if out.get("protocol", FREE) != FREE and out["protocol"] not in PROTOCOLS:
        raise SpecError(
            f"{where}: protocol must be {FREE} or one of {', '.join(PROTOCOLS)}, got {out['protocol']!r}"
        )
    speed = out.get("speed", False)
    if isinstance(speed, Mapping):
        try:
            out["speed"] = SpeedProtocol(**speed)
        except (TypeError, ValueError) as error:
            raise SpecError(f"{path}: speed: {error}") from error
    elif isinstance(speed, bool):
        out["speed"] = SpeedProtocol() if speed else None
    else:
        raise SpecError(f"{path}: speed must be true, false or a mapping, got {speed!r}")
    if "dtype" in out:
        dtype = getattr(torch, str(out["dtype"]), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise SpecError(f"{path}: unknown dtype {out['dtype']!r}")
        out["dtype"] = dtype
    if out.get("protocol", FREE) != FREE or out.get("windows") == 0:
        # as on the command line: 0 is the whole text, and so is a named protocol without a number
        out["windows"] = out.get("windows") or None
    for name in ("tasks", "batches", "contexts"):
        if name in out and not isinstance(out[name], list):
            raise SpecError(f"{path}: {name} must be a list, got {out[name]!r}")
    for name in ("batches", "contexts"):
        for number in out.get(name, ()):
            _check({name: number}, name, int, "whole numbers of at least 1", where, 1)
    if bool(out.get("batches")) != bool(out.get("contexts")):
        raise SpecError(f"{where}: batches and contexts make a grid of speeds together: give both or neither")
    for task in out.get("tasks", ()):
        try:
            TaskRequest.parse(task if isinstance(task, str) else str(task))
        except TaskError as error:
            raise SpecError(f"{where}: {error}") from error
    return out


def _calibration(entry: Any, path: Path) -> dict[str, Any]:
    where = f"{path}: calibration"
    _known(entry, ("windows", "text", "once", "draws"), where)
    _check(entry, "windows", int, "a whole number of at least 1", where, 1)
    _check(entry, "text", str, "a text", where)
    _check(entry, "once", bool, "true or false", where)
    _check(entry, "draws", int, "a whole number of at least 0", where, 0)
    return dict(entry)


def _check(
    entry: Mapping[str, Any], name: str, kind: type, words: str, where: str, least: int | None = None
) -> None:
    """Raise SpecError where ``name`` is in ``entry`` with a value of another type, or one below ``least``."""
    if name not in entry:
        return
    value = entry[name]
    # true and false are whole numbers to Python
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits or (least is not None and value < least):
        raise SpecError(f"{where}: {name} must be {words}, got {value!r}")


def _known(data: Any, allowed: tuple[str, ...], where: str) -> None:
    if not isinstance(data, Mapping):
        raise SpecError(f"{where}: expected a mapping, got {data!r}")
    if unknown := sorted(set(map(str, data)) - set(allowed)):
        raise SpecError(f"{where}: unknown key {unknown[0]}; known: {', '.join(allowed)}")


def _strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
