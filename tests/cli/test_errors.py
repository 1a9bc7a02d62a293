"""However a command fails: an exit code, one line on stderr, no traceback, and JSON where it was asked for."""

import json
import subprocess
import sys
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from brise.cli import progress as progress_module
from brise.cli.errors import describe
from brise.cli.main import app
from brise.cli.progress import Bars


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def files(tmp_path, tiny_checkpoint):
    """Config files with one mistake each, and an output folder that exists."""
    rule = "rules:\n- match: {match}\n  format: {fmt}\n"
    (tmp_path / "syntax.yaml").write_text("rules: [\n  - match: {a\n")
    (tmp_path / "key.yaml").write_text(rule.format(match="'*'", fmt="nf4") + "  grupsize: 64\n")
    (tmp_path / "format.yaml").write_text(rule.format(match="'*'", fmt="nf5"))
    (tmp_path / "nothing.yaml").write_text(rule.format(match="'*no_such*'", fmt="nf4"))
    (tmp_path / "group.yaml").write_text(rule.format(match="'*layers.*'", fmt="int4") + "  group_size: 48\n")
    (tmp_path / "list.yaml").write_text("- nf4\n")
    (tmp_path / "exists").mkdir()
    (tmp_path / "empty").mkdir()
    return tmp_path


# arguments ({t}: the test's folder, {m}: the model), exit code, a part of the message
MISTAKES = [
    ("quantize {t}/none {t}/out -c nf4", 1, "none"),
    ("quantize {t}/empty {t}/out -c nf4", 1, "config.json"),
    ("quantize {m} {t}/out -c nf5", 1, "did you mean nf4"),
    ("quantize {m} {t}/out -c {t}/none.yaml", 1, "neither a preset nor a file"),
    ("quantize {m} {t}/out -c {t}/syntax.yaml", 1, "not valid"),
    ("quantize {m} {t}/out -c {t}/key.yaml", 1, "unknown key in a spec: grupsize"),
    ("quantize {m} {t}/out -c {t}/format.yaml", 1, "unknown format 'nf5'"),
    ("quantize {m} {t}/out -c {t}/nothing.yaml", 1, "matches no module"),
    ("quantize {m} {t}/out -c {t}/group.yaml", 1, "no multiple of group_size 48"),
    ("quantize {m} {t}/out -c {t}/list.yaml", 1, "a config is a mapping"),
    ("quantize {m} {t}/exists -c nf4", 1, "pass --overwrite"),
    ("quantize {m} {t}/out -c nf4 --windows 3", 1, "--windows: this config rounds plainly"),
    ("quantize {m} {t}/out -c gptq-nf4 --text {t}/none.txt", 1, "none.txt"),
    ("quantize {m} {t}/out", 2, "Missing option '--config'"),
    ("quantize {m} {t}/out -c nf4 --windows many", 2, "'--windows'"),
    ("quantise {m} {t}/out", 2, "Did you mean 'quantize'?"),
    ("eval {m} --txt a", 2, "--txt"),
    ("eval {m} --length 64 --text {t}/none.txt", 1, "neither a file nor one of boolq"),
    ("eval {m} --length 4096 --text {t}/group.yaml", 1, "at most 128 tokens"),
    ("eval {t}/none", 1, "none"),
    ("fetch no-such-asset", 1, "smollm2-135m"),
    ("inspect {t}/empty", 1, "config.json"),
    ("inspect {m} -c {t}/group.yaml", 1, "no multiple of group_size 48"),
    ("inspect {m} --contexts 0", 1, "expected positive numbers"),
    ("inspect {m} --contexts 8 --sliding none", 1, "expected windows as numbers or own"),
    ("inspect {m} --sliding 8", 2, "is for the table of --contexts"),
    ("sweep --model {m} --configs nf4 --out {t}/out --timeout 0", 2, "--timeout"),
    ("report {t}/empty", 1, "runs.jsonl"),
    ("sweep --model {m} --configs nf4,nf5 --out {t}/s", 1, "nf5"),
    ("sweep {t}/syntax.yaml --out {t}/s", 1, "not valid YAML"),
    ("sweep {t}/list.yaml --out {t}/s", 1, "expected a mapping with models"),
    ("sweep {t}/list.yaml --out {t}/s --model {m}", 2, "a file says both itself"),
    ("sweep --model {m} -c nf4", 2, "'--out'"),
    ("sweep --out {t}/s", 2, "give both, or a file"),
    ("eval {m} --protocol gptq", 1, "expected a protocol of gptq-2048"),
    ("eval {m} --protocol gptq-2048 --stride 3", 1, "a BOS of its own"),
    ("eval {m} --task arc:0", 1, "expected a task as NAME"),
    ("eval {m} --batches 1,x", 1, "expected positive numbers"),
    ("compare nf4 int4 --rows {t}/empty", 1, "expected a row nf4 in"),
    ("compare {m} {t}/none", 1, "none"),
    ("rerun {t}/empty nf4", 1, "expected a row nf4 in"),
    ("calibrate {m} --out {t}/c --text {t}/none.txt", 1, "none.txt"),
    (
        "surface {m} --baseline {m} --sliding 0 --text {t}/list.yaml --length 4 --windows 1",
        1,
        "numbers or own",
    ),
    ("generate {m} --prompt a --chat", 1, "no chat template"),
    ("generate {m} --prompt=", 1, "no tokens"),
    ("generate {t}/none --prompt a", 1, "none"),
    ("generate {m}", 1, "either --prompt or --input"),
    ("generate {m} --input {t}/key.yaml", 1, "--input and --output go together"),
    ("generate {m} --input {t}/none.jsonl --output {t}/out", 1, "none.jsonl"),
    ("generate {m} --input {t}/key.yaml --output {t}/list.yaml", 1, "exists; choose another output"),
    ("generate {m} --prompt a --top-p 0", 1, "top_p must be a number above 0"),
    ("generate {m} --prompt a --max-new-tokens 0", 2, "--max-new-tokens"),
    ("generate {m} --prompt a --speculate {t}/none", 1, "none"),
    ("chat {m}", 1, "no chat template"),
    ("configs no-such", 1, "neither a preset nor a file"),
    ("bench", 2, "Missing command"),
    ("bench compile --kernel no-such", 1, "names begin with"),
    ("bench compile --arch 75", 1, "--arch must be one of 80, 90, got 75"),
]


