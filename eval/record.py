"""The row: everything that was measured of one model, under which protocol, and where it comes from.

Rows live in a file of JSON lines. What was not measured is null, never zero.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .compare import WindowSums
from .data import FREE
from .divergence import Divergence
from .memory_peaks import Peaks
from .model_info import ModelInfo
from .perplexity import Perplexity, Relative, WordPerplexity
from .provenance import Provenance
from .speed import Speed, SpeedPoint, SpeedProtocol
from .tasks import TaskScore

# goes up whenever a figure of an older row would come out otherwise today
METRICS_VERSION = 1
ROWS = "runs.jsonl"
EXACT = "exact"
T = TypeVar("T")


class RecordError(ValueError):
    """A line that is no row, or not one that this version reads."""


class NotFiniteError(ValueError):
    """A row with a figure that is infinite or no number, which JSON cannot hold."""


@dataclass(frozen=True)
class Protocol:
    """What was measured how. Figures under different protocols are not to be compared.

    Attributes:
        text, text_sha256, tokens_sha256: the text by name and hash, and the hash of the windows' tokens.
        windows, length, stride, scored_tokens, bos: see :class:`brise.eval.data.Windows`.
        dtype: of the computation; device: its type, cpu or cuda.
        speed: what was timed, or None.
        name: of the rule by which the text was cut and scored (see ``eval.protocols``); ``free`` is none of them.
        baseline: ``exact`` predictions, or ``16-bit`` ones from a file (see ``eval.logprobs``).
    """

    text: str
    text_sha256: str
    tokens_sha256: str
    windows: int
    length: int
    stride: int
    scored_tokens: int
    bos: bool
    dtype: str
    device: str
    speed: SpeedProtocol | None
    name: str = FREE
    baseline: str = EXACT

    def identity(self) -> dict[str, Any]:
        """What makes it another protocol, for keys: fields that came later count where they say something."""
        data = dataclasses.asdict(self)
        return {k: v for k, v in data.items() if (k, v) not in (("name", FREE), ("baseline", EXACT))}


@dataclass(frozen=True)
class Memory:
    """Bytes, and bits per weight.

    Attributes:
        bytes: of all stored tensors; by_kind, by_part: the same by use and by place (see ``eval.memory``).
        parameters, quantized_parameters: numbers of weights.
        bits_per_weight: with everything counted; bits_per_quantized_weight: of the quantized weights alone.
        kv_cache: at ``kv_length`` positions, one text, in the computation's dtype.
        loaded: of parameters and buffers in memory.
        process_peak: main memory of the whole process while it loaded and measured, what it held before
            (a baseline) included; gpu_peak: of tensors on the GPU.
    """

    bytes: int
    by_kind: dict[str, int]
    by_part: dict[str, int]
    parameters: int
    quantized_parameters: int
    bits_per_weight: float
    bits_per_quantized_weight: float | None
    kv_cache: int
    kv_length: int
    loaded: int | None
    process_peak: int | None
    gpu_peak: int | None


@dataclass(frozen=True)
class LayerError:
    """What quantization did to one module: ``quant.apply.Outcome`` has the definitions."""

    path: str
    relative_error: float | None
    output_error: float | None


@dataclass(frozen=True)
class Variant:
    """A model run otherwise than its config says.

    Attributes:
        window: the sliding window; None is the config's own.
        cache: precision in which keys and values are held (see ``eval.surface``).
        kv_bytes: of the cache at the windows' length under both, scales included.
    """

    window: int | None
    cache: str
    kv_bytes: int


@dataclass(frozen=True)
class Row:
    """One model under one protocol.

    Attributes:
        metrics: the version of the metrics, :data:`METRICS_VERSION`.
        key: equal for equal model, configuration, protocol and metrics: such a row is not measured again.
        name: of the configuration.
        model: what was evaluated; baseline: what it was compared with, None for the baseline itself.
        config: the quantization config (rules, calibration), None for a model that is not quantized.
        relative, divergence: against the baseline, None without one.
        quantize_seconds: what making the checkpoint took, where this run made it.

    What came later is None in rows of before, as wherever it was not measured:
        words: perplexity by the word, of protocols that ask for it.
        sums: each window's sums, by which two rows are compared in pairs.
        layers: the error of each quantized module.
        tasks: scores by the task's name.
        peaks: memory at load, prefill and decode.
        speeds: by batch and context.
        variant: what was changed in the model at run time (window, cache precision).
    """

    metrics: int
    key: str
    name: str
    model: ModelInfo
    baseline: ModelInfo | None
    config: dict[str, Any] | None
    protocol: Protocol
    perplexity: Perplexity
    relative: Relative | None
    divergence: Divergence | None
    memory: Memory
    speed: Speed | None
    quantize_seconds: float | None
    provenance: Provenance
    words: WordPerplexity | None = None
    sums: WindowSums | None = None
    layers: list[LayerError] | None = None
    tasks: dict[str, TaskScore] | None = None
    peaks: Peaks | None = None
    speeds: list[SpeedPoint] | None = None
    variant: Variant | None = None

    @property
    def is_source(self) -> bool:
        """Whether the model is not quantized and was compared with nothing."""
        return self.baseline is None and self.config is None and self.variant is None

    @property
    def algorithms(self) -> set[str]:
        """The algorithms that chose the codes of the quantized modules, by name."""
        return _found(self.config, "algorithm")

    @property
    def formats(self) -> set[str]:
        """The formats of the quantized modules, by name."""
        return _found(self.config, "format")

    @property
    def calibrated(self) -> bool:
        """Whether anything was chosen under calibration: codes, or scales alone."""
        return not self.algorithms <= {"rtn"} or "hessian" in _found(self.config, "scale")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Raises RecordError for another metrics version, a missing, unknown or ill-typed field."""
        if data.get("metrics") != METRICS_VERSION:
            raise RecordError(
                f"expected a row of metrics version {METRICS_VERSION}, got {data.get('metrics')!r}"
            )
        return _build(cls, data, "row")


