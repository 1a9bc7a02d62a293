"""Rows: written whole or not at all, read strictly; and where they say they come from."""

import dataclasses
import fcntl
import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch

from brise.eval import provenance
from brise.eval.compare import WindowSums
from brise.eval.divergence import Divergence
from brise.eval.model_info import ModelInfo, model_info
from brise.eval.perplexity import Perplexity, Relative
from brise.eval.provenance import Provenance, collect, commit, model_hash
from brise.eval.record import (
    METRICS_VERSION,
    Memory,
    NotFiniteError,
    Protocol,
    RecordError,
    Row,
    append_row,
    read_rows,
)
from brise.eval.speed import Rate, Speed, SpeedProtocol


def make_row(key: str = "k", **changes) -> Row:
    row = Row(
        metrics=METRICS_VERSION,
        key=key,
        name="int4",
        model=ModelInfo("int4", "b" * 64),
        baseline=ModelInfo("source", "a" * 64, "dequantized"),
        config={"rules": [{"match": ["*"], "format": "int4", "algorithm": "gptq"}], "n": None},
        protocol=Protocol("t", "0", "1", 4, 8, 8, 28, False, "float32", "cpu", SpeedProtocol(repeats=2)),
        perplexity=Perplexity(12.5, 0.5, 2.5257, None, 28, 4),
        relative=Relative(0.25, 0.01),
        divergence=Divergence(0.1, 0.01, 0.9, 0.02),
        memory=Memory(100, {"codes": 60}, {"linear": 100}, 200, 100, 4.0, None, 10, 8, None, 12, None),
        speed=Speed(Rate(3.0, 2.0, 4.0), Rate(1.0, 1.0, 1.0), 512, 16, 1, 2),
        quantize_seconds=None,
        provenance=Provenance({"torch": "2"}, "cpu", 2, 0, None, "brise sweep", "2026-01-01T00:00:00+00:00"),
    )
    return dataclasses.replace(row, **changes)


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    rows = [make_row("a"), make_row("b", config=None, speed=None, divergence=None), make_row("c")]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == (rows, [])
    assert path.read_text().count("\n") == 3
    line = json.loads(path.read_text().splitlines()[1])
    assert line["speed"] is None and line["memory"]["gpu_peak"] is None  # not measured: null, not zero
    assert read_rows(tmp_path / "none.jsonl") == ([], [])


@pytest.mark.parametrize("cut", [1, 20, 1000])
def test_a_torn_last_line_is_reported_and_then_replaced(cut, tmp_path):
    path = tmp_path / "runs.jsonl"
    append_row(path, make_row("a"))
    whole = path.read_bytes()
    append_row(path, make_row("b"))
    path.write_bytes(path.read_bytes()[:-cut])
    rows, problems = read_rows(path)
    assert [row.key for row in rows] == ["a"]
    assert len(problems) == 1 and "torn" in problems[0]
    append_row(path, make_row("c"))
    assert path.read_bytes().startswith(whole)
    assert [row.key for row in read_rows(path)[0]] == ["a", "c"] and not read_rows(path)[1]


def test_a_row_that_the_disk_takes_only_in_part_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"
    append_row(path, make_row("a"))
    whole, write = path.read_bytes(), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:100]))
        with pytest.raises(
            OSError, match=r"only 100 of \d+ bytes could be written to .*; is the disk full\?"
        ):
            append_row(path, make_row("b"))
    assert path.read_bytes() == whole


def test_a_file_of_nothing_but_a_torn_line(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b"x" * 70_000)  # longer than one look from the end
    assert read_rows(path)[0] == []
    append_row(path, make_row("a"))
    assert [row.key for row in read_rows(path)[0]] == ["a"]


def test_damage_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_row(path, make_row("a"))
    path.write_bytes(path.read_bytes()[:-30] + b"\n")
    append_row(path, make_row("b"))
    with pytest.raises(RecordError, match="line 1: not JSON"):
        read_rows(path)


