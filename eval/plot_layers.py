"""The picture of what quantization did to each layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .record import LayerError, Row

# more lines than this cannot be told apart
_MOST = 8


def by_layer(layers: Sequence[LayerError]) -> dict[int, float]:
    """The layer's number -> the mean error of its modules, in their outputs or in their weights (:func:`of_outputs`).

    Modules that are in no layer (embedding, head) are left out.
    """
    outputs = of_outputs(layers)
    found: dict[int, list[float]] = {}
    for number, error in _in_layers(layers):
        value = error.output_error if outputs else error.relative_error
        if value is not None:
            found.setdefault(number, []).append(value)
    return {number: sum(values) / len(values) for number, values in sorted(found.items())}


def of_outputs(layers: Sequence[LayerError]) -> bool:
    """Whether the error in its outputs is known of every module in a layer: a mean of both kinds would mean nothing."""
    known = [error.output_error is not None for _, error in _in_layers(layers)]
    return bool(known) and all(known)


def _in_layers(layers: Sequence[LayerError]) -> Iterator[tuple[int, LayerError]]:
    for error in layers:
        number = re.search(r"\.(\d+)\.", error.path)
        if number is not None:
            yield int(number[1]), error


def plot_layers(rows: Sequence[Row], path: Path, title: str) -> list[Path]:
    """Draw the rows' errors by layer to ``path`` with the suffixes .svg and .png, and return the two files.

    Of more than eight rows those with the least divergence are drawn, and the title says so.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "brise[report]"') from error

    measured = [row for row in rows if row.layers]
    drawn = sorted(measured, key=lambda r: r.divergence.kl if r.divergence else r.perplexity.value)[:_MOST]
    style: Any = {"font.size": 10, "font.family": "DejaVu Sans", "svg.hashsalt": "brise"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 4.5), dpi=160, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for row in drawn:
            points = by_layer(row.layers or ())
            known = of_outputs(row.layers or ())
            line = "-" if known else (0, (4, 2))
            label = row.name if known else f"{row.name} (weights)"
            axes.plot(
                list(points), list(points.values()), marker=".", linewidth=1.2, linestyle=line, label=label
            )
        axes.set_yscale("log")
        axes.grid(True, color="#e6e6e6", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("layer")
        axes.set_ylabel("relative squared error of outputs (dashed: of weights)")
        best = f" (the {_MOST} nearest to the source of {len(measured)})" if len(measured) > _MOST else ""
        axes.set_title(title + best, loc="left", fontsize=9, color="#333333", parse_math=False)
        legend = axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
        for text in legend.get_texts():
            text.set_parse_math(False)  # a $ in a name is a $
        files = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
        figure.savefig(files[0], metadata={"Date": None})
        figure.savefig(files[1])
    return files
