"""Rows to Markdown tables, and a picture of perplexity against memory.

Figures under different protocols, or against different sources, never stand in one table or picture.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bootstrap import Interval
from .data import FREE
from .draws import spread_over_draws
from .html import write_page
from .memory import human_bytes
from .plot import QUANTITIES, plot_group
from .plot_layers import plot_layers
from .record import EXACT, ROWS, Row, read_rows
from .speed import Rate

TABLE = "table.md"
PAGE = "report.html"
PICTURE = "memory-{}"
LAYERS = "error-by-layer"
NOTHING = "–"


class ReportError(ValueError):
    """There is nothing to report."""


@dataclass(frozen=True)
class Group:
    """Rows that may be compared: one protocol, one source; the source's own row first, then by size."""

    rows: tuple[Row, ...]

    @property
    def source(self) -> Row | None:
        """The source's own row, where it was measured."""
        return self.rows[0] if self.rows[0].is_source else None


@dataclass(frozen=True)
class Report:
    """Files written, and what of the rows was left out."""

    files: list[Path]
    problems: list[str]


def write_report(folder: str | Path) -> Report:
    """Write ``table.md``, the pictures (SVG and PNG) and ``report.html`` of the rows in ``folder/runs.jsonl``.

    A picture is drawn of what two rows or more have; the page is left out, and said to be, without plotly.

    Raises:
        ReportError: there are no rows.
        RecordError: the file holds something else than rows.
        ImportError: matplotlib is not installed.
    """
    folder = Path(folder)
    rows, problems = read_rows(folder / ROWS)
    if not rows:
        raise ReportError(f"expected rows in {folder / ROWS}, found none; run a sweep or an evaluation first")
    groups = group_rows(rows)
    table = folder / TABLE
    table.write_text("\n".join(markdown(group) for group in groups))
    files = [table]
    for number, group in enumerate(groups, 1):
        suffix = "" if len(groups) == 1 else f"-{number}"
        for quantity in QUANTITIES:
            measured = [row for row in group.rows if quantity.value(row) is not None]
            if quantity.reference or len(measured) > 1:
                path = folder / f"{PICTURE.format(quantity.name)}{suffix}"
                files += plot_group(group.rows, group.source, path, title(group), quantity)
        if any(row.layers for row in group.rows):
            files += plot_layers(group.rows, folder / f"{LAYERS}{suffix}", title(group))
    if importlib.util.find_spec("plotly") is None:
        problems.append('report.html was left out: it needs plotly (pip install "brise[report]")')
    else:
        files.append(write_page([(title(group), group.rows) for group in groups], folder / PAGE))
    return Report(files, problems)


def group_rows(rows: Sequence[Row]) -> list[Group]:
    """Rows by protocol and source, in the order in which the groups begin. Of equal keys the last counts."""
    latest = {row.key: row for row in rows}
    groups: dict[str, list[Row]] = {}
    for row in latest.values():
        source = (row.baseline or row.model).sha256
        key = json.dumps([row.protocol.identity(), source], sort_keys=True)
        groups.setdefault(key, []).append(row)
    return [Group(tuple(sorted(group, key=_order))) for group in groups.values()]


def _order(row: Row) -> tuple[bool, int, float, str]:
    return (not row.is_source, -row.memory.bytes, row.perplexity.value, row.name)


