"""A row repeated from what it says of itself, and two rows compared."""

import dataclasses
import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from brise.cli.main import app
from brise.eval.bootstrap import Interval
from brise.eval.compare import compare_sums
from brise.eval.evaluate import baseline_of, evaluate
from brise.eval.logprobs import FROM_FILE
from brise.eval.protocols import PROTOCOLS, NamedProtocol
from brise.eval.record import append_row, read_rows
from brise.eval.rerun import RerunError, find_row, rerun
from brise.eval.setting import make_setting
from brise.eval.surface import measure_surface
from brise.eval.sweep import run_sweep
from brise.eval.tasks import Item, TaskScore, write_items
from brise.model.checkpoint import load_tokenizer
from brise.quant.config import Calibration, QuantConfig, QuantSpec, Rule


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def swept(tiny_checkpoint, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("rows")
    text = f"{tiny_text}#evaluation"
    spec = QuantSpec(format="int3", group_size=32, algorithm="gptq")
    calibration = Calibration(text=f"{tiny_text}#calibration", windows=3, length=32, seed=4)
    configs = {
        "gptq": QuantConfig((Rule(("*layers.*",), spec),), calibration),
        "int2": QuantConfig((Rule(("*layers.*",), QuantSpec(format="int2", group_size=64)),)),
    }
    result = run_sweep(tiny_checkpoint, configs, out, text=text, windows=6, length=32)
    assert not result.failures
    return out


def test_a_row_is_repeated_to_the_bit(swept, tiny_checkpoint):
    for name, figures in (("source", 7), ("gptq", 14)):
        found = rerun(find_row(swept, name), tiny_checkpoint)
        assert found.agrees, found.in_words()
        assert found.now.perplexity == found.before.perplexity and found.now.sums == found.before.sums
        assert found.in_words() == f"All {figures} figures of {name} agree to the bit."


def test_every_kind_of_row_is_repeated(swept, tiny_checkpoint, tiny_text, tmp_path):
    """Of a surface, against a kept baseline, of a quantized model by itself, and of a model against itself."""
    how = {"text": f"{tiny_text}#evaluation", "windows": 3, "length": 32}
    setting = make_setting(tiny_checkpoint, **how)
    made = swept / "gptq"
    rows = measure_surface(made, setting, baseline_of(tiny_checkpoint, setting), [None, 8], ["model", "int4"])
    rows.append(evaluate(made, baseline=tiny_checkpoint, baseline_cache=tmp_path / "kept", **how))
    rows.append(evaluate(tiny_checkpoint, baseline=tiny_checkpoint, **how))
    for row in rows:
        found = rerun(row, tiny_checkpoint)
        assert found.agrees and not found.changed, found.in_words()
        now = found.now
        assert (now.key, now.variant, now.model.sha256) == (row.key, row.variant, row.model.sha256)
        assert now.protocol == row.protocol and now.sums == row.sums
    assert len({row.perplexity.value for row in rows}) == 5 and rows[-2].protocol.baseline == "16-bit"
    wider = dataclasses.replace(rows[1], variant=dataclasses.replace(rows[1].variant, kv_bytes=1))
    assert [f.name for f in rerun(wider, tiny_checkpoint).figures if not f.equal] == ["KV cache, bytes"]
    row = evaluate(made, **how)
    assert rerun(row, made).agrees
    with pytest.raises(RerunError, match="expected the model gptq of sha256"):
        rerun(row, tiny_checkpoint)


def test_a_row_is_repeated_in_its_batches(tiny_checkpoint, tiny_text):
    text = f"{tiny_text}#evaluation"
    row = evaluate(tiny_checkpoint, text=text, windows=5, length=32, batch=3, seed=7)
    found = rerun(row, tiny_checkpoint)
    assert found.agrees and (found.now.provenance.batch, found.now.provenance.seed) == (3, 7)


def test_a_row_is_repeated_on_its_threads(swept, tiny_checkpoint, monkeypatch):
    row = find_row(swept, "int2")
    counts = []
    monkeypatch.setattr("brise.eval.rerun.torch.set_num_threads", counts.append)
    threads = torch.get_num_threads()
    rerun(
        dataclasses.replace(row, provenance=dataclasses.replace(row.provenance, threads=3)), tiny_checkpoint
    )
    assert counts == [3, threads]


def test_documents_and_a_bos_of_ones_own_are_repeated(tiny_checkpoint, tiny_text, tmp_path, monkeypatch):
    rule = NamedProtocol("lmeval-word", 32, 32, "documents")
    monkeypatch.setitem(PROTOCOLS, rule.name, rule)
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    tokenizer = load_tokenizer(source)
    tokenizer.bos_token = "z"
    tokenizer.save_pretrained(source)
    row = evaluate(source, text=str(tiny_text), protocol=rule.name, windows=2)
    assert row.words.documents == 2 < row.protocol.windows
    found = rerun(row, source)
    assert found.agrees and len(found.figures) == 8
    row = evaluate(source, text=str(tiny_text), windows=3, length=32, bos="always")
    assert row.protocol.bos and rerun(row, source).agrees


def test_figures_that_differ_are_named(swept, tiny_checkpoint):
    row = find_row(swept, "int2")
    other = dataclasses.replace(
        row,
        perplexity=dataclasses.replace(row.perplexity, value=row.perplexity.value * 1.5),
        provenance=dataclasses.replace(row.provenance, versions={**row.provenance.versions, "torch": "1.0"}),
    )
    found = rerun(other, tiny_checkpoint)
    assert not found.agrees
    says = found.in_words()
    assert (
        says.startswith("1 of 14 figures of int2 differ, most of all perplexity") and "torch 1.0 then" in says
    )


def test_the_tail_is_among_the_figures(swept, tiny_checkpoint):
    row = find_row(swept, "int2")
    details = dataclasses.replace(row.divergence.details, p99=Interval(9.0))
    found = rerun(
        dataclasses.replace(row, divergence=dataclasses.replace(row.divergence, details=details)),
        tiny_checkpoint,
    )
    assert [figure.name for figure in found.figures if not figure.equal] == ["KL p99"]


def test_what_cannot_be_repeated(swept, tiny_checkpoint, made, tmp_path, tiny_text):
    row = find_row(swept, "int2")
    with pytest.raises(RerunError, match="expected the model tiny of sha256"):
        rerun(row, made / "single")
    with pytest.raises(RerunError, match="expected a row nf9 in"):
        find_row(swept, "nf9")
    text = tmp_path / "other.txt"
    text.write_text(tiny_text.read_text().replace("wind", "rain"))
    with pytest.raises(RerunError, match="gives other tokens"):
        rerun(row, tiny_checkpoint, text=f"{text}#evaluation")
    source = find_row(swept, "source")
    other = dataclasses.replace(source, model=dataclasses.replace(row.model, name="tuned"), name="tuned")
    with pytest.raises(RerunError, match="tuned is no quantization of what it was compared with"):
        rerun(dataclasses.replace(other, baseline=source.model), tiny_checkpoint)
    of_file = dataclasses.replace(row.baseline, name="base.kld", note=FROM_FILE)
    with pytest.raises(RerunError, match=r"compared with the file base\.kld: repeat its command"):
        rerun(dataclasses.replace(row, baseline=of_file), tiny_checkpoint)
    with pytest.raises(RerunError, match="made by another library"):
        rerun(dataclasses.replace(row, config={"bits": 4}), tiny_checkpoint)
    append_row(tmp_path / "runs.jsonl", row)
    append_row(tmp_path / "runs.jsonl", dataclasses.replace(row, key="f" * 64))
    with pytest.raises(RerunError, match="the name of 2 rows"):
        find_row(tmp_path, "int2")
    assert find_row(tmp_path, "ffffff").key == "f" * 64


def test_the_command_rerun(swept, tiny_checkpoint):
    done = invoke("rerun", swept, "int2", "--model", tiny_checkpoint, "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["agrees"] and {f["name"] for f in said["figures"]} >= {"perplexity", "KL", "bytes"}
    wrong = invoke("rerun", swept, "nf9", "--model", tiny_checkpoint)
    assert wrong.exit_code == 1 and "there are gptq, int2, source" in wrong.stderr


def test_the_command_compare(swept, tiny_checkpoint, tiny_text):
    done = invoke("compare", "gptq", "int2", "--rows", swept, "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    sums = [find_row(swept, name).sums for name in ("gptq", "int2")]
    assert said["in_words"] == [c.in_words("gptq", "int2") for c in compare_sums(*sums)]
    assert [c["what"] for c in said["windows"]] == ["perplexity", "KL"]
    how = ["--text", f"{tiny_text}#evaluation", "--windows", 6, "--length", 32]
    again = invoke("compare", swept / "gptq", swept / "int2", "--baseline", tiny_checkpoint, *how, "--json")
    assert again.exit_code == 0, again.stderr
    repeated = json.loads(again.stdout.splitlines()[-1])
    assert [c["a"] for c in repeated["windows"]] == [c["a"] for c in said["windows"]]
    assert [c["p"] for c in repeated["windows"]] == [c["p"] for c in said["windows"]]


def test_rows_that_are_not_to_be_compared(swept, tmp_path):
    rows = read_rows(swept / "runs.jsonl")[0]
    append_row(tmp_path / "runs.jsonl", dataclasses.replace(rows[1], sums=None, name="old"))
    other = dataclasses.replace(rows[2], protocol=dataclasses.replace(rows[2].protocol, name="gptq-2048"))
    for row in (rows[1], other):
        append_row(tmp_path / "runs.jsonl", dataclasses.replace(row, key=row.name * 9))
    old = invoke("compare", "old", "int2", "--rows", tmp_path)
    assert old.exit_code == 1 and "old was measured before sums by window were kept" in old.stderr
    apart = invoke("compare", "gptqgptq", "int2", "--rows", tmp_path)
    assert apart.exit_code == 1 and "different protocols" in apart.stderr


def test_what_is_left_out_of_a_comparison_is_said(swept, tmp_path):
    one, two = (find_row(swept, name) for name in ("gptq", "int2"))
    score = TaskScore("acc", 0.5, 0.1, 4, "1" * 64, "1.0")
    one = dataclasses.replace(one, tasks={"arc:4": score})
    two = dataclasses.replace(
        two,
        tasks={"arc:4": dataclasses.replace(score, items_sha256="2" * 64)},
        baseline=dataclasses.replace(two.baseline, sha256="f" * 64),
    )
    for row in (one, two):
        append_row(tmp_path / "runs.jsonl", row)
    done = invoke("compare", "gptq", "int2", "--rows", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert [c["what"] for c in said["windows"]] == ["perplexity"] and said["tasks"] == []
    assert said["in_words"][1:] == [
        "KL is not compared: gptq and int2 were measured against different baselines.",
        "arc:4 is not compared: the items of gptq and int2 are not the same ones.",
    ]


def test_items_are_compared_one_by_one(swept, tmp_path):
    """Two models each right on two of four items, but not on the same."""
    rows = [find_row(swept, name) for name in ("gptq", "int2")]
    for row, right in zip(rows, ((0, 1), (1, 2))):
        score = TaskScore("acc", 0.5, 0.25, 4, "1" * 64, "1.0")
        append_row(tmp_path / "runs.jsonl", dataclasses.replace(row, tasks={"arc:4": score}))
        items = [Item(i, f"{i}", {"acc": float(i in right), "acc_norm": 0.0}) for i in range(4)]
        write_items(tmp_path, row.key, {"arc:4": items})
    done = invoke("compare", "gptq", "int2", "--rows", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    (test,) = json.loads(done.stdout.splitlines()[-1])["tasks"]
    assert test == {"task": "arc:4", "items": 4, "both": 1, "only_a": 1, "only_b": 1, "neither": 1, "p": 1.0}
    shutil.rmtree(tmp_path / "items")
    gone = invoke("compare", "gptq", "int2", "--rows", tmp_path)
    assert gone.exit_code == 1 and "were kept where the row was measured" in gone.stderr


def test_the_command_baseline(tiny_checkpoint, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setitem(
        PROTOCOLS, "llamacpp-512", NamedProtocol("llamacpp-512", 32, 32, "second-half", raw=True)
    )
    path = tmp_path / "base.kld"
    done = invoke("baseline", tiny_checkpoint, path, "--text", tiny_text, "--windows", 3, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["windows"] == 3
    assert path.read_bytes()[:8] == b"_logits_"
    how = ["--protocol", "llamacpp-512", "--text", tiny_text, "--windows", 3, "--no-speed", "--json"]
    row = invoke("eval", tiny_checkpoint, "--baseline", path, *how)
    assert row.exit_code == 0, row.stderr
    said = json.loads(row.stdout.splitlines()[-1])
    assert said["protocol"]["baseline"] == "16-bit" and abs(said["divergence"]["kl"]) < 1e-6
    assert said["protocol"]["name"] == "llamacpp-512"
