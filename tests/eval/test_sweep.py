"""Evaluation and sweeps, end to end on a tiny random model, against transformers and against each other."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from brise.eval import cells as cells_module
from brise.eval import provenance
from brise.eval.assets import fetch
from brise.eval.data import TextError, load_text
from brise.eval.evaluate import evaluate, make_setting, measure_source
from brise.eval.memory import ledger_of_checkpoint, predict_ledger
from brise.eval.record import read_rows
from brise.eval.speed import SpeedProtocol
from brise.eval.sweep import run_sweep
from brise.model.checkpoint import load_model
from brise.quant.config import Calibration, ConfigError, QuantConfig, QuantSpec, Rule

SMALL = {"windows": 4, "length": 32}


def rules(**spec) -> QuantConfig:
    calibration = Calibration(windows=4, length=32)
    return QuantConfig((Rule(("*layers.*",), QuantSpec(**spec)),), calibration)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a random Mistral, a tokenizer of bytes, and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=12,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("\n\n".join(f"Passage {i}: " + "the wind is light. " * 12 for i in range(30)))
    return str(path)


def test_a_row_of_a_plain_model_against_transformers(source, text):
    seen = []
    speed = SpeedProtocol(prompt=8, new_tokens=2, warmup=0, repeats=2)
    row = evaluate(source, text=text, speed=speed, progress=lambda *s: seen.append(s), command="c", **SMALL)
    theirs = MistralForCausalLM.from_pretrained(source)
    ids = make_setting(source, text, **SMALL).windows.ids
    with torch.no_grad():
        nll = sum(float(theirs(x[None], labels=x[None]).loss) for x in ids) / 4
    assert row.perplexity.nll == pytest.approx(nll, rel=1e-5)
    assert (row.perplexity.tokens, row.perplexity.windows) == (4 * 31, 4)
    assert row.is_source and row.name == "tiny" and row.divergence is None and row.relative is None
    assert row.memory.bytes == sum(p.nbytes for p in theirs.parameters()) and row.memory.bits_per_weight == 32
    assert row.memory.kv_cache == 2 * 2 * 2 * 16 * 12 * 4 and row.memory.kv_length == 32  # the window's 12
    assert row.memory.loaded is not None and row.memory.loaded >= row.memory.bytes
    assert row.memory.gpu_peak is None
    assert row.speed is not None and row.speed.prompt == 8
    p = row.protocol
    assert (p.text, p.windows, p.length, p.stride, p.dtype, p.device) == (text, 4, 32, 32, "float32", "cpu")
    assert p.text_sha256 == load_text(text).sha256 and not p.bos
    assert row.provenance.command == "c"
    assert ("score", 4, 4) in seen and ("speed", 2, 2) in seen
    same = evaluate(source, text=text, speed=speed, **SMALL)
    assert (same.key, same.perplexity) == (row.key, row.perplexity)
    assert evaluate(source, text=text, **SMALL).key != row.key


def test_a_row_names_the_code_that_was_there_when_it_was_begun(source, text, monkeypatch):
    now = ["first"]
    monkeypatch.setattr(provenance, "_code", [])
    monkeypatch.setattr(provenance, "commit", lambda: now[0])

    def progress(*_):  # somebody commits while the windows are scored
        now[0] = "second"

    assert evaluate(source, text=text, progress=progress, **SMALL).provenance.commit == "first"
    assert now == ["second"]


def test_longer_windows_than_positions_are_refused(source, text):
    with pytest.raises(ValueError, match="at most 256 tokens, the model's positions, got 257"):
        evaluate(source, text=text, windows=1, length=257)


def test_another_dtype_is_another_protocol(source, text):
    row = evaluate(source, text=text, dtype=torch.bfloat16, **SMALL)
    plain = evaluate(source, text=text, **SMALL)
    assert row.protocol.dtype == "bfloat16" and row.memory.bytes == plain.memory.bytes
    assert row.memory.loaded is not None and row.memory.loaded < 0.6 * plain.memory.bytes
    assert row.perplexity.value == pytest.approx(plain.perplexity.value, rel=0.05)
    assert row.perplexity.value != plain.perplexity.value


@pytest.fixture(scope="module")
def swept(source, text, tmp_path_factory):
    """A sweep of three configurations, one of them broken."""
    out = tmp_path_factory.mktemp("sweep")
    configs = {
        "int8": rules(format="int8"),
        "broken": rules(format="int4", group_size=48),
        "nf4": rules(format="nf4", group_size=32, double_quant=True),
        "gptq": dataclasses.replace(
            rules(format="int4", group_size=32, algorithm="gptq"),
            calibration=Calibration(text=f"{text}#calibration", windows=4, length=32),
        ),
    }
    seen = []
    settings = {"text": f"{text}#evaluation", **SMALL}
    result = run_sweep(source, configs, out, progress=lambda *s: seen.append(s), **settings)
    return source, configs, out, settings, result, seen


def test_a_sweep_goes_on_after_a_cell_that_fails(swept):
    _, _, out, _, result, seen = swept
    assert [row.name for row in result.rows] == ["source", "int8", "nf4", "gptq"]
    assert [failure.name for failure in result.failures] == ["broken"]
    assert isinstance(result.failures[0].error, ConfigError) and "group_size 48" in str(result.failures[0])
    assert result.skipped == [] and result.problems == []
    assert read_rows(out / "runs.jsonl") == (result.rows, [])
    assert not (out / "broken").exists()
    assert ("int8: score", 4, 4) in seen and any(stage == "gptq: quantize" for stage, _, _ in seen)


def test_a_figure_that_no_row_can_hold_is_a_failing_cell(swept, tmp_path, monkeypatch):
    """As of a broken model, whose perplexity is beyond what a float holds."""
    source, configs, _, settings, *_ = swept
    plain = cells_module.measure_checkpoint

    def measure(folder, *args, **kwargs):
        row = plain(folder, *args, **kwargs)
        broken = dataclasses.replace(row.perplexity, value=math.inf)
        return dataclasses.replace(row, perplexity=broken) if row.name == "int8" else row

    monkeypatch.setattr(cells_module, "measure_checkpoint", measure)
    configs = {name: configs[name] for name in ("int8", "nf4")}
    result = run_sweep(source, configs, tmp_path, **settings)
    assert [row.name for row in result.rows] == ["source", "nf4"]
    assert str(result.failures[0]).startswith("int8: NotFiniteError: int8 has no finite perplexity.value")
    assert [row.name for row in read_rows(tmp_path / "runs.jsonl")[0]] == ["source", "nf4"]


def test_the_figures_of_a_sweep(swept):
    source, configs, out, _, result, _ = swept
    rows = {row.name: row for row in result.rows}
    base = rows["source"]
    assert base.is_source
    for name in ("int8", "nf4", "gptq"):
        row = rows[name]
        assert row.baseline == base.model and row.protocol == base.protocol
        assert row.relative.value == pytest.approx(row.perplexity.value / base.perplexity.value - 1, rel=1e-9)
        assert row.memory.bytes == ledger_of_checkpoint(out / name).nbytes
        model_config = MistralConfig.from_pretrained(source)
        assert row.memory.bytes == predict_ledger(model_config, configs[name]).nbytes
        assert row.quantize_seconds > 0
        with torch.no_grad():
            windows = make_setting(source, **swept[3]).windows.ids
            model = load_model(out / name)
            p, q = (
                torch.log_softmax(m(windows).logits[:, :-1].double(), -1) for m in (load_model(source), model)
            )
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert row.divergence.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert row.divergence.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert rows["int8"].divergence.kl < rows["gptq"].divergence.kl
    assert rows["gptq"].algorithms == {"gptq"} and rows["nf4"].algorithms == {"rtn"}
    assert rows["gptq"].config["calibration"]["windows"] == 4
    assert math.isclose(
        rows["int8"].memory.bits_per_weight, 8 * rows["int8"].memory.bytes / base.memory.parameters
    )


def test_an_evaluation_by_itself_gives_the_sweeps_figures(swept):
    source, _, out, settings, result, _ = swept
    row = evaluate(out / "nf4", baseline=source, **settings)
    expected = next(row for row in result.rows if row.name == "nf4")
    for field in ("name", "model", "baseline", "config", "protocol", "perplexity", "relative", "divergence"):
        assert getattr(row, field) == getattr(expected, field), field


def test_what_is_done_is_not_done_again(swept, monkeypatch):
    source, configs, out, settings, first, _ = swept
    configs = {name: config for name, config in configs.items() if name != "broken"}

    def refuse(*args, **kwargs):
        raise AssertionError("ran again")

    with monkeypatch.context() as patch:
        patch.setattr(cells_module, "quantize_checkpoint", refuse)
        patch.setattr(cells_module, "measure_source", refuse)
        result = run_sweep(source, configs, out, **settings)
    assert result.rows == first.rows and result.skipped == ["source", "int8", "nf4", "gptq"]
    assert len((out / "runs.jsonl").read_text().splitlines()) == 4


def test_a_checkpoint_without_its_row_is_used(swept, tmp_path, monkeypatch):
    source, configs, out, settings, first, _ = swept
    shutil.copytree(out, tmp_path / "copy")
    lines = (out / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "copy" / "runs.jsonl").write_text("".join(lines[:2]) + lines[2][:50])  # killed while it wrote
    monkeypatch.setattr(cells_module, "quantize_checkpoint", lambda *a, **k: pytest.fail("made again"))
    result = run_sweep(
        source, {"int8": configs["int8"], "nf4": configs["nf4"]}, tmp_path / "copy", **settings
    )
    assert result.skipped == ["source", "int8"] and len(result.problems) == 1
    again, before = result.rows[2], first.rows[2]
    assert (again.key, again.perplexity, again.divergence) == (
        before.key,
        before.perplexity,
        before.divergence,
    )
    assert again.quantize_seconds == before.quantize_seconds
    rows, problems = read_rows(tmp_path / "copy" / "runs.jsonl")
    assert [row.name for row in rows] == ["source", "int8", "nf4"] and problems == []


def test_another_configuration_of_the_same_name_is_another_row(swept, tmp_path):
    source, _, out, settings, _, _ = swept
    shutil.copytree(out, tmp_path / "copy")
    result = run_sweep(source, {"nf4": rules(format="nf4", group_size=16)}, tmp_path / "copy", **settings)
    assert result.skipped == ["source"] and result.failures == []
    assert result.rows[1].memory.bytes != ledger_of_checkpoint(out / "nf4").nbytes
    assert len(read_rows(tmp_path / "copy" / "runs.jsonl")[0]) == 5


def test_a_sweep_killed_while_it_made_a_checkpoint_makes_it_again(swept, tmp_path):
    source, configs, out, settings, _, _ = swept
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy" / "runs.jsonl").unlink()
    marker = tmp_path / "copy" / ".cells" / "nf4.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "seconds": None}))
    result = run_sweep(source, {"nf4": configs["nf4"]}, tmp_path / "copy", **settings)
    assert result.failures == [] and [row.name for row in result.rows] == ["source", "nf4"]


def test_a_folder_that_is_not_the_sweeps_is_not_touched(swept, tmp_path):
    source, configs, _, settings, _, _ = swept
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "mine.txt").write_text("mine")
    for _ in range(2):
        result = run_sweep(source, {"int8": configs["int8"]}, tmp_path, **settings)
        assert [failure.name for failure in result.failures] == ["int8"]
        assert [p.name for p in (tmp_path / "int8").iterdir()] == ["mine.txt"]


def test_a_checkpoint_that_is_not_the_sweeps_is_not_replaced(swept, tmp_path):
    source, configs, out, settings, _, _ = swept
    shutil.copytree(out / "nf4", tmp_path / "int8")  # somebody's, whole and well, and of this name
    before = {p.name: p.read_bytes() for p in (tmp_path / "int8").iterdir()}
    for _ in range(2):  # having failed on it once does not make it the sweep's
        result = run_sweep(source, {"int8": configs["int8"]}, tmp_path, **settings)
        assert [failure.name for failure in result.failures] == ["int8"]
        assert {p.name: p.read_bytes() for p in (tmp_path / "int8").iterdir()} == before


def test_a_checkpoint_of_other_bytes_than_predicted_gets_no_row(swept, tmp_path, monkeypatch):
    source, configs, _, settings, _, _ = swept
    other = predict_ledger(MistralConfig.from_pretrained(source), configs["nf4"])
    monkeypatch.setattr(cells_module, "predict_ledger", lambda *_: other)
    result = run_sweep(source, {"int8": configs["int8"]}, tmp_path, **settings)
    assert [failure.name for failure in result.failures] == ["int8"]
    assert [row.name for row in read_rows(tmp_path / "runs.jsonl")[0]] == ["source"]


def test_a_source_that_has_its_row_is_not_timed_again(swept, tmp_path, monkeypatch):
    source, configs, _, settings, _, _ = swept
    settings = {**settings, "speed": SpeedProtocol(prompt=4, new_tokens=1, warmup=0, repeats=1)}
    first = run_sweep(source, {}, tmp_path, **settings)
    timed = []
    plain = cells_module.measure_source
    monkeypatch.setattr(
        cells_module, "measure_source", lambda s, how, **k: (timed.append(how.speed), plain(s, how, **k))[1]
    )
    result = run_sweep(source, {"int8": configs["int8"]}, tmp_path, **settings)
    assert timed == [None] and result.rows[0] == first.rows[0]
    assert result.rows[1].speed is not None


def test_predictions_that_a_failing_cell_left_behind_are_used(swept, tmp_path, monkeypatch):
    source, configs, _, settings, _, _ = swept
    bad = {"bad": rules(format="int4", group_size=48)}
    assert [f.name for f in run_sweep(source, bad, tmp_path, **settings).failures] == ["bad"]
    monkeypatch.setattr(cells_module, "measure_source", lambda *_, **__: pytest.fail("measured again"))
    result = run_sweep(source, {"int8": configs["int8"]}, tmp_path, **settings)
    assert [row.name for row in result.rows] == ["source", "int8"]
    assert not list((tmp_path / ".cells" / "baselines").glob("*.safetensors"))  # all cells are done


def test_calibration_and_evaluation_may_share_nothing(swept, tmp_path):
    source, configs, _, _, _, _ = swept
    text = swept[3]["text"].partition("#")[0]
    with pytest.raises(TextError, match="passages stand in both"):
        run_sweep(source, {"gptq": configs["gptq"]}, tmp_path, text=text, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_calibration_can_be_named_anew_and_the_row_says_so(swept, tmp_path):
    source, configs, _, settings, _, _ = swept
    result = run_sweep(source, {"gptq": configs["gptq"]}, tmp_path, calibration_windows=2, **settings)
    assert result.failures == [] and result.rows[1].config["calibration"]["windows"] == 2


@pytest.mark.parametrize("name", ["source", "a/b", "..", ""])
def test_names_that_cannot_be_folders(name, swept, tmp_path):
    source, configs, _, settings, _, _ = swept
    with pytest.raises(ValueError, match="cannot be named"):
        run_sweep(source, {name: configs["int8"]}, tmp_path, **settings)


def test_presets_and_files_by_name(swept, tmp_path):
    source, _, _, settings, _, _ = swept
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(rules(format="int4", group_size=32).to_dict()))
    result = run_sweep(source, ["int8", path], tmp_path / "out", **settings)
    assert [row.name for row in result.rows] == ["source", "int8", "mine"]
    apart = run_sweep(source, ["int8"], tmp_path / "rows", checkpoints=tmp_path / "made", **settings)
    assert [p.name for p in (tmp_path / "rows").iterdir()] == ["runs.jsonl"] and not apart.failures
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == [".cells", "int8"]
    with pytest.raises(ConfigError, match="neither a file nor a preset"):
        run_sweep(source, ["int8", "nf5"], tmp_path / "none", **settings)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="two configurations are named int8"):
        run_sweep(source, ["int8", "int8"], tmp_path / "none", **settings)


def test_a_source_row_and_its_baseline_come_from_one_pass(source, text):
    setting = make_setting(source, text, **SMALL)
    row, baseline = measure_source(source, setting)
    assert baseline.scores.perplexity == row.perplexity and baseline.info == row.model
    assert baseline.hidden.shape == (4, 32, 64)


@pytest.mark.assets
def test_smollm2_has_the_perplexity_of_transformers_model():
    folder = fetch("smollm2-135m")
    row = evaluate(folder, windows=2, length=256)
    theirs = MistralForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        ids = make_setting(folder, windows=2, length=256).windows.ids
        nll = sum(float(theirs(x[None], labels=x[None]).loss) for x in ids) / 2
    assert row.perplexity.nll == pytest.approx(nll, rel=1e-5)
    assert row.model.name == "smollm2-135m" and "Q4_1" in str(row.model.note)
    assert row.memory.parameters == 134_515_008 and row.memory.bits_per_weight == 32