def append_row(path: str | Path, row: Row, *, once: bool = False) -> bool:
    """Append a row to a file of rows and wait until it is on the disk.

    The line goes out in one write, under a lock, so rows of several processes do not mix. A torn last line
    (of a process that was killed while it wrote) is cut off first: half a row is no row.

    Args:
        once: leave it where a row of the same key is there, as when two sweeps work on one folder.

    Returns:
        Whether the row was written.

    Raises:
        NotFiniteError: a figure that JSON cannot hold.
    """
    data = row.to_dict()
    if wrong := next(_not_finite(data, ""), None):
        raise NotFiniteError(f"{row.name} has no finite {wrong}: the row was not written")
    line = (json.dumps(data, allow_nan=False) + "\n").encode()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        whole = _end_of_whole_lines(descriptor, size)
        if whole < size:
            os.ftruncate(descriptor, whole)
        if once and f'"key": "{row.key}"'.encode() in path.read_bytes():
            return False
        written = os.write(descriptor, line)
        if written != len(line):
            os.ftruncate(descriptor, whole)
            raise OSError(
                f"only {written} of {len(line)} bytes could be written to {path}; is the disk full?"
            )
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def read_rows(path: str | Path) -> tuple[list[Row], list[str]]:
    """The rows of a file, and what of it was left out and why (a torn last line, rows of other versions).

    Raises:
        RecordError: a line before the last that is not JSON, or a row that is not whole.
    """
    path = Path(path)
    if not path.is_file():
        return [], []
    rows: list[Row] = []
    problems: list[str] = []
    data = path.read_bytes()
    lines = data.split(b"\n")
    torn = lines.pop()  # what stands behind the last newline
    if torn:
        problems.append(f"{path}: the last line is torn ({len(torn)} bytes) and was left out")
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
        except ValueError as error:
            raise RecordError(f"{path}, line {number}: not JSON ({error})") from error
        if isinstance(content, dict) and content.get("metrics") not in (None, METRICS_VERSION):
            problems.append(f"{path}, line {number}: metrics version {content['metrics']}, left out")
            continue
        try:
            rows.append(Row.from_dict(content))
        except (RecordError, AttributeError) as error:
            raise RecordError(f"{path}, line {number}: {error}") from error
    return rows, problems


def _not_finite(value: Any, where: str) -> Iterator[str]:
    """``name, got value`` of every figure that is infinite or no number."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where[1:]}, got {value}"
    elif isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _not_finite(item, f"{where}.{key}")


def _found(config: Any, key: str) -> set[str]:
    """All values that ``key`` has anywhere in a nested config."""
    if isinstance(config, Mapping):
        own = {str(config[key])} if config.get(key) is not None else set()
        return own.union(*(_found(value, key) for value in config.values()))
    if isinstance(config, list):
        return set().union(*(_found(value, key) for value in config))
    return set()


def _end_of_whole_lines(descriptor: int, size: int) -> int:
    """The offset behind the last newline."""
    end = size
    while end:
        begin = max(0, end - 65536)
        found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _build(cls: type[T], data: Any, where: str) -> T:
    """A dataclass from its dict, strictly: every field there, none left over, each of its declared type."""
    if not isinstance(data, Mapping):
        raise RecordError(f"{where}: expected an object, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(data) - set(hints)):
        raise RecordError(f"{where}: unknown field {unknown[0]}")
    later = {
        f.name for f in dataclasses.fields(typing.cast(Any, cls)) if f.default is not dataclasses.MISSING
    }
    if missing := sorted(set(hints) - set(data) - later):
        raise RecordError(f"{where}: the field {missing[0]} is missing")
    return cls(**{n: _value(hint, data[n], f"{where}.{n}") for n, hint in hints.items() if n in data})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        return _value(next(arg for arg in args if arg is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, where)
    if hint is Any:
        return value
    wanted = origin or hint
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise RecordError(f"{where}: expected {hint}, got {value!r}")
    if origin is list:
        return [_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        return {key: _value(args[1], item, f"{where}.{key}") for key, item in value.items()}
    return value