# heading, whether it is a number, text of a row given the source's
Column = tuple[str, bool, Callable[[Row, Row | None], str]]
COLUMNS: tuple[Column, ...] = (
    ("configuration", False, lambda r, s: f"**{plain(r.name)}**" if r.is_source else plain(r.name)),
    ("calibration", False, lambda r, s: calibration(r)),
    ("size, MB", True, lambda r, s: f"{r.memory.bytes / 1e6:.1f}"),
    ("of source", True, lambda r, s: NOTHING if s is None else f"{r.memory.bytes / s.memory.bytes:.1%}"),
    ("bits/weight", True, lambda r, s: f"{r.memory.bits_per_weight:.2f}"),
    ("perplexity", True, lambda r, s: pm(r.perplexity.value, r.perplexity.stderr, 2)),
    (
        "perplexity by the word",
        True,
        lambda r, s: NOTHING if r.words is None else pm(r.words.value, r.words.stderr, 2),
    ),
    (
        "against source, %",
        True,
        lambda r, s: NOTHING if r.relative is None else pm(r.relative.value, r.relative.stderr, 1, 100, "+"),
    ),
    (
        "KL, nats/token",
        True,
        lambda r, s: NOTHING if r.divergence is None else pm(r.divergence.kl, r.divergence.kl_stderr, 4),
    ),
    (
        "same first choice, %",
        True,
        lambda r, s: (
            NOTHING if r.divergence is None else pm(r.divergence.top1, r.divergence.top1_stderr, 1, 100)
        ),
    ),
    (
        "KL p99",
        True,
        lambda r, s: (
            NOTHING
            if r.divergence is None or r.divergence.details is None
            else interval(r.divergence.details.p99, 3)
        ),
    ),
    ("tasks", False, lambda r, s: task_text(r)),
    ("KV cache, MB", True, lambda r, s: NOTHING if r.variant is None else f"{r.variant.kv_bytes / 1e6:.2f}"),
    ("prefill, tokens/s", True, lambda r, s: NOTHING if r.speed is None else spread(r.speed.prefill)),
    ("decode, tokens/s", True, lambda r, s: NOTHING if r.speed is None else spread(r.speed.decode)),
    ("made in, s", True, lambda r, s: NOTHING if r.quantize_seconds is None else f"{r.quantize_seconds:.0f}"),
)


def markdown(group: Group) -> str:
    """One table, with a heading that says the protocol and notes that say how to read it.

    A column in which nothing was measured is left out; a single figure that was not is a dash.
    """
    columns = [
        (heading, number, [text(row, group.source) for row in group.rows])
        for heading, number, text in COLUMNS
    ]
    columns = [column for column in columns if set(column[2]) != {NOTHING}]
    lines = [f"### {plain(title(group))}", ""]
    lines.append("| " + " | ".join(heading for heading, _, _ in columns) + " |")
    lines.append("|" + "|".join("--:" if number else ":--" for _, number, _ in columns) + "|")
    for index in range(len(group.rows)):
        lines.append("| " + " | ".join(cells[index] for _, _, cells in columns) + " |")
    return "\n".join([*lines, "", *notes(group), "", *speeds_table(group)])


def speeds_table(group: Group) -> Iterator[str]:
    """Speed by batch and context and the bandwidth that decoding reached, in a table of its own; nothing without."""
    if not any(row.speeds for row in group.rows):
        return
    yield "| configuration | batch | context | prefill, tokens/s | decode, tokens/s | read in decoding, GB/s |"
    yield "|:--|--:|--:|--:|--:|--:|"
    for row in group.rows:
        for point in row.speeds or ():
            rates = f"{spread(point.prefill)} | {spread(point.decode)}"
            yield f"| {plain(row.name)} | {point.batch} | {point.context} | {rates} | {point.bandwidth / 1e9:.2f} |"
    yield ""


def title(group: Group) -> str:
    p = group.rows[0].protocol
    model = group.rows[0].baseline or group.rows[0].model
    stride = "" if p.stride >= p.length - 1 else f", stride {p.stride}"
    name = "" if p.name == FREE else f", {p.name}"
    kept = "" if p.baseline == EXACT else f", baseline in {p.baseline}"
    return (
        f"{model.name} on {p.text}{name}: {p.windows} windows of {p.length} tokens{stride}, {p.dtype}{kept}"
    )


