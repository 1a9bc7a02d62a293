"""The pictures: a quantity against memory, every point labelled, no label on another, and the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from .record import Row

# Okabe and Ito's colours, told apart by colour-blind readers too; the marker says the same
STYLES = {
    "source": ("#000000", "*", "source"),
    "rtn": ("#0072B2", "o", "rounding"),
    "gptq": ("#D55E00", "D", "GPTQ"),
    "other": ("#009E73", "s", "other"),
}


FRONT = "Pareto front"
# a perplexity of so many times the least is a model that is lost: at its true height it would squeeze all others
_LOST = 20.0
# the names of more rows than this need a larger picture
_MANY = 14


class Box(NamedTuple):
    """A rectangle in pixels."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Quantity:
    """What is drawn against memory.

    Attributes:
        name: in the file's name. label: of the axis.
        value: of a row, None where it was not measured. bar: how far its error reaches down and up.
        less_is_better: decides the Pareto front.
        reference: whether the source's height is a line, with a scale of per cent above it, and what is far above all
            stands at the upper edge with its figure beside it.
    """

    name: str
    label: str
    value: Callable[[Row], float | None]
    bar: Callable[[Row, Row | None], tuple[float, float]]
    less_is_better: bool = True
    reference: bool = False


def error_of(row: Row, source: Row | None) -> float | None:
    """One standard error of the perplexity's ratio to the source's, paired over the windows, times the source's
    perplexity: the error by which methods are told apart. A row without a source has its own.
    """
    if row.relative is not None and source is not None:
        paired = row.relative.stderr
        return None if paired is None else paired * source.perplexity.value
    return None if row is source else row.perplexity.stderr


def _perplexity_bar(row: Row, source: Row | None) -> tuple[float, float]:
    error = error_of(row, source) or 0.0
    return error, error


def _kl_bar(row: Row, source: Row | None) -> tuple[float, float]:
    error = row.divergence.kl_stderr or 0.0 if row.divergence is not None else 0.0
    return error, error


def _speed_bar(row: Row, source: Row | None) -> tuple[float, float]:
    if row.speed is None:
        return 0.0, 0.0
    rate = row.speed.decode
    return rate.median - rate.p20, rate.p80 - rate.median


PERPLEXITY = Quantity(
    "perplexity",
    "perplexity (lower is better)",
    lambda r: r.perplexity.value,
    _perplexity_bar,
    reference=True,
)
QUANTITIES = (
    PERPLEXITY,
    Quantity(
        "kl",
        "KL to the source, nats a token (lower is better)",
        lambda r: None if r.divergence is None else r.divergence.kl,
        _kl_bar,
    ),
    Quantity(
        "speed",
        "decode, tokens a second (higher is better)",
        lambda r: None if r.speed is None else r.speed.decode.median,
        _speed_bar,
        less_is_better=False,
    ),
)


def front(points: Sequence[tuple[float, float]], less_is_better: bool = True) -> list[int]:
    """Indices of the points (memory, quantity) that no other beats in one and equals in the other, by memory.

    Of equal points the first counts.
    """
    sign = 1.0 if less_is_better else -1.0
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1], i))
    kept: list[int] = []
    best = float("inf")
    for index in order:
        if sign * points[index][1] < best:
            best = sign * points[index][1]
            kept.append(index)
    return kept


