"""Tables and pictures from rows that were made up."""

import dataclasses
import importlib.util
import xml.etree.ElementTree as ElementTree

import pytest

from brise.eval.divergence import Divergence
from brise.eval.model_info import ModelInfo
from brise.eval.perplexity import Perplexity, Relative
from brise.eval.provenance import Provenance
from brise.eval.record import METRICS_VERSION, Memory, Protocol, Row, append_row
from brise.eval.report import ReportError, group_rows, markdown, write_report
from brise.eval.speed import Rate, Speed, SpeedPoint, SpeedProtocol

SOURCE = ModelInfo("tiny", "a" * 64, "a model that was made up")
PROTOCOL = Protocol(
    "boolq#evaluation", "0" * 64, "1" * 64, 16, 1024, 1024, 16368, False, "float32", "cpu", None
)


def make_row(name, megabytes, perplexity, algorithm="rtn", kl=0.1, protocol=PROTOCOL, **changes) -> Row:
    source = name == "source"
    relative = perplexity / 20 - 1
    row = Row(
        metrics=METRICS_VERSION,
        key=f"{name}-{protocol.windows}",
        name=name,
        model=SOURCE if source else ModelInfo(name, name),
        baseline=None if source else SOURCE,
        config=None if source else {"modules": {"a": {"format": "int4", "algorithm": algorithm}}},
        protocol=protocol,
        perplexity=Perplexity(perplexity, 1.25, 3.0, 0.06, 16368, 16),
        relative=None if source else Relative(relative, 0.012),
        divergence=None if source else Divergence(kl, 0.004, 0.905, 0.003),
        memory=Memory(
            int(megabytes * 1e6),
            {},
            {},
            10_000_000,
            0 if source else 9,
            megabytes / 10 * 8,
            None,
            1,
            1024,
            1,
            1,
            None,
        ),
        speed=None,
        quantize_seconds=None if source else 12.3,
        provenance=Provenance({"torch": "2.13"}, "a processor", 2, 0, None, None, "now"),
    )
    return dataclasses.replace(row, **changes)


ROWS = [
    make_row("nf4", 12.5, 25.4),
    make_row("int8", 20, 20.1, kl=0.0012),
    make_row("source", 40, 20),
    make_row("gptq-int4", 12.4, 24.0, "gptq"),
]


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table():
    (group,) = group_rows(ROWS)
    text = markdown(group)
    table = cells(text)
    assert [row[0] for row in table[2:]] == ["**source**", "int8", "nf4", "gptq-int4"]  # source, then by size
    assert table[0] == [
        "configuration",
        "size, MB",
        "of source",
        "bits/weight",
        "perplexity",
        "against source, %",
        "KL, nats/token",
        "same first choice, %",
        "made in, s",
    ]
    assert table[3] == [
        "int8",
        "20.0",
        "50.0%",
        "16.00",
        "20.10 ± 1.25",
        "+0.5 ± 1.2",
        "0.0012 ± 0.0040",
        "90.5 ± 0.3",
        "12",
    ]
    assert table[2] == ["**source**", "40.0", "100.0%", "32.00", "20.00 ± 1.25", "–", "–", "–", "–"]
    assert {len(row) for row in table} == {9}
    assert text.startswith("### tiny on boolq#evaluation: 16 windows of 1024 tokens, float32\n")
    assert "- The source is a model that was made up.\n" in text


def test_machines_that_measured_are_told_apart():
    (group,) = group_rows(ROWS)
    assert markdown(group).count("easured on") == 1
    other = dataclasses.replace(ROWS[0].provenance, device="another processor", threads=1)
    timed = dataclasses.replace(PROTOCOL, speed=SpeedProtocol())
    for protocol, warned in ((PROTOCOL, False), (timed, True)):
        rows = [dataclasses.replace(row, protocol=protocol) for row in ROWS]
        if warned:
            speed = Speed(Rate(1, 1, 1), Rate(1, 1, 1), 512, 16, 1, 2)
            rows = [dataclasses.replace(row, speed=speed) for row in rows]
        rows[0] = dataclasses.replace(rows[0], provenance=other)
        (group,) = group_rows(rows)
        text = markdown(group)
        assert "- 1 row measured on another processor, 1 thread, torch 2.13 (nf4).\n" in text
        assert (
            text.count("easured on") == 2
            and "- 3 rows measured on a processor, 2 threads, torch 2.13 (" in text
        )
        assert ("Compare no speeds" in text) == warned


