"""What is copied and not quantized: NaN, infinity and zeros in it are said as of any weight."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from brise.cli.main import app
from brise.model.job import job_path
from brise.model.reader import CheckpointReader
from brise.model.stream import quantize_checkpoint
from brise.model.trouble import Policy, TroubleError
from brise.quant.config import QuantConfig, QuantSpec, Rule
from brise.quant.presets import PRESETS

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
NF4, GPTQ = PRESETS["nf4"], PRESETS["gptq-int4-g32"]
NORM, LAST, EMBEDDING = "model.layers.1.post_attention_layernorm", "model.norm", "model.embed_tokens"
KEEP = Policy(nonfinite="keep", hessian="round")


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def spoiled(tiny_checkpoint, tmp_path):
    """The tiny checkpoint with a value in two places of a tensor, or zeros in all."""

    def spoil(path, value):
        out = tmp_path / "spoiled"
        shutil.copytree(tiny_checkpoint, out, dirs_exist_ok=True)
        tensors = load_file(out / "model.safetensors")
        weight = tensors[f"{path}.weight"]
        # of the embedding in the row of a token that calibrates, so that all behind it is spoiled
        rows = weight[int(IDS[0, 0])] if weight.ndim == 2 else weight
        if value:
            rows[[5, 9]] = value
        else:
            weight.zero_()
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return out

    return spoil


@pytest.mark.parametrize("config", [NF4, GPTQ], ids=["plain", "gptq"])
@pytest.mark.parametrize("path", [NORM, LAST, EMBEDDING])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_copied_is_looked_at(spoiled, tmp_path, config, path, value):
    src, ids, out = spoiled(path, value), IDS if config is GPTQ else None, tmp_path / "q"
    words = "it holds 2 NaN or infinite weights"
    with pytest.raises(TroubleError, match=rf"^{path}: {words} .*nonfinite=keep"):
        quantize_checkpoint(src, out, config, calibration=ids)
    assert not out.exists()
    report = quantize_checkpoint(src, out, config, calibration=ids, policy=KEEP, overwrite=True)
    found = {o.path: o.trouble for o in report.outcomes if o.trouble and o.spec is None} | report.copied
    assert found == {path: words}
    assert (path in report.copied) == (path != EMBEDDING)  # the embedding could have been quantized
    made, source = CheckpointReader(out).tensor(f"{path}.weight"), CheckpointReader(src)
    assert torch.equal(made.view(torch.int32), source.tensor(f"{path}.weight").view(torch.int32))
    written = json.loads((out / "quantization_report.json").read_text())
    assert written["copied"] == report.copied


@pytest.mark.parametrize("path", [NORM, EMBEDDING])
def test_zeros_in_what_is_copied(spoiled, tmp_path, path):
    src = spoiled(path, 0.0)
    with pytest.raises(TroubleError, match=rf"^{path}: all its weights are zero"):
        quantize_checkpoint(src, tmp_path / "q", NF4, policy=Policy(zero="fail"))
    report = quantize_checkpoint(src, tmp_path / "q", NF4, overwrite=True)
    found = {o.path: o.trouble for o in report.outcomes if o.trouble} | report.copied
    assert found == {path: "all its weights are zero"}


def test_a_few_rows_at_a_time_and_zeros_in_some(spoiled, tmp_path, monkeypatch):
    monkeypatch.setattr("brise.model.copied._PIECE", 100)  # less than a row, and then a row at a time
    src = spoiled(EMBEDDING, 0.0)
    tensors = load_file(src / "model.safetensors")
    tensors[f"{EMBEDDING}.weight"][0] = 1.0
    tensors[f"{EMBEDDING}.weight"][[1, 1, 200], [5, 9, 3]] = torch.tensor(
        [float("inf"), float("nan"), -float("inf")]
    )
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    report = quantize_checkpoint(src, tmp_path / "q", NF4, policy=KEEP)
    (outcome,) = [o for o in report.outcomes if o.trouble]
    assert (outcome.path, outcome.trouble) == (EMBEDDING, "it holds 3 NaN or infinite weights")
    made = CheckpointReader(tmp_path / "q").tensor(f"{EMBEDDING}.weight")
    assert torch.equal(made.view(torch.int32), tensors[f"{EMBEDDING}.weight"].view(torch.int32))


def test_a_bias_of_zeros_is_a_good_one(tmp_path):
    """And one of NaN is not, though its Linear is quantized."""
    from transformers import MistralConfig, MistralForTokenClassification

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MistralForTokenClassification(MistralConfig(vocab_size=50, num_hidden_layers=1, **shape))
    src, everything = tmp_path / "src", QuantConfig((Rule(("*layers.*", "score"), NF4.rules[0].spec),))
    with torch.no_grad():
        model.score.bias.zero_()
        model.save_pretrained(src)
        assert quantize_checkpoint(src, tmp_path / "q", everything).copied == {}
        model.score.bias[1] = float("nan")
    model.save_pretrained(src)
    with pytest.raises(TroubleError, match=r"^score\.bias: it holds 1 NaN"):
        quantize_checkpoint(src, tmp_path / "k", everything)
    report = quantize_checkpoint(src, tmp_path / "k", everything, policy=KEEP, resume=True)
    assert report.copied == {"score.bias": "it holds 1 NaN or infinite weights"}


def test_a_job_goes_on_under_another_policy(spoiled, tmp_path):
    """Where nothing was met of what was to fail, the finished steps stand; the whole folder is as of the new policy."""
    src, out = spoiled(LAST, float("nan")), tmp_path / "q"
    quantize_checkpoint(src, tmp_path / "whole", NF4, policy=Policy(nonfinite="keep"))
    with pytest.raises(TroubleError) as caught:
        quantize_checkpoint(src, out, NF4)
    assert "3 of 4 steps are kept: resume to go on" in caught.value.__notes__[0]
    before = (job_path(out) / "journal").read_bytes()
    with pytest.raises(ValueError, match="differs in policy"):  # zeros may have been rounded already
        quantize_checkpoint(src, out, NF4, policy=Policy(nonfinite="keep", zero="keep"), resume=True)
    with pytest.raises(TroubleError):
        quantize_checkpoint(src, out, NF4, resume=True)
    assert (job_path(out) / "journal").read_bytes() == before
    words = ["quantize", str(src), str(out), "-c", "nf4", "--resume", "--on", "nonfinite=keep"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0 and f"{LAST}: it holds 2 NaN or infinite weights" in said.stdout
    assert contents(out) == contents(tmp_path / "whole")


def test_what_a_job_was_begun_under_is_what_it_was_last_gone_on_under(spoiled, tmp_path, monkeypatch):
    """fail, then keep, then fail: a kept step may be among the finished ones, so that is another job."""
    src, out = spoiled(EMBEDDING, float("nan")), tmp_path / "q"
    two = QuantConfig((Rule(("*layers.*",), QuantSpec(format="nf4", group_size=32)),))
    tensors = load_file(src / "model.safetensors")
    tensors[f"{EMBEDDING}.weight"].nan_to_num_()
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    tensors[f"{LAST}.weight"].zero_()
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TroubleError, match="up_proj"):
        quantize_checkpoint(src, out, two, policy=Policy(zero="fail"))
    with pytest.raises(TroubleError, match=LAST):
        quantize_checkpoint(src, out, two, policy=Policy(nonfinite="keep", zero="fail"), resume=True)
    with pytest.raises(ValueError, match="differs in policy"):
        quantize_checkpoint(src, out, two, policy=Policy(), resume=True)
    report = quantize_checkpoint(src, out, two, policy=Policy(nonfinite="keep"), resume=True)
    assert report.copied == {LAST: "all its weights are zero"}
    assert [o.path for o in report.outcomes if o.trouble] == ["model.layers.0.mlp.up_proj"]


def test_a_job_of_another_layout_of_its_journal_is_not_gone_on_with(spoiled, tmp_path):
    src, out = spoiled(LAST, float("nan")), tmp_path / "q"
    with pytest.raises(TroubleError):
        quantize_checkpoint(src, out, NF4)
    state = json.loads((job_path(out) / "job.json").read_text())
    (job_path(out) / "job.json").write_text(json.dumps({**state, "format": 1}))
    with pytest.raises(ValueError, match=r"differs in format \(1, now 2\)"):
        quantize_checkpoint(src, out, NF4, resume=True)
    assert quantize_checkpoint(src, out, NF4, policy=KEEP, overwrite=True).copied