def notes(group: Group) -> Iterator[str]:
    """What the reader has to know, one item a line."""
    first = group.rows[0]
    p, memory = first.protocol, first.memory
    note = (first.baseline or first.model).note
    if note is not None:
        yield f"- The source is {plain(note)}."
    yield (
        f"- ± is one standard error over the {p.windows} windows ({p.scored_tokens} scored tokens); the one "
        "against the source is paired over the same windows, so it is the one to compare methods by."
    )
    yield "- Size and bits/weight count every stored tensor: codes, scales, zeros, embedding, head, norms."
    yield (
        f"- The KV cache of {memory.kv_length} tokens adds {human_bytes(memory.kv_cache)} "
        f"to each, in {p.dtype}."
    )
    for drawn in spread_over_draws(group.rows):
        yield f"- {plain(drawn.in_words())}."
    if any(((row.config or {}).get("calibration") or {}).get("hessians") == "once" for row in group.rows):
        yield (
            '- "once" beside a calibration: all Hessians from one pass over the unquantized model, an approximation of '
            "the sequential GPTQ that stands beside it."
        )
    if p.speed is not None:
        yield (
            f"- Speed: prompt of {p.speed.prompt} tokens, then {p.speed.new_tokens} tokens, "
            f"batch {p.speed.batch}; median (20th to 80th percentile) of {p.speed.repeats} runs."
        )
    yield from _machines(group)
    yield (
        f"- Text sha256 `{p.text_sha256[:16]}`, windows `{p.tokens_sha256[:16]}`, "
        f"metrics version {first.metrics}."
    )


def _machines(group: Group) -> Iterator[str]:
    """Where the rows were measured: a line, or one for each machine, number of threads and version of torch."""
    found: dict[str, list[str]] = {}
    for row in group.rows:
        where = row.provenance
        cpu = row.protocol.device == "cpu"
        threads = f", {where.threads} thread{'s' * (where.threads > 1)}" if cpu else ""
        text = f"{plain(where.device)}{threads}, torch {where.versions.get('torch', '?')}"
        found.setdefault(text, []).append(plain(row.name))
    if len(found) == 1:
        yield f"- Measured on {next(iter(found))}."
        return
    for text, names in found.items():
        few = f" ({', '.join(names)})" if len(names) <= 3 else ""
        yield f"- {len(names)} row{'s' * (len(names) > 1)} measured on {text}{few}."
    if any(row.speed is not None or row.speeds for row in group.rows):
        yield "- Compare no speeds, peaks of memory or times of making between these."


def calibration(row: Row) -> str:
    """``16 x 1024 of boolq``, or a dash for a row without calibration."""
    data: dict[str, Any] | None = (row.config or {}).get("calibration")
    if not data or not row.calibrated:
        return NOTHING
    once = ", once" if data.get("hessians") == "once" else ""
    seed = "" if data.get("seed") is None else f", seed {data['seed']}"
    return plain(f"{data['windows']} × {data['length']} of {Path(str(data['text'])).name}{once}{seed}")


def task_text(row: Row) -> str:
    """``arc_easy_offline:200 0.500 ± 0.035; …``, or a dash."""
    found = [f"{plain(name)} {pm(score.value, score.stderr, 3)}" for name, score in (row.tasks or {}).items()]
    return "; ".join(found) or NOTHING


def plain(text: str) -> str:
    """``text`` as Markdown that shows it as it is: a name with a bar in it is no cell more, and none is a tag."""
    return re.sub(
        r"[\\`*|<>\[\]]|(?<![^\W_])_|_(?![^\W_])", lambda found: "\\" + found[0], " ".join(text.split())
    )


def interval(value: Interval, digits: int) -> str:
    """``1.234 (1.100–1.400)``; the value alone where there is no interval."""
    text = f"{value.value:.{digits}f}"
    if value.low is None or value.high is None:
        return text
    return f"{text} ({value.low:.{digits}f}–{value.high:.{digits}f})"


def pm(value: float, stderr: float | None, digits: int, scale: float = 1.0, sign: str = "") -> str:
    """``12.34 ± 0.56``; without the error where it was not measured."""
    text = f"{value * scale:{sign}.{digits}f}"
    return text if stderr is None else f"{text} ± {stderr * scale:.{digits}f}"


def spread(rate: Rate) -> str:
    """``120 (115–124)``."""
    digits = 1 if rate.median < 100 else 0
    return f"{rate.median:.{digits}f} ({rate.p20:.{digits}f}–{rate.p80:.{digits}f})"