def plot_group(
    rows: Sequence[Row], source: Row | None, path: Path, title: str, quantity: Quantity = PERPLEXITY
) -> list[Path]:
    """Draw rows of one protocol to ``path`` with the suffixes .svg and .png, and return the two files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "brise[demo]"') from error

    style: Any = {
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "brise",  # equal rows give equal files
        "text.parse_math": False,  # a $ in a name is a $
    }
    with matplotlib.rc_context(style):
        size = (8, 5) if len(rows) <= _MANY else (10, 8)
        figure = Figure(figsize=size, dpi=160, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw(axes, rows, source, quantity)
        axes.set_title(title, loc="left", fontsize=10, color="#333333")
        _label(figure, axes, rows, quantity)
        files = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
        figure.savefig(files[0], metadata={"Date": None})
        figure.savefig(files[1])
    return files


def kind_of(row: Row) -> str:
    """A key of :data:`STYLES`."""
    if row.is_source:
        return "source"
    if "gptq" in row.algorithms:
        return "gptq"
    return "rtn" if row.algorithms == {"rtn"} else "other"


def _draw(axes: Any, rows: Sequence[Row], source: Row | None, quantity: Quantity = PERPLEXITY) -> None:
    rows = [row for row in rows if quantity.value(row) is not None]
    edge = _edge(rows, quantity)
    heights = {row.key: min(_height(row, quantity), edge) for row in rows}
    points = [(row.memory.bytes / 1e6, heights[row.key]) for row in rows]
    x, y = ([point[i] for point in points] for i in (0, 1))
    if max(x) > 2.5 * min(x):
        axes.set_xscale("log")
    if min(y) > 0 and max(y) > 4 * min(y):
        axes.set_yscale("log")
    _plain_ticks(axes.xaxis, x)
    _plain_ticks(axes.yaxis, y)
    if source is not None and quantity.reference:
        height = _height(source, quantity)
        axes.axhline(height, color="#999999", linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    for kind, (color, marker, label) in STYLES.items():
        chosen = [row for row in rows if kind_of(row) == kind]
        if not chosen:
            continue
        axes.errorbar(
            [row.memory.bytes / 1e6 for row in chosen],
            [heights[row.key] for row in chosen],
            yerr=list(zip(*(_bar(row, source, quantity, edge) for row in chosen))),
            linestyle="none",
            marker=marker,
            markersize=11 if kind == "source" else 6.5,
            color=color,
            ecolor=color,
            elinewidth=1.2,
            capsize=3,
            markeredgecolor="white",
            markeredgewidth=0.8,
            label=label,
            zorder=3,
        )
    best = [points[i] for i in front(points, quantity.less_is_better)]
    if len(best) > 1:
        axes.plot(*zip(*best), color="#bbbbbb", linewidth=1.2, zorder=2, label=FRONT)
    axes.margins(x=0.12, y=0.12)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("size of the checkpoint, MB (everything counted)")
    axes.set_ylabel(quantity.label)
    if source is not None and quantity.reference:
        _percent_axis(axes, _height(source, quantity), y)
    axes.legend(frameon=False, loc="best", fontsize=9)


def _height(row: Row, quantity: Quantity) -> float:
    value = quantity.value(row)
    assert value is not None
    return value


def _edge(rows: Sequence[Row], quantity: Quantity) -> float:
    """The height at which those stand that are far above the others; infinite where there are none."""
    values = [_height(row, quantity) for row in rows]
    near = [value for value in values if value <= _LOST * min(values)]
    return 1.5 * max(near) if quantity.reference and len(near) < len(values) else float("inf")


def _bar(row: Row, source: Row | None, quantity: Quantity, edge: float) -> tuple[float, float]:
    return (0.0, 0.0) if _height(row, quantity) > edge else quantity.bar(row, source)


def _plain_ticks(axis: Any, values: Sequence[float], form: str = "{:g}") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if axis.get_scale() in ("log", "functionlog"):
        # over many powers of ten fewer figures between them, or they run into one another
        wide = max(values) > 300 * min(values)
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if wide else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))


def _percent_axis(axes: Any, reference: float, heights: Sequence[float]) -> None:
    """The same ``heights`` on the right, against the source: per cent above it, or as its multiple on a log scale."""
    from matplotlib.ticker import FuncFormatter

    right = axes.secondary_yaxis(
        "right", functions=(lambda y: y / reference, lambda ratio: ratio * reference)
    )
    if axes.get_yscale() == "log":
        # per cent above the source have no logarithm at the source
        _plain_ticks(right.yaxis, heights, "× {:g}")
    else:
        right.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{(ratio - 1) * 100:+.3g}%"))
    right.set_ylabel("against the source")


def _label(figure: Any, axes: Any, rows: Sequence[Row], quantity: Quantity = PERPLEXITY) -> None:
    """Write each row's name beside its point, where it covers no point, bar or other name.

    Places around a point are tried from near to far; the first that is free is taken, and a name that is not
    right beside its point gets a thin line. Where no place is free the least covered one is taken.
    """
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    rows = [row for row in rows if quantity.value(row) is not None]
    scale = figure.dpi / 72
    frame = _box(axes.get_window_extent(renderer))
    edge = _edge(rows, quantity)
    heights = [min(_height(row, quantity), edge) for row in rows]
    points = [axes.transData.transform((row.memory.bytes / 1e6, y)) for row, y in zip(rows, heights)]
    taken = [Box(x - 7 * scale, y - 7 * scale, x + 7 * scale, y + 7 * scale) for x, y in points]
    for container in axes.containers:
        for segment in (s for bars in container.lines[2] for s in bars.get_segments()):
            below, above = axes.transData.transform(segment)
            taken += _stroke(below, above, width=3 * scale)
    for line in axes.lines:
        if line.get_label() == FRONT:
            corners = axes.transData.transform(line.get_xydata())
            taken += [box for a, b in pairwise(corners) for box in _stroke(a, b, width=scale, steps=40)]
    if axes.lines and axes.lines[0].get_linestyle() == "--":  # the source's height: no name is struck through
        height = points[0][1] if rows[0].is_source else frame.y0
        taken.append(Box(frame.x0, height - scale, frame.x1, height + scale))
    legend = axes.get_legend()
    if legend is not None:
        taken.append(_box(legend.get_window_extent(renderer)))
    for row, (x, y) in zip(rows, points):
        value = _height(row, quantity)
        name = row.name if value <= edge else f"{row.name} ↑ {value:.2g}"
        text = axes.annotate(
            name, (x, y), xycoords="figure pixels", fontsize=8.5, color=STYLES[kind_of(row)][0], zorder=4
        )
        size = text.get_window_extent(renderer)
        best, cost = None, float("inf")
        for box, distance in _places(x, y, size.width, size.height, scale):
            covered = sum(_overlap(box, other) for other in taken)
            outside = size.width * size.height - _overlap(box, frame)
            if covered + 10 * max(0.0, outside - 1e-6) + 1e-3 * distance < cost:
                best, cost = (box, distance), covered + 10 * max(0.0, outside - 1e-6) + 1e-3 * distance
        text.remove()
        assert best is not None
        box, distance = best
        taken.append(Box(box.x0 - 3 * scale, box.y0, box.x1 + 3 * scale, box.y1))  # two names are two words
        inverse = axes.transData.inverted()
        axes.annotate(
            name,
            xy=inverse.transform((x, y)),
            xytext=inverse.transform((box.x0, (box.y0 + box.y1) / 2)),
            va="center",
            fontsize=8.5,
            color=STYLES[kind_of(row)][0],
            zorder=4,
            arrowprops=None
            if distance < 16 * scale
            else {"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5},
        )


def _stroke(a: Any, b: Any, width: float, steps: int = 1) -> list[Box]:
    """Boxes that cover the straight line between two points, in pixels."""
    ends = [(a[0] + (b[0] - a[0]) * i / steps, a[1] + (b[1] - a[1]) * i / steps) for i in range(steps + 1)]
    half = width / 2
    return [
        Box(min(p[0], q[0]) - half, min(p[1], q[1]) - half, max(p[0], q[0]) + half, max(p[1], q[1]) + half)
        for p, q in pairwise(ends)
    ]


def _box(extent: Any) -> Box:
    return Box(extent.x0, extent.y0, extent.x1, extent.y1)


def _places(x: float, y: float, width: float, height: float, scale: float) -> list[tuple[Box, float]]:
    """Boxes for a name around a point, in pixels, with their distance, near ones first."""
    from math import cos, pi, sin

    places = []
    for distance in (9, 14, 20, 28, 38, 50, 64):
        for step in range(16):
            angle = 2 * pi * step / 16
            cx = x + (distance * scale + width / 2) * cos(angle)
            cy = y + (distance * scale + height / 2) * sin(angle)
            box = Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            places.append((box, distance * scale))
    return places


def _overlap(a: Any, b: Any) -> float:
    """Area that two boxes share, in square pixels."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0