def test_columns_appear_with_what_was_measured():
    protocol = dataclasses.replace(PROTOCOL, speed=SpeedProtocol())
    speed = Speed(Rate(1234.4, 1200, 1250), Rate(9.87, 9, 10), 512, 16, 1, 5)
    config = {"calibration": {"windows": 16, "length": 1024, "text": "boolq"}, "m": [{"algorithm": "gptq"}]}
    rows = [
        make_row("source", 40, 20, protocol=protocol, speed=speed),
        make_row("gptq", 12, 24, protocol=protocol, config=config),
    ]
    (group,) = group_rows(rows)
    table = cells(markdown(group))
    by_heading = {heading: [row[i] for row in table[2:]] for i, heading in enumerate(table[0])}
    assert by_heading["prefill, tokens/s"] == ["1234 (1200–1250)", "–"]
    assert by_heading["decode, tokens/s"] == ["9.9 (9.0–10.0)", "–"]
    assert by_heading["calibration"] == ["–", "16 × 1024 of boolq"]


def test_speeds_by_batch_and_context_have_a_table_of_their_own():
    points = [
        SpeedPoint(b, 256, Rate(500, 490, 510), Rate(8.0 * b, 7.5 * b, 8.5 * b), 10, b * 1e9) for b in (1, 8)
    ]
    text = markdown(group_rows([ROWS[2], make_row("nf4", 12, 25, speeds=points)])[0])
    assert text.endswith(
        "| configuration | batch | context | prefill, tokens/s | decode, tokens/s | read in decoding, GB/s |\n"
        "|:--|--:|--:|--:|--:|--:|\n"
        "| nf4 | 1 | 256 | 500 (490–510) | 8.0 (7.5–8.5) | 1.00 |\n"
        "| nf4 | 8 | 256 | 500 (490–510) | 64.0 (60.0–68.0) | 8.00 |\n"
    )
    assert "context" not in markdown(group_rows(ROWS)[0])


def test_the_spread_over_draws_of_the_calibration_and_what_once_means():
    rows = [make_row("source", 40, 20)]
    for seed, value in ((0, 24.0), (1, 26.0)):
        data = {"windows": 8, "length": 64, "text": "boolq", "seed": seed, "hessians": "once"}
        config = {"calibration": data, "rules": [{"algorithm": "gptq", "format": "int4"}]}
        rows.append(make_row(f"gptq.d{seed}", 12, value, kl=0.1 + 0.02 * seed, config=config))
    text = markdown(group_rows(rows)[0])
    line = next(line for line in text.splitlines() if "draws" in line)
    assert line == (
        "- gptq: perplexity 25.000 ± 1.414, KL 0.1100 ± 0.0141 over 2 draws of the calibration text "
        "(standard deviation)."
    )
    assert "8 × 64 of boolq, once, seed 1" in text and "an approximation of the sequential GPTQ" in text
    assert "draws" not in markdown(group_rows(rows[:2])[0])


def test_the_tail_and_the_tasks_are_columns():
    from brise.eval.bootstrap import Interval
    from brise.eval.divergence import Details
    from brise.eval.tasks import TaskScore

    details = Details(*(Interval(0.5, 0.4, 0.6) for _ in range(9)), resamples=1000)
    tasks = {"arc_easy_offline:100": TaskScore("acc_norm", 0.5, 0.05, 100, "0" * 64, "1.0")}
    row = make_row("nf4", 12, 25, divergence=Divergence(0.1, 0.004, 0.9, 0.003, details), tasks=tasks)
    text = markdown(group_rows([ROWS[2], row])[0])
    assert "0.500 (0.400–0.600)" in text and "arc_easy_offline:100 0.500 ± 0.050" in text


