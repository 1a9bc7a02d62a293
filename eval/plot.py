"""The picture: perplexity against memory, every point labelled, no label on another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .record import Row

# Okabe and Ito's colours, told apart by colour-blind readers too; the marker says the same
STYLES = {
    "source": ("#000000", "*", "source"),
    "rtn": ("#0072B2", "o", "rounding"),
    "gptq": ("#D55E00", "D", "GPTQ"),
    "other": ("#009E73", "s", "other"),
}


def plot_group(rows: Sequence[Row], source: Row | None, path: Path, title: str) -> list[Path]:
    """Draw rows of one protocol to ``path`` with the suffixes .svg and .png, and return the two files.

    The bars are one standard error of the perplexity's ratio to the source's, paired over the windows, times
    the source's perplexity: the error by which methods are told apart. A row without a source has its own.

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
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 5), dpi=160, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw(axes, rows, source)
        axes.set_title(title, loc="left", fontsize=10, color="#333333")
        _label(figure, axes, rows)
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


def error_of(row: Row, source: Row | None) -> float | None:
    """Half the length of a row's bar: see :func:`plot_group`."""
    if row.relative is not None and source is not None:
        paired = row.relative.stderr
        return None if paired is None else paired * source.perplexity.value
    return None if row is source else row.perplexity.stderr


def _draw(axes: Any, rows: Sequence[Row], source: Row | None) -> None:
    values = [row.perplexity.value for row in rows]
    if max(values) > 4 * min(values):
        axes.set_yscale("log")
    if max(r.memory.bytes for r in rows) > 2.5 * min(r.memory.bytes for r in rows):
        axes.set_xscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    if source is not None:
        axes.axhline(source.perplexity.value, color="#999999", linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    for kind, (color, marker, label) in STYLES.items():
        chosen = [row for row in rows if kind_of(row) == kind]
        if not chosen:
            continue
        axes.errorbar(
            [row.memory.bytes / 1e6 for row in chosen],
            [row.perplexity.value for row in chosen],
            yerr=[error_of(row, source) or 0.0 for row in chosen],
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
    axes.margins(x=0.12, y=0.12)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("size of the checkpoint, MB (everything counted)")
    axes.set_ylabel("perplexity (lower is better)")
    if source is not None:
        _percent_axis(axes, source.perplexity.value)
    axes.legend(frameon=False, loc="best", fontsize=9)


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _percent_axis(axes: Any, reference: float) -> None:
    """The same heights on the right, as per cent above the source."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    right = axes.secondary_yaxis(
        "right", functions=(lambda y: (y / reference - 1) * 100, lambda p: (p / 100 + 1) * reference)
    )
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.3g}%"))
    right.yaxis.set_minor_formatter(NullFormatter())
    right.set_ylabel("against the source")


def _label(figure: Any, axes: Any, rows: Sequence[Row]) -> None:
    """Write each row's name beside its point, where it covers no point, bar or other name.

    Places around a point are tried from near to far; the first that is free is taken, and a name that is not
    right beside its point gets a thin line. Where no place is free the least covered one is taken.
    """
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    from matplotlib.transforms import Bbox

    scale = figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    points = [axes.transData.transform((row.memory.bytes / 1e6, row.perplexity.value)) for row in rows]
    taken = [Bbox.from_extents(x - 7 * scale, y - 7 * scale, x + 7 * scale, y + 7 * scale) for x, y in points]
    for container in axes.containers:
        taken += [line.get_window_extent(renderer) for line in container.lines[2]]
    if axes.lines and axes.lines[0].get_linestyle() == "--":  # the source's height: no name is struck through
        height = points[0][1] if rows[0].is_source else frame.y0
        taken.append(Bbox.from_extents(frame.x0, height - scale, frame.x1, height + scale))
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(renderer))
    for row, (x, y) in zip(rows, points):
        text = axes.annotate(
            row.name, (x, y), xycoords="figure pixels", fontsize=8.5, color=STYLES[kind_of(row)][0], zorder=4
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
        taken.append(box)
        inverse = axes.transData.inverted()
        axes.annotate(
            row.name,
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


def _places(x: float, y: float, width: float, height: float, scale: float) -> list[tuple[Any, float]]:
    """Boxes for a name around a point, in pixels, with their distance, near ones first."""
    from math import cos, pi, sin

    from matplotlib.transforms import Bbox

    places = []
    for distance in (9, 14, 20, 28, 38, 50, 64):
        for step in range(16):
            angle = 2 * pi * step / 16
            cx = x + (distance * scale + width / 2) * cos(angle)
            cy = y + (distance * scale + height / 2) * sin(angle)
            box = Bbox.from_extents(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            places.append((box, distance * scale))
    return places


def _overlap(a: Any, b: Any) -> float:
    """Area that two boxes share, in square pixels."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0