@pytest.mark.parametrize("json_too", [False, True], ids=["plain", "json"])
@pytest.mark.parametrize("command, code, says", MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_said_in_one_line(files, tiny_checkpoint, command, code, says, json_too):
    words = command.format(t=files, m=tiny_checkpoint).split()
    if json_too and words == ["bench"]:
        words = ["bench", "tpu"]
        says = "tpu"
    result = invoke(*words, *(["--json"] if json_too else []))
    assert result.exit_code == code
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("brise: ") and says in lines[0], result.stderr
    if json_too:
        assert says in json.loads(result.stdout.splitlines()[-1])["error"]
    else:
        assert result.stdout == ""
    assert not (files / "out").exists()


def test_nothing_is_lost_of_a_folder_that_exists(files, tiny_checkpoint):
    (files / "exists/mine.txt").write_text("mine")
    invoke("quantize", tiny_checkpoint, files / "exists", "-c", "nf4")
    assert (files / "exists/mine.txt").read_text() == "mine"


def test_debug_shows_where_it_happened(tmp_path):
    result = invoke("report", tmp_path, "--debug")
    assert result.exit_code == 1 and "Traceback" in result.stderr and "ReportError" in result.stderr
    assert "Traceback" not in invoke("report", tmp_path).stderr


def test_an_error_that_nobody_foresaw_names_its_class(monkeypatch, tmp_path):
    def broken(folder):
        raise KeyError("codes")

    monkeypatch.setattr("brise.eval.report.write_report", broken)
    result = invoke("report", tmp_path, "--json")
    assert result.exit_code == 1
    assert result.stderr == "brise: KeyError: 'codes' (--debug shows where)\n"
    assert json.loads(result.stdout) == {"error": "KeyError: 'codes' (--debug shows where)"}


@pytest.mark.parametrize(
    "error, text",
    [
        (ValueError("two\n  lines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (ValueError(), "ValueError (--debug shows where)"),
        (RuntimeError("size mismatch"), "RuntimeError: size mismatch (--debug shows where)"),
    ],
)
def test_an_error_in_one_line(error, text):
    assert describe(error) == text


def test_an_interrupt_ends_with_130_in_one_line(monkeypatch, tmp_path):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("brise.eval.report.write_report", interrupted)
    result = invoke("report", tmp_path, "--json")
    assert result.exit_code == 130 and result.stderr == "brise: interrupted\n"
    assert json.loads(result.stdout) == {"error": "interrupted"}


def test_with_json_what_a_library_prints_goes_to_stderr(monkeypatch, tmp_path):
    from brise.eval.report import Report

    def noisy(folder):
        print("noise")
        return Report([folder / "table.md"], ["a torn line"])

    monkeypatch.setattr("brise.eval.report.write_report", noisy)
    result = invoke("report", tmp_path, "--json")
    assert json.loads(result.stdout) == {"files": [str(tmp_path / "table.md")], "left_out": ["a torn line"]}
    assert result.stderr == "noise\na torn line\n"


def brise(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", "from brise.cli.main import main; main()", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )


def test_the_program_itself(tmp_path, tiny_checkpoint):
    assert brise("--version").stdout == "brise 0.1.0\n"
    done = brise("quantize", tiny_checkpoint, "q", "-c", "int4-g64", "--json", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["path"] == "q"
    failed = brise("quantize", tiny_checkpoint, "q", "-c", "int4-g64", cwd=tmp_path)
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr == "brise: q exists; choose another folder, or pass --overwrite to replace it\n"


def test_help_and_version_import_nothing_heavy():
    code = """
import sys
from brise.cli.main import app
for words in (["--help"], ["--version"], ["quantize", "--help"]):
    try:
        app(words)
    except SystemExit as end:
        assert end.code == 0, end.code
heavy = {"torch", "transformers", "numpy", "yaml", "safetensors", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away_is_no_traceback():
    code = "from brise.cli.main import main; main()"
    # more than a pipe holds, so that the write meets the closed end
    command = [sys.executable, "-c", code, "configs", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert errors == ""


def test_progress_is_silent_when_it_is_quick(capsys):
    with Bars() as bars:
        bars("score", 1, 2)
        bars("score", 2, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_in_a_file_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "DELAY", 0.0)
    with Bars() as bars:
        for done in range(1, 4):
            bars("score", done, 3)
        bars("download", 2_000_000, 4_000_000)
    out, err = capsys.readouterr()
    assert out == "" and err == "score 1/3\ndownload 2/4 MB\n"


def test_progress_on_a_terminal_is_a_bar_that_goes_away(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "DELAY", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    console = Console(stderr=True, force_terminal=True, width=80)
    monkeypatch.setattr(progress_module, "_make_console", lambda: console)
    with Bars() as bars:
        bars("quantize", 3, 30)
        deadline = time.monotonic() + 10
        while not bars.visible and time.monotonic() < deadline:
            time.sleep(0.01)
        bars("quantize", 4, 30)
    out, err = capsys.readouterr()
    assert out == "" and "quantize" in err and "4/30" in err