def test_one_window_has_no_error_and_says_none():
    row = dataclasses.replace(ROWS[2], perplexity=Perplexity(20.0, None, 3.0, None, 1023, 1))
    (group,) = group_rows([row])
    assert "| 20.00 |" in markdown(group)


def test_what_must_not_be_compared_is_apart():
    changes = [
        {"windows": 4},
        {"text_sha256": "2" * 64},
        {"tokens_sha256": "2" * 64},
        {"dtype": "bfloat16"},
        {"device": "cuda"},
        {"stride": 512},
        {"bos": True},
        {"speed": SpeedProtocol()},
    ]
    others = [make_row("nf4", 12, 25, protocol=dataclasses.replace(PROTOCOL, **change)) for change in changes]
    others = [dataclasses.replace(row, key=str(i)) for i, row in enumerate(others)]
    other_source = make_row("nf4", 12, 25, key="s", baseline=ModelInfo("tiny", "b" * 64))
    groups = group_rows([*ROWS, *others, other_source])
    assert [len(group.rows) for group in groups] == [4] + [1] * (len(changes) + 1)
    assert groups[0].source == ROWS[2] and all(group.source is None for group in groups[1:])


def test_the_command_prints_a_table_for_each_protocol(capsys):
    from rich.console import Console

    from brise.cli.sweep import _show

    other = make_row("nf4", 12, 25, protocol=dataclasses.replace(PROTOCOL, windows=4))
    _show(Console(width=160), [*ROWS, other], [], [])
    first, _, rest = capsys.readouterr().out.partition("tiny on boolq#evaluation: 4 windows")
    assert "tiny on boolq#evaluation: 16 windows" in first and first.count("25.40") == 1
    assert rest.count("configuration") == 1 and rest.count("±") == 3 and "25.00" in rest
    _show(Console(width=160), ROWS, [], [])
    assert "windows" not in capsys.readouterr().out


def test_of_equal_keys_the_last_row_counts():
    newer = make_row("nf4", 12.5, 26)
    (group,) = group_rows([*ROWS, newer])
    assert len(group.rows) == 4 and newer in group.rows and ROWS[0] not in group.rows


@pytest.fixture
def crowded():
    """Names that would lie on each other: eight checkpoints of nearly the same size."""
    rows = [make_row("source", 538, 18), make_row("int8", 220, 18.06)]
    names = ["nf4", "nf4-dq", "int4-g64", "gptq-int4-g64", "gptq-nf4", "int4-g64-asym", "fp4", "gptq-nf4-dq"]
    for i, name in enumerate(names):
        row = make_row(name, 172 + 0.7 * i, 22.5 + 0.25 * i, "gptq" if "gptq" in name else "rtn")
        rows.append(row)
    return rows


def test_the_report_writes_table_and_pictures(tmp_path, crowded):
    pytest.importorskip("matplotlib")
    for row in [*crowded, make_row("nf4", 12, 25, protocol=dataclasses.replace(PROTOCOL, windows=4))]:
        append_row(tmp_path / "runs.jsonl", row)
    report = write_report(tmp_path)
    names = [file.name for file in report.files]
    # of a single row only the perplexity is drawn, and what nobody measured is not
    stems = ["memory-perplexity-1", "memory-kl-1", "memory-perplexity-2"]
    pictures = [f"{stem}.{suffix}" for stem in stems for suffix in ("svg", "png")]
    if importlib.util.find_spec("plotly"):
        assert names == ["table.md", *pictures, "report.html"] and report.problems == []
    else:
        assert names == ["table.md", *pictures] and "needs plotly" in report.problems[0]
    assert (tmp_path / "table.md").read_text().count("### ") == 2
    for file in report.files[1:]:
        assert file.stat().st_size > 5000
    svg = report.files[1].read_bytes()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    write_report(tmp_path)
    assert report.files[1].read_bytes() == svg  # equal rows, equal file


