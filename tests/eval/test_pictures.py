"""What the pictures draw, read off their axes: values, bars, fronts, edges and lines by layer."""

import dataclasses
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from brise.eval.record import LayerError
from brise.eval.speed import Rate, Speed

_spec = spec_from_file_location("made_rows", Path(__file__).with_name("test_report.py"))
_module = module_from_spec(_spec)
_spec.loader.exec_module(_module)
make_row, ROWS = _module.make_row, _module.ROWS


def test_a_wide_range_is_on_log_scales_and_says_how_many_times_the_source(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [make_row("source", 40, 20), make_row("int2", 8, 390), make_row("int4", 12, 25)]
    from brise.eval.plot import plot_group

    svg, _ = plot_group(rows, rows[0], tmp_path / "picture", "title")
    # matplotlib writes text as paths, and beside them what they say
    said = [line.strip()[5:-4] for line in svg.read_text().splitlines() if line.strip().startswith("<!-- ")]
    assert {"× 1", "× 10", "100", "300", "10", "20", "30"} <= set(said), said
    assert not any("%" in text for text in said)
    near = plot_group([rows[0], rows[2]], rows[0], tmp_path / "near", "title")[0].read_text()
    assert "<!-- +10% -->" in near and "×" not in near


def drawn(rows, source, quantity):
    """The axes of a picture, and its lines by their labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from brise.eval import plot

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plot._draw(axes, rows, source, quantity)
    plot._label(figure, axes, rows, quantity)
    return axes


def bars_of(axes):
    """(size, least, most) of every error bar."""
    found = [line.get_segments() for container in axes.containers for line in container.lines[2]]
    return sorted((*map(float, bar[0]), float(bar[1][1])) for bars in found for bar in bars)


def test_what_a_picture_draws_by_hand():
    pytest.importorskip("matplotlib")
    from brise.eval import plot

    axes = drawn(ROWS, ROWS[2], plot.PERPLEXITY)
    # twelve thousandths of 20, paired; the source has none
    expected = [(12.4, 23.76, 24.24), (12.5, 25.16, 25.64), (20.0, 19.86, 20.34), (40.0, 20.0, 20.0)]
    assert bars_of(axes) == [pytest.approx(bar) for bar in expected]
    assert list(axes.lines[0].get_ydata()) == [20, 20]
    (front,) = [line for line in axes.lines if line.get_label() == plot.FRONT]
    assert [list(map(float, point)) for point in front.get_xydata()] == [[12.4, 24.0], [20, 20.1], [40, 20.0]]
    speeds = {"nf4": (9, 8.5, 12), "int8": (7, 6, 7.5), "source": (8, 7, 9), "gptq-int4": (5, 4.9, 5.1)}
    rows = [
        dataclasses.replace(row, speed=Speed(Rate(1, 1, 1), Rate(*speeds[row.name]), 512, 16, 1, 5))
        for row in ROWS
    ]
    axes = drawn(rows, rows[2], plot.QUANTITIES[2])
    expected = [(12.4, 4.9, 5.1), (12.5, 8.5, 12.0), (20.0, 6.0, 7.5), (40.0, 7.0, 9.0)]
    assert bars_of(axes) == [pytest.approx(bar) for bar in expected]
    (front,) = [line for line in axes.lines if line.get_label() == plot.FRONT]
    assert [list(map(float, point)) for point in front.get_xydata()] == [[12.4, 5], [12.5, 9]]
    axes = drawn(ROWS, ROWS[2], plot.QUANTITIES[1])
    # the divergence's own error; of two equal in one thing the better counts
    assert (12.5, pytest.approx(0.096), pytest.approx(0.104)) in bars_of(axes)


def test_a_lost_model_stands_at_the_edge_with_its_figure():
    pytest.importorskip("matplotlib")
    from brise.eval import plot

    rows = [*ROWS, make_row("int2", 8, 2.5e6), make_row("int3", 10, 390)]
    axes = drawn(rows, ROWS[2], plot.PERPLEXITY)
    assert {text.get_text() for text in axes.texts} == {
        *(r.name for r in [*ROWS, rows[-1]]),
        "int2 ↑ 2.5e+06",
    }
    assert axes.get_ylim()[1] < 2000
    assert (8.0, 585.0, 585.0) in bars_of(
        axes
    )  # half as high again as the highest of the others, without a bar
    # of a divergence nothing is cut: no model is at no distance
    axes = drawn([make_row("a", 8, 20, kl=0.001), make_row("b", 9, 20, kl=5.0)], None, plot.QUANTITIES[1])
    assert axes.get_ylim()[1] > 5 and {text.get_text() for text in axes.texts} == {"a", "b"}


def test_errors_by_layer_are_drawn_as_what_they_are(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from brise.eval.plot_layers import plot_layers

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))

    def errors(outputs):
        head = LayerError("lm_head", 0.9, None)  # is in no layer
        return [head] + [LayerError(f"model.layers.{i}.o_proj", 0.1, outputs and 0.01 * i) for i in (2, 1)]

    rows = [make_row(f"r{i}", 10, 20, kl=(i * 7) % 10 / 10, layers=errors(i % 2 or None)) for i in range(10)]
    plot_layers([*rows, make_row("none", 10, 20)], tmp_path / "layers", "title")
    (axes,) = figures[0].axes
    assert axes.get_title(loc="left") == "title (the 8 nearest to the source of 10)"
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "layer"
    nearest = sorted(range(10), key=lambda i: (i * 7) % 10)[:8]
    assert [line.get_label() for line in axes.lines] == [
        f"r{i}" if i % 2 else f"r{i} (weights)" for i in nearest
    ]
    for i, line in zip(nearest, axes.lines):
        assert (line.get_linestyle() == "-") == bool(i % 2)
        values = [0.01, 0.02] if i % 2 else [0.1, 0.1]
        assert line.get_xydata().tolist() == [[1, pytest.approx(values[0])], [2, pytest.approx(values[1])]]
