"""brise export and brise verify on the command line: what they say first, exit codes, documents, the hub."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from brise.cli.main import app


def run(*args, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def run_json(*args, code: int = 0) -> dict:
    return json.loads(run(*args, "--json", code=code).stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def made(tiny_checkpoint, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made")
    run("quantize", tiny_checkpoint, root / "int4", "--config", "int4-g32")
    run("export", root / "int4", root / "gptq", "--format", "gptq", "--base-model", "me/tiny")
    return root


def test_export_says_what_it_keeps_before_it_starts(made, tmp_path):
    result = run("export", made / "int4", tmp_path / "ct", "-f", "compressed-tensors")
    assert "to compressed-tensors: lossless, 14 weights" in result.stderr
    document = run_json("export", made / "gptq", tmp_path / "x", "-f", "awq", "--plan")
    assert document["lossless"] is True and document["path"] is None
    assert document["verdicts"] == {"exact": 14} and not (tmp_path / "x").exists()
    assert "base_model: me/tiny" in (made / "gptq" / "README.md").read_text()


def test_export_refuses_to_quantize_again_unless_it_is_asked_to(made, tmp_path):
    refused = run("export", made / "gptq", tmp_path / "bnb", "-f", "bitsandbytes", code=1)
    assert "14 of 14 weights need re-quantization" in refused.stderr and "--requantize" in refused.stderr
    assert not (tmp_path / "bnb").exists()
    run("export", made / "gptq", tmp_path / "bnb", "-f", "bitsandbytes", "--requantize")
    assert (tmp_path / "bnb" / "README.md").exists()
    assert "exists" in run("export", made / "gptq", tmp_path / "bnb", "-f", "awq", code=1).stderr
    assert (
        "there are bitsandbytes" in run("export", made / "gptq", tmp_path / "y", "-f", "gtpq", code=1).stderr
    )


def test_theirs_can_be_measured_inspected_and_quantized(made, tmp_path, tiny_checkpoint, tiny_text):
    small = ["--windows", "2", "--length", "32", "--no-speed", "--text", tiny_text]
    ours = run_json("eval", made / "int4", "--baseline", tiny_checkpoint, *small)
    theirs = run_json("eval", made / "gptq", "--baseline", tiny_checkpoint, *small, "--out", tmp_path)
    assert theirs["perplexity"] == ours["perplexity"] and theirs["divergence"] == ours["divergence"]
    assert run_json("inspect", made / "gptq")["bytes"] == run_json("inspect", made / "int4")["bytes"]
    run("export", made / "gptq", tmp_path / "card", "-f", "awq", "--results", tmp_path)
    assert "| perplexity |" in (tmp_path / "card" / "README.md").read_text()
    run("quantize", made / "gptq", tmp_path / "again", "--config", "int8")
    assert run_json("verify", tmp_path / "again", "--against", made / "gptq")["healthy"]


def test_a_gguf_file_is_a_source(made, tmp_path, tiny_text):
    pytest.importorskip("gguf")
    run("export", made / "int4", tmp_path / "gguf", "-f", "gguf-q4_0")
    file = tmp_path / "gguf" / "gguf-Q4_0.gguf"
    small = ["--windows", "2", "--length", "32", "--no-speed", "--text", tiny_text]
    ours, theirs = (run_json("eval", source, *small) for source in (made / "int4", file))
    assert theirs["perplexity"]["value"] == pytest.approx(ours["perplexity"]["value"], rel=1e-5)
    run("quantize", file, tmp_path / "again", "--config", "nf4")
    assert (tmp_path / "again" / "tokenizer.json").exists()
    assert run_json("verify", tmp_path / "again", "--against", file)["modules"] == 14


def test_verify_exits_with_1_and_names_the_module(made, tmp_path, tiny_checkpoint, tiny_text):
    good = run("verify", made / "gptq", "--against", tiny_checkpoint)
    assert "nothing is wrong (14 quantized modules)" in good.stdout
    bad = shutil.copytree(made / "gptq", tmp_path / "bad")
    stored = load_file(bad / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.scales"][0, 0] = float("nan")
    save_file(stored, bad / "model.safetensors")
    text = run("verify", bad, code=1).stdout
    assert "model.layers.1.mlp.up_proj: 1 scales are NaN" in text and "1 findings" in text
    document = run_json("verify", bad, code=1)
    assert document["findings"][0]["module"] == "model.layers.1.mlp.up_proj"
    gate = ["--text", tiny_text, "--windows", "2", "--length", "32", "--against", tiny_checkpoint]
    passed = run_json("verify", made / "gptq", *gate, "--kl", "1e9")
    assert passed["healthy"] and passed["kl"] > 0
    failed = run_json("verify", made / "gptq", *gate, "--kl", passed["kl"] / 2, code=1)
    assert failed["findings"][0]["module"] == "the model" and "nats a token" in failed["findings"][0]["what"]
    assert "--against" in run("verify", made / "gptq", "--kl", "1", code=1).stderr


def test_push_to_hub_creates_the_repository_and_uploads_the_folder(made, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            calls.append(("create", name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    run("export", made / "int4", tmp_path / "out", "-f", "gptq", "--push-to-hub", "me/tiny", "--private")
    assert calls[0] == ("create", "me/tiny", True, True)
    assert calls[1][:2] == ("upload", "me/tiny") and "README.md" in calls[1][2]
    refused = run(
        "export", made / "int4", tmp_path / "p", "-f", "gptq", "--push-to-hub", "a/b", "--plan", code=1
    )
    assert "--plan writes nothing" in refused.stderr
