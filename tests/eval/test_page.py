"""The page: complete in itself, and doing what it says in a browser without a head."""

import dataclasses
import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from brise.eval.bootstrap import Interval
from brise.eval.compare import WindowSums, compare_sums, sign_flip
from brise.eval.divergence import Details, Divergence
from brise.eval.html import group_data, write_page
from brise.eval.memory_peaks import Peaks
from brise.eval.perplexity import WordPerplexity
from brise.eval.plot import front
from brise.eval.plot_layers import by_layer, of_outputs
from brise.eval.record import LayerError
from brise.eval.speed import Rate, Speed
from brise.eval.tasks import TaskScore

pytest.importorskip("plotly", reason="plotly is not installed: brise[report]")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def made(name, megabytes, perplexity, kl, fmt=None, algorithm="rtn"):
    """A row as the page takes it, from the module of made-up rows."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("made_rows", Path(__file__).with_name("test_report.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    nll = [perplexity + 0.1 * i for i in range(6)]
    changes = {} if fmt is None else {"config": {"modules": {"a": {"format": fmt, "algorithm": algorithm}}}}
    outputs = algorithm == "gptq"
    layers = [
        LayerError(f"model.layers.{i}.mlp.up_proj", 0.01, 0.001 * (i + 1) if outputs else None)
        for i in range(3)
    ]
    return module.make_row(
        name, megabytes, perplexity, kl=kl, sums=WindowSums([10] * 6, nll, [kl] * 6), layers=layers, **changes
    )


@pytest.fixture(scope="module")
def rows():
    return [
        made("source", 40, 20.0, 0.0),
        made("int8", 20, 20.1, 0.001, "int8"),
        made("nf4", 12.5, 25.4, 0.28, "nf4"),
        made("gptq-nf4", 12.5, 22.0, 0.1, "nf4", "gptq"),
        made("worse", 13, 26.0, 0.3, "int4"),
        made("</script><b>", 12, 31.0, 0.5, "int4"),
    ]


@pytest.fixture(scope="module")
def others():
    """Of another protocol: timed, of twenty windows, and with a model that is lost."""

    def row(name, size, perplexity, kl, decode, shift):
        sums = WindowSums([10] * 20, [perplexity + shift * math.sin(i) for i in range(20)], None)
        speed = Speed(Rate(50, 40, 70), Rate(*decode), 8, 8, 1, 3)
        plain = made(name, size, perplexity, kl, "int4" if size < 40 else None)
        return dataclasses.replace(plain, sums=sums, speed=speed)

    return [
        row("source", 40, 20.0, 0.0, (8, 7, 8.5), 0),
        row("a", 10, 24.0, 0.2, (5, 4.5, 6), 1.0),
        row("b", 12, 24.1, 0.1, (9, 8.8, 9.9), 0.5),
        row("lost", 8, 900_000.25, 9.0, (4, 3, 5), 0),
    ]


@pytest.fixture(scope="module")
def page(rows, others, tmp_path_factory):
    groups = [("tiny on a text", rows), ("tiny on another", others)]
    return write_page(groups, tmp_path_factory.mktemp("page") / "report.html")


def test_the_page_is_complete_and_asks_for_nothing(page, rows):
    text = page.read_text()
    assert "/*DATA*/" not in text and "/*CODE*/" not in text and "/*STYLE*/" not in text
    # no address is loaded from: neither by a tag nor by a style
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", text.split("<script>")[0])
    assert "default-src 'none'" in text and "connect-src" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    group = data["groups"][0]
    assert [row["name"] for row in group["rows"]] == [row.name for row in rows]
    assert group["rows"][2]["figures"]["kl"] == [0.28, pytest.approx(0.276), pytest.approx(0.284)]
    assert group["rows"][2]["formats"] == ["nf4"] and group["rows"][0]["formats"] == ["source"]
    keys = [field["key"] for field in group["fields"]]
    assert "kl" in keys and "decode" not in keys  # what nobody measured is no column


def test_the_front_by_hand():
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 5.0), (2.0, 4.0), (4.0, 2.0), (1.0, 5.0)]
    assert [points[i] for i in front(points)] == [(1.0, 5.0), (2.0, 4.0), (3.0, 1.0)]
    assert [points[i] for i in front(points, less_is_better=False)] == [(1.0, 5.0)]


def test_errors_by_layer():
    layers = [
        LayerError("model.layers.10.mlp.up_proj", 0.3, 0.2),
        LayerError("model.layers.2.mlp.up_proj", 0.5, 0.1),
        LayerError("model.layers.2.mlp.down_proj", 0.4, 0.3),
        LayerError("lm_head", 0.5, None),
    ]
    assert by_layer(layers) == {2: pytest.approx(0.2), 10: 0.2} and list(by_layer(layers)) == [2, 10]
    assert of_outputs(layers)
    # one module that was only rounded: all are of weights, or a layer would be the mean of two kinds
    layers[1] = dataclasses.replace(layers[1], output_error=None)
    assert by_layer(layers) == {2: pytest.approx(0.45), 10: 0.3} and not of_outputs(layers)
    assert by_layer(layers[3:]) == {} and not of_outputs(layers[3:])


def test_the_pages_figures_by_hand():
    source = made("source", 40, 20.0, 0.0)
    intervals = {
        name: Interval(i / 10, i / 10 - 0.01, i / 10 + 0.02)
        for i, name in enumerate(("median", "p90", "p99", "p999", "top5", "true_token"), 1)
    }
    rest = dict.fromkeys(("mean", "top1", "true_token_rms"), Interval(0.99))
    plain = made("x", 20, 25.0, 0.1, "int4")
    row = dataclasses.replace(
        plain,
        divergence=Divergence(0.1, 0.004, 0.905, 0.003, Details(**intervals, **rest, resamples=9)),
        speed=Speed(Rate(100, 90, 120), Rate(10, 9, 12), 8, 8, 1, 3),
        peaks=Peaks(1_000_000, 2_000_000, 3_000_000, 8, 8),
        memory=dataclasses.replace(plain.memory, kv_cache=4_000_000),
        words=WordPerplexity(50.0, 2.0, 1.5, 0.6, 10, 60, 2),
        tasks={
            "arc:9": TaskScore("acc", 0.25, 0.1, 9, "", "1"),
            "one": TaskScore("acc", 1.0, None, 1, "", "1"),
        },
        quantize_seconds=77.0,
    )
    group = group_data("title", [source, row])
    figures = {
        "size": (20, None, None),
        "bits": (16, None, None),
        "ppl": (25, 24.76, 25.24),  # its ratio's error, times the source's
        "word": (50, 48, 52),
        "rel": (25, 23.8, 26.2),
        "kl": (0.1, 0.096, 0.104),
        "median": (0.1, 0.09, 0.12),
        "p99": (0.3, 0.29, 0.32),
        "p999": (0.4, 0.39, 0.42),
        "top1": (90.5, 90.2, 90.8),
        "top5": (50, 49, 52),
        "true": (60, 59, 62),
        "prefill": (100, 90, 120),
        "decode": (10, 9, 12),
        "load": (1, None, None),
        "peak_prefill": (2, None, None),
        "peak_decode": (3, None, None),
        "kv": (4, None, None),
        "made": (77, None, None),
        "task:arc:9": (25, 15, 35),
        "task:one": (100, None, None),
    }
    found = group["rows"][1]["figures"]
    assert list(found) == list(figures) == [field["key"] for field in group["fields"]]
    for key, cell in figures.items():
        assert found[key] == tuple(v if v is None else pytest.approx(v) for v in cell), key
    more = {field["key"] for field in group["fields"] if field["better"] == "high"}
    assert more == {"top1", "top5", "true", "prefill", "decode", "task:arc:9", "task:one"}
    assert all(field["better"] in ("low", "high") for field in group["fields"])
    assert group["rows"][0]["figures"]["ppl"] == (20, None, None)
    assert group["rows"][0]["formats"] == group["rows"][0]["algorithms"] == ["source"]
    assert (group["rows"][1]["formats"], group["rows"][1]["algorithms"]) == (["int4"], ["rtn"])
    assert group["rows"][1]["sums"] == {"tokens": [10] * 6, "nll": row.sums.nll, "kl": [0.1] * 6}
    one_more = [*row.layers, LayerError("model.embed_tokens", 0.1, None)]
    assert not group["rows"][1]["outputs"]
    gptq = made("y", 20, 25.0, 0.1, "int4", "gptq")
    mixed = dataclasses.replace(gptq, layers=[*gptq.layers, one_more[-1]])
    assert group_data("t", [source, mixed])["rows"][1]["outputs"]


# works the page as a reader would, and writes down what it then shows
SCRIPT = Path(__file__).with_name("page_probe.html").read_text()


def chromium(*arguments):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium to open the page with")
@pytest.mark.parametrize(("theme", "width"), [("light", 1400), ("dark", 520)])
def test_the_page_in_a_browser(page, rows, others, tmp_path, theme, width):
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("<body>", "<body>" + SCRIPT, 1))
    done = chromium(
        "--virtual-time-budget=8000",
        f"--window-size={width},900",
        "--dump-dom",
        f"{probed.as_uri()}?theme={theme}",
    )
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    said = json.loads(html.unescape(found[1]))
    assert "error" not in said
    assert said["first"] == [row.name for row in rows]
    assert said["up"] == ["source", "int8", "gptq-nf4", "nf4", "worse", "</script><b>"]
    assert said["down"] == said["up"][::-1]
    points = [(row.memory.bytes / 1e6, row.perplexity.value) for row in rows]
    assert said["front"] == [points[i][0] for i in front(points)]
    assert said["bars"] == [pytest.approx(0.012 * 20)] and "KL, nats: 0.1000" in said["hover"]
    assert said["y"] == [0.1]
    assert said["nf4"] == ["gptq-nf4", "nf4", "source"] and said["gptq"] == ["gptq-nf4", "source"]
    assert said["count"] == "2 of 6 rows"
    expected = compare_sums(rows[3].sums, rows[2].sums)[0]
    assert said["pair"] == "gptq-nf4 and nf4"
    assert said["compare"] == [
        f"gptq-nf4 is better than nf4 in {what} (p = {expected.p:.2g}, paired over 6 windows)."
        for what in ("perplexity", "KL")
    ]
    assert said["layers"] == [["nf4", "dash"], ["gptq-nf4", "solid"]]
    assert said["names"] == sorted(row.name for row in rows) and said["overlaps"] == said["outside"] == []
    assert said["logs"] == [True, False, "log"]  # 12 to 40 MB, perplexities of 20 to 31
    assert said["wide"][0] <= said["wide"][1] and abs(said["drawn"][0] - said["drawn"][1]) < 1
    assert (said["ground"] == "rgb(255, 255, 255)") == (theme == "light") and said["ground"] != said["other"]
    other = said["second"]
    assert other["beyond"] == "Beyond the edge: lost. A double click shows all."
    # the others end at 24.1, and half as high again is the edge; the least is 20
    assert [10**end for end in other["range"]] == [pytest.approx(20 / 1.3), pytest.approx(1.5 * 24.1)]
    assert other["cell"] == "900000" and other["wide"][-1] == "500000" and other["title"] == []
    assert not said["beyond"]
    assert other["front"] == [8, 10, 12]  # the smallest, and then who writes more tokens a second
    assert other["x"] == [[0.004] * 3, [0.004] * 3] and other["y"] == [[1, 0.9, 1], [0.5, 0.2, 1]]
    assert other["pair"] == [["decode, tokens/s", "5.0", "9.0", "−4.0"], [False, True]]
    p = sign_flip(torch.tensor(others[1].sums.nll, dtype=torch.float64) - torch.tensor(others[2].sums.nll))
    told = re.fullmatch(
        r"No difference in perplexity was shown \(p = ([\d.]+), paired over 20 windows\)\.", other["says"]
    )
    assert told and 0.05 < p < 0.95 and float(told[1]) == pytest.approx(p, abs=0.02)
