"""Weights and Hessians that cannot be quantized as asked: said by module, and done as the user chose."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from brise.cli.main import app
from brise.model import shards
from brise.model.checkpoint import load_model
from brise.model.job import JobFolder, job_path
from brise.model.reader import CheckpointReader
from brise.model.stream import quantize_checkpoint
from brise.model.trouble import Policy, TroubleError
from brise.quant.config import ConfigError, QuantConfig, QuantSpec, Rule
from brise.quant.presets import PRESETS
from brise.quant.rtn import rtn

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
EMBEDDING = "model.embed_tokens"
NF4, GPTQ = PRESETS["nf4"], PRESETS["gptq-int4-g32"]


@pytest.fixture
def spoil(tiny_checkpoint, tmp_path):
    """The tiny checkpoint with some weights changed."""

    def spoil(**change) -> Path:
        out = tmp_path / "spoiled"
        shutil.copytree(tiny_checkpoint, out)
        tensors = load_file(out / "model.safetensors")
        for name, function in change.items():
            path = {"up": UP, "down": DOWN, "embedding": EMBEDDING}[name]
            function(tensors[f"{path}.weight"])
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return out

    return spoil


def nan(w):
    w[3, 5] = float("nan")
    w[4, 6] = float("-inf")


@pytest.mark.parametrize("config", [NF4, GPTQ], ids=["plain", "gptq"])
def test_nan_and_infinity_fail_or_are_kept(spoil, tmp_path, config):
    src, ids = spoil(down=nan), IDS if config is GPTQ else None
    with pytest.raises(TroubleError, match=rf"{DOWN}: it holds 2 NaN or infinite weights .*nonfinite=keep"):
        quantize_checkpoint(src, tmp_path / "q", config, calibration=ids)
    shutil.rmtree(job_path(tmp_path / "q"), ignore_errors=True)
    report = quantize_checkpoint(
        src, tmp_path / "q", config, calibration=ids, policy=Policy(nonfinite="keep"), max_shard_bytes=9000
    )
    (kept,) = [o for o in report.kept if o.path == DOWN]
    assert kept.trouble == "it holds 2 NaN or infinite weights" and kept.reason == f"kept: {kept.trouble}"
    reader, source = CheckpointReader(tmp_path / "q"), CheckpointReader(src)
    assert (
        reader.tensor(f"{DOWN}.weight").equal(source.tensor(f"{DOWN}.weight")) is False
    )  # NaN is not itself
    same = (
        reader.tensor(f"{DOWN}.weight")
        .view(torch.int32)
        .equal(source.tensor(f"{DOWN}.weight").view(torch.int32))
    )
    assert same and DOWN not in reader.config["quantization_config"]["modules"]
    load_model(tmp_path / "q")
    written = json.loads((tmp_path / "q/quantization_report.json").read_text())["modules"]
    assert [m["trouble"] for m in written if m["path"] == DOWN] == [kept.trouble]
    if config is NF4:  # what was written before the shards were laid out anew is what it was
        spec = NF4.rules[0].spec
        other = rtn(source.tensor(f"{UP}.weight"), spec)
        assert torch.equal(reader.tensor(f"{UP}.qweight"), other.tensors["qweight"])


@pytest.mark.parametrize("config", [NF4, GPTQ], ids=["plain", "gptq"])
@pytest.mark.parametrize("shard", [5_000_000_000, 9000], ids=["one", "many"])
def test_what_is_kept_after_all_is_as_if_a_rule_had_kept_it(spoil, tmp_path, monkeypatch, config, shard):
    """The shards are laid out anew on the way; every tensor is the same, and no file is left of the first layout."""
    monkeypatch.setattr(shards, "_COPY", 1000)  # as large tensors, in several pieces
    job = {"calibration": IDS if config is GPTQ else None, "max_shard_bytes": shard}
    job["policy"] = Policy(nonfinite="keep")
    src, ruled = spoil(down=nan), QuantConfig((Rule((DOWN,), None), *config.rules), config.calibration)
    quantize_checkpoint(src, tmp_path / "ruled", ruled, **job)
    quantize_checkpoint(src, tmp_path / "after", config, **job)
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("ruled", "after")]
    assert names[0] == names[1]
    one, other = CheckpointReader(tmp_path / "ruled"), CheckpointReader(tmp_path / "after")
    assert one.names == other.names
    for name in one.names:
        a, b = (reader.tensor(name).reshape(-1).view(torch.uint8) for reader in (one, other))
        assert torch.equal(a, b), name


@pytest.mark.parametrize("shard", [5_000_000_000, 9000], ids=["one", "many"])
def test_an_end_between_the_new_shards_and_their_record(spoil, tmp_path, monkeypatch, shard):
    """What is gone on from is the old layout, whatever files there are of the new one."""
    src, out, job = spoil(down=nan), tmp_path / "q", {"policy": Policy(nonfinite="keep")}
    job["max_shard_bytes"] = shard
    quantize_checkpoint(src, tmp_path / "whole", NF4, **job)
    real = JobFolder.append

    def append(self, record):
        if record["generation"]:
            raise OSError(errno.EIO, "planted")
        real(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "append", append)
        with pytest.raises(OSError, match="planted"):
            quantize_checkpoint(src, out, NF4, **job)
    assert list((job_path(out) / "folder").glob("shard-*-1"))
    quantize_checkpoint(src, out, NF4, resume=True, **job)
    made, whole = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (out, tmp_path / "whole"))
    assert made == whole


def test_a_head_stays_tied_to_an_embedding_that_is_kept(spoil, tmp_path):
    src = spoil(embedding=nan)
    report = quantize_checkpoint(src, tmp_path / "q", PRESETS["nf4-all"], policy=Policy(nonfinite="keep"))
    assert [o.path for o in report.kept] == [EMBEDDING, "lm_head"]
    reader = CheckpointReader(tmp_path / "q")
    assert {"lm_head", EMBEDDING}.isdisjoint(reader.config["quantization_config"]["modules"])
    model = load_model(tmp_path / "q")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("config", [NF4, GPTQ], ids=["plain", "gptq"])
@pytest.mark.parametrize("action", ["round", "keep", "fail"])
def test_a_weight_of_zeros(spoil, tmp_path, config, action):
    src, ids = spoil(up=lambda w: w.zero_()), IDS if config is GPTQ else None
    policy = Policy(zero=action, dead="round", hessian="round")
    if action == "fail":
        with pytest.raises(TroubleError, match=f"{UP}: all its weights are zero"):
            quantize_checkpoint(src, tmp_path / "q", config, calibration=ids, policy=policy)
        return
    report = quantize_checkpoint(src, tmp_path / "q", config, calibration=ids, policy=policy)
    (outcome,) = [o for o in report.outcomes if o.path == UP]
    assert outcome.trouble == "all its weights are zero" and (outcome.spec is None) == (action == "keep")
    loaded = load_model(tmp_path / "q").get_submodule(UP)
    weight = loaded.weight if action == "keep" else loaded.quantized().dequantize()
    assert not weight.any()


def test_what_is_done_where_the_user_says_nothing():
    assert Policy().to_dict() == {"nonfinite": "fail", "zero": "round", "hessian": "fail", "dead": "round"}


def gptq(scale="absmax", **options) -> QuantConfig:
    spec = QuantSpec(format="int4", group_size=32, algorithm="gptq", scale=scale, options=options)
    return QuantConfig((Rule(("*layers.*",), spec),))


@pytest.mark.parametrize(
    "action, scale", [("fail", "mse"), ("round", "mse"), ("round", "hessian"), ("keep", "mse")]
)
def test_a_hessian_without_a_factor(tiny_checkpoint, tmp_path, monkeypatch, action, scale):
    """Not positive definite after the greatest damping: the next module is quantized as if nothing were."""
    from brise.quant import gptq as module

    real = module.damp

    def spoiled(hessian, share, order=None):
        damped = real(hessian, share, order)
        if hessian.shape[0] == 128:  # the inputs of down_proj
            damped[0, 0] = -1.0
        return damped

    monkeypatch.setattr(module, "damp", spoiled)
    job = {"calibration": IDS, "policy": Policy(hessian=action)}
    if action == "fail":
        with pytest.raises(TroubleError, match=r"damping 1 .*hessian=keep or hessian=round"):
            quantize_checkpoint(tiny_checkpoint, tmp_path / "q", gptq(scale), **job)
        return
    report = quantize_checkpoint(tiny_checkpoint, tmp_path / "q", gptq(scale), **job)
    by_path = {o.path: o for o in report.outcomes}
    assert "not positive definite" in by_path[DOWN].trouble and by_path[UP].trouble is None
    assert by_path[UP].spec.algorithm == "gptq"
    reader = CheckpointReader(tmp_path / "q")
    weight = CheckpointReader(tiny_checkpoint).tensor(f"{DOWN}.weight")
    if action == "keep":
        assert torch.equal(reader.tensor(f"{DOWN}.weight"), weight)
    else:
        # a search under the Hessian becomes one without
        assert (by_path[DOWN].spec.algorithm, by_path[DOWN].spec.scale) == ("rtn", "mse")
        expected = rtn(weight, by_path[DOWN].spec)
        assert all(torch.equal(reader.tensor(f"{DOWN}.{n}"), t) for n, t in expected.tensors.items())
    assert load_model(tmp_path / "q")(IDS).logits.isfinite().all()


@pytest.mark.parametrize("action", ["round", "keep", "fail"])
def test_dead_channels(spoil, tmp_path, action):
    """A row of zeros in up_proj: its channel of down_proj's input is always zero."""
    src = spoil(up=lambda w: w[7].zero_())
    path = "model.layers.0.mlp.down_proj"
    job = {"calibration": IDS, "policy": Policy(dead=action)}
    if action == "fail":
        with pytest.raises(TroubleError, match=f"{path}: 1 of 128 input channels are dead"):
            quantize_checkpoint(src, tmp_path / "q", gptq(), **job)
        return
    report = quantize_checkpoint(src, tmp_path / "q", gptq(), **job)
    found = {o.path: o.trouble for o in report.outcomes if o.trouble}
    assert list(found) == [path] and found[path].startswith("1 of 128 input channels are dead")
    kept = [o.path for o in report.kept if o.path.endswith("proj")]
    assert kept == ([path] if action == "keep" else [])


def test_the_command_says_what_was_in_trouble(spoil, tmp_path):
    src = str(spoil(down=nan))
    said = CliRunner().invoke(
        app, ["quantize", src, str(tmp_path / "q"), "-c", "nf4", "--on", "nonfinite=keep"]
    )
    assert said.exit_code == 0 and f"{DOWN}: it holds 2 NaN or infinite weights" in said.stdout


@pytest.mark.parametrize(
    "words, says",
    [
        (["nonfinite=round"], "must be fail or keep, got 'round'"),
        (["nans=keep"], "expected KIND=ACTION"),
        (["zero"], "expected KIND=ACTION"),
        (["zero=keep", "zero=fail"], "given twice"),
    ],
)
def test_a_policy_that_is_none(words, says):
    with pytest.raises(ConfigError, match=says):
        Policy.parse(words)
