"""Names as people and files give them: in the table, the pictures and the page they are shown as they are."""

import dataclasses
import html
import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from brise.eval.model_info import ModelInfo
from brise.eval.record import LayerError, append_row
from brise.eval.report import group_rows, markdown, plain, write_report
from brise.eval.speed import Rate, SpeedPoint

NAME = "a|b <b>$x$</b> *c* `d` [e](f)"


def other(name):
    """A neighbouring test file, as a module."""
    spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_row = other("test_report").make_row


def test_a_name_is_no_markdown():
    markdown_it = pytest.importorskip("markdown_it", reason="markdown-it is not installed")
    point = SpeedPoint(1, 8, Rate(1, 1, 1), Rate(1, 1, 1), 10, 1e9)
    rows = [make_row("source", 40, 20), make_row(NAME, 12, 25, speeds=[point]), make_row("__init__", 11, 26)]
    source = ModelInfo("x <i>|</i>", "a" * 64, "a model | of *mine*")
    rows = [dataclasses.replace(row, baseline=row.baseline and source) for row in rows]
    rows[0] = dataclasses.replace(rows[0], model=source)
    (group,) = group_rows(rows)
    page = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown(group))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    first = [html.unescape(cell) for cell in cells]
    assert first.count(NAME) == 2 and "__init__" in first and "<strong>source</strong>" in first
    assert len({row.count("<td") for row in page.split("<tr>")[2:4]}) == 1
    assert "x &lt;i&gt;|&lt;/i&gt; on boolq" in page and "a model | of *mine*" in page


def test_plain_words_stay_as_they_are():
    for text in ("gptq-int4-g64", "int4_min", "arc_easy_offline:100", "16 × 1024 of boolq, seed 1"):
        assert plain(text) == text
    assert plain("two\nlines") == "two lines"


def test_a_dollar_in_a_name_is_a_dollar(tmp_path):
    pytest.importorskip("matplotlib")
    layers = [LayerError(f"model.layers.{i}.mlp.up_proj", 0.01 * (i + 1), None) for i in range(3)]
    for row in (
        make_row("source", 40, 20),
        make_row("$x_{$", 12, 25, layers=layers),
        make_row("$y$", 11, 27),
    ):
        append_row(tmp_path / "runs.jsonl", row)
    write_report(tmp_path)
    for picture, names in (("memory-perplexity", ("$x_{$", "$y$")), ("error-by-layer", ("$x_{$ (weights)",))):
        text = (tmp_path / f"{picture}.svg").read_text()
        for name in names:
            assert f"<!-- {name} -->" in text, (picture, name)


PROBE = """<script>
window.addEventListener("load", () => setTimeout(() => {
  const lines = [...document.querySelectorAll("#table tbody tr")];
  lines.filter((r) => r.cells[0].textContent === "twin").forEach((r, i) => {
    [...document.querySelectorAll("#table tbody tr")].filter((q) => q.cells[0].textContent === "twin")[i].click();
  });
  const out = {};
  out.pair = document.querySelector("#compare h2").textContent;
  const compared = [...document.querySelectorAll("#compare table tr")];
  out.sizes = compared.find((r) => r.cells[0].textContent === "perplexity").textContent;
  out.taken = document.querySelectorAll("#table tr.taken").length;
  const said = document.createElement("pre");
  said.id = "said";
  said.textContent = JSON.stringify(out);
  document.body.append(said);
}, 300));
</script>"""


def test_two_rows_of_one_name_are_two_rows(tmp_path):
    """As of one configuration under two calibrations."""
    page_tests = other("test_page")
    if page_tests.BROWSER is None:
        pytest.skip("there is no chromium to open the page with")
    rows = [page_tests.made("source", 40, 20.0, 0.0), page_tests.made("twin", 12, 25.0, 0.2, "nf4")]
    rows.append(dataclasses.replace(page_tests.made("twin", 12, 23.0, 0.1, "nf4"), key="another"))
    path = page_tests.write_page([("tiny", rows)], tmp_path / "page.html")
    path.write_text(path.read_text().replace("<body>", "<body>" + PROBE, 1))
    done = page_tests.chromium("--virtual-time-budget=8000", "--dump-dom", path.as_uri())
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    said = json.loads(html.unescape(found[1]))
    assert said == {"pair": "twin and twin", "sizes": "perplexity25.00023.000+2.000", "taken": 2}