def test_no_name_lies_on_a_point_or_another_name(crowded):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from brise.eval import plot

    figure = Figure(figsize=(8, 5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plot._draw(axes, crowded, crowded[0])
    plot._label(figure, axes, crowded)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    boxes = {text.get_text(): super_box(text, renderer) for text in axes.texts}
    assert set(boxes) == {row.name for row in crowded}
    frame = axes.get_window_extent(renderer)
    for name, box in boxes.items():
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, name
        for other, other_box in boxes.items():
            assert name == other or plot._overlap(box, other_box) == 0, (name, other)
        for row in crowded:
            x, y = axes.transData.transform((row.memory.bytes / 1e6, row.perplexity.value))
            assert not (box.x0 < x < box.x1 and box.y0 < y < box.y1), (name, row.name)


def test_no_name_lies_on_a_bar_or_on_the_front():
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from brise.eval import plot

    protocol = dataclasses.replace(PROTOCOL, speed=SpeedProtocol())
    rows = [
        make_row(name, size, 20, protocol=protocol, speed=Speed(Rate(1, 1, 1), Rate(*rate), 512, 16, 1, 5))
        for name, size, rate in (
            ("gptq-int3-g64", 157, (6.9, 6.5, 7.1)),
            ("nf4-dq", 168, (6.0, 4.9, 6.2)),
            ("int4-g64", 170, (5.6, 5.1, 6.9)),
            ("gptq-int4", 170, (9.6, 8.5, 10.5)),
            ("gptq-nf4", 173, (7.8, 6.7, 8.1)),
            ("int8", 220, (6.1, 5.4, 8.0)),
            ("last", 538, (13.5, 13.4, 13.7)),
        )
    ]
    figure = Figure(figsize=(8, 5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    speed = plot.QUANTITIES[2]
    plot._draw(axes, rows, None, speed)
    plot._label(figure, axes, rows, speed)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    lines = []
    for row in rows:
        ends = [(row.memory.bytes / 1e6, y) for y in (row.speed.decode.p20, row.speed.decode.p80)]
        lines.append((f"bar of {row.name}", axes.transData.transform(ends)))
    best = axes.transData.transform([(157, 6.9), (170, 9.6), (538, 13.5)])
    lines += [("front", best[:2]), ("front", best[1:])]
    for text in axes.texts:
        box = super_box(text, renderer)
        for what, (a, b) in lines:
            steps = [a + (b - a) * i / 500 for i in range(501)]
            assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for x, y in steps), (text, what)


def super_box(annotation, renderer):
    """The box of the words alone: an annotation's own includes its line."""
    from matplotlib.text import Text

    return Text.get_window_extent(annotation, renderer)


def test_bars_are_the_paired_error():
    from brise.eval.plot import error_of, kind_of

    source = ROWS[2]
    assert error_of(ROWS[0], source) == pytest.approx(0.012 * 20)
    assert error_of(ROWS[0], None) == 1.25  # nothing to pair with
    assert error_of(source, source) is None
    assert [kind_of(row) for row in ROWS] == ["rtn", "rtn", "source", "gptq"]


def test_nothing_to_report(tmp_path):
    with pytest.raises(ReportError, match="run a sweep"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    append_row(tmp_path / "runs.jsonl", ROWS[0])
    if importlib.util.find_spec("matplotlib"):
        monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"brise\[demo\]"):
        write_report(tmp_path)


@pytest.mark.parametrize("folder", ["demo", "gptq"])
def test_rows_of_before_are_read_and_told_apart_from_nothing_that_is_new(folder):
    from pathlib import Path

    from brise.eval.evaluate import row_key
    from brise.eval.record import read_rows

    rows, problems = read_rows(Path(__file__).parents[2] / "results" / folder / "runs.jsonl")
    assert len(rows) > 5 and problems == []
    (source,) = [row for row in rows if row.is_source]
    # a sweep of today finds it done: what came later is in no key where it says nothing
    assert row_key(source.protocol, source.model.sha256) == source.key
    assert len(group_rows(rows)) == 1 and source.protocol.name == "free"