def test_rows_of_another_version_are_left_out_and_reported(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_row(path, make_row("a", metrics=METRICS_VERSION + 1))
    append_row(path, make_row("b"))
    rows, problems = read_rows(path)
    assert [row.key for row in rows] == ["b"]
    assert problems == [f"{path}, line 1: metrics version {METRICS_VERSION + 1}, left out"]


@pytest.mark.parametrize(
    "where, value, message",
    [
        (["perplexity", "value"], "12", "row.perplexity.value: expected <class 'float'>, got '12'"),
        (["perplexity", "tokens"], 1.5, "row.perplexity.tokens: expected <class 'int'>"),
        (["protocol", "bos"], 1, "row.protocol.bos: expected <class 'bool'>"),
        (["protocol", "windows"], True, "row.protocol.windows: expected <class 'int'>"),
        (["memory", "by_kind", "codes"], None, "row.memory.by_kind.codes: expected"),
        (["perplexity"], None, "row.perplexity: expected an object"),
        (["surprise"], 1, "row: unknown field surprise"),
        (["speed", "surprise"], 1, "row.speed: unknown field surprise"),
    ],
)
def test_what_is_no_row_is_an_error(where, value, message):
    data = make_row().to_dict()
    target = data
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = value
    with pytest.raises(RecordError) as error:
        Row.from_dict(data)
    assert str(error.value).startswith(message)


def test_missing_fields_and_lines_that_are_no_objects(tmp_path):
    data = make_row().to_dict()
    del data["relative"]
    with pytest.raises(RecordError, match="the field relative is missing"):
        Row.from_dict(data)
    (tmp_path / "runs.jsonl").write_text("[1, 2]\n")
    with pytest.raises(RecordError, match="line 1"):
        read_rows(tmp_path / "runs.jsonl")


def test_figures_that_json_cannot_hold_are_not_written(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_row(path, make_row("a"))
    before = path.read_bytes()
    with pytest.raises(NotFiniteError, match=r"int4 has no finite relative\.value, got nan"):
        append_row(path, make_row("b", relative=Relative(float("nan"), None)))
    with pytest.raises(NotFiniteError, match=r"no finite sums\.nll\.1, got inf"):
        append_row(path, make_row("b", sums=WindowSums([1, 1], [1.0, math.inf], None)))
    assert path.read_bytes() == before


def append_many(path, name, once=False):
    for i in range(25):
        append_row(path, make_row(f"{name}{i}"), once=once)


def in_processes(function, arguments):
    """Call ``function`` in a process for each of the ``arguments``, all at once."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=function, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def test_rows_of_several_processes_do_not_mix(tmp_path):
    path = tmp_path / "runs.jsonl"
    in_processes(append_many, [(path, name) for name in "abc"])
    rows, problems = read_rows(path)
    assert not problems and {row.key for row in rows} == {f"{n}{i}" for n in "abc" for i in range(25)}


def test_whoever_writes_has_the_file_alone(tmp_path):
    """Another may be cutting off a torn line, or looking whether the row is there."""
    path = tmp_path / "runs.jsonl"
    append_row(path, make_row("a"))
    writer = threading.Thread(target=append_row, args=(path, make_row("b")))
    with path.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and len(read_rows(path)[0]) == 1
    writer.join(60)
    assert [row.key for row in read_rows(path)[0]] == ["a", "b"]


def test_of_processes_with_the_same_rows_each_is_written_once(tmp_path):
    path = tmp_path / "runs.jsonl"
    in_processes(append_many, [(path, "same", True)] * 4)
    rows, problems = read_rows(path)
    assert not problems and [row.key for row in rows] == [f"same{i}" for i in range(25)]


def test_algorithms_and_source():
    assert make_row().algorithms == {"gptq"} and not make_row().is_source
    source = make_row(config=None, baseline=None)
    assert source.algorithms == set() and source.is_source
    mixed = make_row(config={"modules": {"a": {"algorithm": "rtn"}, "b": [{"algorithm": "gptq"}], "c": None}})
    assert mixed.algorithms == {"rtn", "gptq"}
    plain = {"rules": [{"algorithm": "rtn", "scale": "absmax"}, {"keep": True}]}
    assert mixed.calibrated and not source.calibrated and not make_row(config=plain).calibrated
    plain["rules"][0]["scale"] = "hessian"  # rounding, but scales chosen under calibration
    assert make_row(config=plain).calibrated


def test_provenance_of_here_and_now():
    got = collect(torch.device("cpu"), seed=3, command="brise eval x", batch=5)
    assert got.versions["torch"] == torch.__version__ and got.versions["python"] == sys.version.split()[0]
    assert (got.seed, got.command, got.threads) == (3, "brise eval x", torch.get_num_threads())
    assert got.batch == 5 and got.device and got.time.endswith("+00:00")
    assert "brise" in got.versions


def test_the_commit_says_whether_files_differ(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    assert commit(tmp_path) is None
    git("init")
    assert commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "first")
    clean = commit(tmp_path)
    assert clean is not None and len(clean) == 40
    (tmp_path / "untracked").write_text("")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "runs.jsonl").write_text("a row")
    git("add", "results")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "rows")
    clean = commit(tmp_path)
    (tmp_path / "results" / "runs.jsonl").write_text("a row and its next")  # as by a sweep that goes on
    assert commit(tmp_path) == clean
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == f"{clean}-dirty"
    assert commit(tmp_path / "file") is None  # inside a checkout, but not its top


def test_the_commit_is_that_of_when_the_measuring_began(monkeypatch):
    """Who commits while a sweep runs changes no line of the code that it runs."""
    commits = iter(["first", "second"])
    monkeypatch.setattr(provenance, "_code", [])
    monkeypatch.setattr(provenance, "commit", lambda: next(commits))
    assert [provenance.code_commit(), collect(torch.device("cpu"), 0).commit] == ["first", "first"]
    provenance.inherit_code(None)  # a parent that is in no checkout: none is looked for
    assert collect(torch.device("cpu"), 0).commit is None


def test_the_command_names_no_folder_of_the_program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/opt/env/bin/brise", "eval", "my model"])
    assert provenance.command_line() == "brise eval 'my model'"


def checkpoint(folder, tensor=b"1", **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", **config}))
    (folder / "model.safetensors").write_bytes(tensor)
    return folder


def test_the_hash_is_of_the_model_and_of_nothing_else(tmp_path):
    one = checkpoint(tmp_path / "one", transformers_version="1")
    same = checkpoint(tmp_path / "same", transformers_version="2")
    (same / "README.md").write_text("hello")
    others = [
        checkpoint(tmp_path / "weights", b"2"),
        checkpoint(tmp_path / "config", rms_norm_eps=1),
        checkpoint(tmp_path / "more"),
    ]
    (others[2] / "second.safetensors").write_bytes(b"")
    assert model_hash(one) == model_hash(same)
    assert len({model_hash(folder) for folder in [one, *others]}) == 4


def test_a_hash_of_files_is_of_names_and_contents_in_any_order(tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (tmp_path / name for name in "abc")
    hashes = [provenance.hash_files(files) for files in ([a], [b], [c], [a, c], [b, c], [])]
    assert len(set(hashes)) == 6 and provenance.hash_files([c, a]) == hashes[3]
    assert model_hash(a) == hashes[0]  # a model of one file


def test_the_compiled_products_are_a_version(monkeypatch):
    monkeypatch.setattr(provenance.native, "processor", lambda: "a processor's kind")
    monkeypatch.setattr(provenance.native, "active", lambda: object())
    assert provenance.versions()["native"] == "a processor's kind"
    monkeypatch.setattr(provenance.native, "active", lambda: None)
    assert "native" not in provenance.versions()


def test_names_carry_no_path(tmp_path):
    folder = checkpoint(tmp_path / "mine")
    assert model_info(folder, str(folder)) == ModelInfo("mine", model_hash(folder), None)
    assert model_info(folder, "org/model").name == "org/model"  # a hub name's folder is a snapshot's hash
    (folder / "asset.json").write_text(json.dumps({"name": "smollm", "gives": "a small model"}))
    assert model_info(folder) == ModelInfo("smollm", model_hash(folder), "a small model")
    quantized = checkpoint(tmp_path / "nf4", quantization_config={"rules": []})
    (quantized / "asset.json").write_text((folder / "asset.json").read_text())
    assert model_info(quantized).name == "nf4"
