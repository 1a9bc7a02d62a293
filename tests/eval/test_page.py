"""The page: complete in itself, and doing what it says in a browser without a head."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from brise.eval.compare import WindowSums, compare_sums
from brise.eval.html import write_page
from brise.eval.plot import front
from brise.eval.plot_layers import by_layer
from brise.eval.record import LayerError

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
def page(rows, tmp_path_factory):
    return write_page([("tiny on a text", rows)], tmp_path_factory.mktemp("page") / "report.html")


def test_the_page_is_complete_and_asks_for_nothing(page, rows):
    text = page.read_text()
    assert "/*DATA*/" not in text and "/*CODE*/" not in text and "/*STYLE*/" not in text
    # no address is loaded from: neither by a tag nor by a style
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", text.split("<script>")[0])
    assert "default-src 'none'" in text and "connect-src" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    (group,) = data["groups"]
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
        LayerError("model.layers.10.mlp.up_proj", 0.3, None),
        LayerError("model.layers.2.mlp.up_proj", 0.5, 0.1),
        LayerError("model.layers.2.mlp.down_proj", 0.5, 0.3),
        LayerError("lm_head", 0.5, 0.3),
    ]
    assert by_layer(layers) == {2: pytest.approx(0.2), 10: 0.3} and list(by_layer(layers)) == [2, 10]


# works the page as a reader would, and writes down what it then shows
SCRIPT = Path(__file__).with_name("page_probe.html").read_text()


def chromium(*arguments):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium to open the page with")
@pytest.mark.parametrize(("theme", "width"), [("light", 1400), ("dark", 520)])
def test_the_page_in_a_browser(page, rows, tmp_path, theme, width):
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
