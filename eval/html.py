"""One page of HTML that holds everything: rows, code, styles and plotly itself. It needs no network and no server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bootstrap import Interval
from .plot import error_of
from .plot_layers import by_layer, of_outputs
from .record import Row

PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Field:
    """A column of the page's table, and an axis of its picture.

    Attributes:
        digits: behind the point. better: ``low``, ``high`` or neither.
        get: (value, least, most) of a row, given its source's.
    """

    key: str
    label: str
    digits: int
    better: str | None
    get: Callable[[Row, Row | None], Any]


def _flat(value: float | None, error: float | None = None, scale: float = 1.0) -> Any:
    if value is None:
        return None
    if error is None:
        return (value * scale, None, None)
    return (value * scale, (value - error) * scale, (value + error) * scale)


def _range(interval: Interval | None, scale: float = 1.0) -> Any:
    if interval is None:
        return None
    ends = (None if end is None else end * scale for end in (interval.low, interval.high))
    return (interval.value * scale, *ends)


def _details(name: str, scale: float = 1.0) -> Callable[[Row, Row | None], Any]:
    def get(row: Row, source: Row | None) -> Any:
        details = None if row.divergence is None else row.divergence.details
        return None if details is None else _range(getattr(details, name), scale)

    return get


def _kl(row: Row, source: Row | None) -> Any:
    return None if row.divergence is None else _flat(row.divergence.kl, row.divergence.kl_stderr)


def _top1(row: Row, source: Row | None) -> Any:
    return None if row.divergence is None else _flat(row.divergence.top1, row.divergence.top1_stderr, 100)


def _relative(row: Row, source: Row | None) -> Any:
    return None if row.relative is None else _flat(row.relative.value, row.relative.stderr, 100)


def _rate(name: str) -> Callable[[Row, Row | None], Any]:
    def get(row: Row, source: Row | None) -> Any:
        if row.speed is None:
            return None
        rate = getattr(row.speed, name)
        return (rate.median, rate.p20, rate.p80)

    return get


def _peak(name: str) -> Callable[[Row, Row | None], Any]:
    return lambda row, source: None if row.peaks is None else _flat(getattr(row.peaks, name), None, 1e-6)


FIELDS: tuple[Field, ...] = (
    Field("size", "size, MB", 1, "low", lambda r, s: _flat(r.memory.bytes, None, 1e-6)),
    Field("bits", "bits/weight", 2, "low", lambda r, s: _flat(r.memory.bits_per_weight)),
    Field("ppl", "perplexity", 3, "low", lambda r, s: _flat(r.perplexity.value, error_of(r, s))),
    Field("word", "word perplexity", 3, "low", lambda r, s: r.words and _flat(r.words.value, r.words.stderr)),
    Field("rel", "against source, %", 2, "low", _relative),
    Field("kl", "KL, nats", 4, "low", _kl),
    Field("median", "KL median", 4, "low", _details("median")),
    Field("p99", "KL p99", 3, "low", _details("p99")),
    Field("p999", "KL p99.9", 3, "low", _details("p999")),
    Field("top1", "same first, %", 2, "high", _top1),
    Field("top5", "same five, %", 2, "high", _details("top5", 100)),
    Field("true", "true token, %", 3, "high", _details("true_token", 100)),
    Field("prefill", "prefill, tokens/s", 1, "high", _rate("prefill")),
    Field("decode", "decode, tokens/s", 1, "high", _rate("decode")),
    Field("load", "peak at load, MB", 0, "low", _peak("load")),
    Field("peak_prefill", "peak at prefill, MB", 0, "low", _peak("prefill")),
    Field("peak_decode", "peak at decode, MB", 0, "low", _peak("decode")),
    Field("kv", "KV cache, MB", 2, "low", lambda r, s: _flat(r.memory.kv_cache, None, 1e-6)),
    Field("made", "made in, s", 0, "low", lambda r, s: _flat(r.quantize_seconds)),
)


def write_page(groups: Sequence[tuple[str, Sequence[Row]]], path: Path) -> Path:
    """Write the page of groups of comparable rows, each with its title.

    Raises:
        ImportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('the page needs plotly: pip install "brise[report]"') from error
    data = {"groups": [group_data(title, rows) for title, rows in groups]}
    # "</script>" in a name must not end the script that holds it
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = (PAGE / "page.html").read_text()
    parts = {
        "/*STYLE*/": (PAGE / "page.css").read_text(),
        "/*PLOTLY*/": get_plotlyjs(),
        "/*DATA*/": text,
        "/*CODE*/": (PAGE / "page.js").read_text(),
    }
    for mark, content in parts.items():
        before, _, after = page.partition(mark)
        page = before + content + after
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def group_data(title: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What the page knows of a group: its columns and its rows, as JSON has them."""
    source = next((row for row in rows if row.is_source), None)
    tasks = sorted({name for row in rows for name in row.tasks or {}})
    fields = [*FIELDS, *(_task_field(name) for name in tasks)]
    table = [{field.key: field.get(row, source) for field in fields} for row in rows]
    shown = [field for field in fields if any(row[field.key] is not None for row in table)]
    return {
        "title": title,
        "fields": [{"key": f.key, "label": f.label, "digits": f.digits, "better": f.better} for f in shown],
        "rows": [_row(row, figures, shown) for row, figures in zip(rows, table)],
    }


def _task_field(name: str) -> Field:
    def get(row: Row, source: Row | None) -> Any:
        score = (row.tasks or {}).get(name)
        return None if score is None else _flat(score.value, score.stderr, 100)

    return Field(f"task:{name}", f"{name}, %", 1, "high", get)


def _row(row: Row, figures: dict[str, Any], fields: Sequence[Field]) -> dict[str, Any]:
    calibration = (row.config or {}).get("calibration")
    return {
        "name": row.name,
        "source": row.is_source,
        "formats": sorted(row.formats) or ["source" if row.is_source else "other"],
        "algorithms": sorted(row.algorithms) or ["source" if row.is_source else "other"],
        "figures": {f.key: figures[f.key] for f in fields},
        "calibration": None
        if not calibration
        else ", ".join(f"{k} {Path(str(v)).name}" for k, v in calibration.items()),
        "layers": None if not row.layers else list(by_layer(row.layers).items()),
        "outputs": of_outputs(row.layers or ()),
        "sums": None
        if row.sums is None
        else {"tokens": row.sums.tokens, "nll": row.sums.nll, "kl": row.sums.kl},
        "where": f"{row.provenance.device}, {row.provenance.threads} threads, commit "
        f"{(row.provenance.commit or 'unknown')[:18]}, {row.provenance.time}",
        "command": row.provenance.command,
    }
