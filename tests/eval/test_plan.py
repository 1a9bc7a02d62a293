"""``brise plan``: right to the byte about what is made, and proposals that fit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner

from brise.cli.main import app
from brise.eval.budget_plan import candidates, mixed_plan, uniform_plans
from brise.eval.memory import ledger_of_checkpoint
from brise.eval.plan import Layout, parse_size
from brise.model.reader import CheckpointReader
from brise.model.source import open_source
from brise.model.stream import quantize_checkpoint
from brise.model.synth import SIZES, Size, write_synth
from brise.model.trouble import plain
from brise.quant.apply import resolve
from brise.quant.config import Calibration, QuantConfig, QuantSpec, Rule
from brise.quant.presets import PRESETS

GIB = 1 << 30


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output
    return result


def run_json(*words):
    return json.loads(run(*words, "--json").stdout.splitlines()[-1])


def tensor_bytes(folder):
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(n).nbytes for n in file.keys())  # noqa: SIM118 (no dict)
    return total


@pytest.mark.parametrize("config", ["nf4-dq-all", "int3-g32-asym", "int8-all"])
def test_the_ledger_is_right_to_the_byte(tiny_checkpoint, tmp_path, config):
    planned = run_json("plan", tiny_checkpoint, "-c", config)
    run("quantize", tiny_checkpoint, tmp_path / "q", "-c", config)
    assert planned["bytes"] == tensor_bytes(tmp_path / "q") == ledger_of_checkpoint(tmp_path / "q").nbytes
    found = ledger_of_checkpoint(tmp_path / "q").to_dict()
    assert {key: planned[key] for key in found} == found
    source = CheckpointReader(tiny_checkpoint)  # the head is tied, and is in no file
    assert planned["parameters"] == sum(torch.Size(source.info(n)[1]).numel() for n in source.names)


INTEGERS = st.builds(
    QuantSpec,
    format=st.sampled_from(["int2", "int3", "int4", "int8"]),
    group_size=st.sampled_from([None, 16, 32, 64]),
    symmetric=st.booleans(),
)
CODEBOOKS = st.builds(
    QuantSpec,
    format=st.sampled_from(["nf4", "fp4", "int4"]),
    group_size=st.sampled_from([16, 32, 64]),
    double_quant=st.booleans(),
)
SPEC = st.none() | INTEGERS | CODEBOOKS


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied") / "src"
    write_synth(Size(64, 192, 2, 4, 2, vocabulary=150), folder, None)
    return folder


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    specs=st.fixed_dictionaries(dict.fromkeys(("*q_proj", "*mlp*", "*layers.1.*", "ends"), SPEC)),
    shard=st.sampled_from([3000, 10**9]),
    tied=st.booleans(),
)
def test_the_ledger_is_right_to_the_byte_whatever_the_rules(
    tiny_checkpoint, untied, tmp_path, specs, shard, tied
):
    """Against the folder that is made, its files read by safetensors itself."""
    ends = specs.pop("ends")
    rules = [*specs.items(), ("*embed_tokens", ends), ("lm_head", ends)]
    config = QuantConfig(tuple(Rule((match,), spec) for match, spec in rules))
    src, out = tiny_checkpoint if tied else untied, tmp_path / "q"
    ledger = Layout.of(open_source(src)).ledger(config)
    assume(any(spec is not None for spec in [*specs.values(), ends]))
    quantize_checkpoint(src, out, config, max_shard_bytes=shard, overwrite=True)
    assert ledger.nbytes == tensor_bytes(out)
    assert ledger.to_dict() == ledger_of_checkpoint(out).to_dict()


class Described:
    """A source of shapes without data."""

    def __init__(self, size):
        self.folder, self.config = Path("nowhere"), size.config()
        self.tensors = {t.name: t for t in size.tensors()}
        self.names = sorted(self.tensors)

    def info(self, name):
        return self.tensors[name].dtype, self.tensors[name].shape

    def shard(self, name):
        return "model.safetensors"


def test_mistral_7b_in_nf4_with_everything_quantized():
    """The arithmetic of the promise: 4 bits, an 8-bit scale for 64, fp32 for 256 of those and one offset a weight."""
    layout = Layout.of(Described(SIZES["mistral-7b"]))
    plan = layout.plan(PRESETS["nf4-dq-all"], [4096, 32768])
    quantized = 7_241_732_096 - 65 * 4096
    by_hand = quantized // 2 + quantized // 64 + quantized // 64 // 256 * 4 + 226 * 4 + 65 * 4096 * 2
    assert plan.ledger.nbytes == by_hand == 3_736_181_248 + 226 * 4
    assert plan.ledger.nbytes <= 3.5 * GIB and plan.ledger.parameters == 7_241_732_096
    # 2 (K and V) x 32 blocks x 8 heads x 128 x 2 bytes, and the window of 4096 holds for 32768 as well
    assert plan.kv_cache == {4096: 4096 * 131072, 32768: 4096 * 131072}
    # the process, two steps' codes of the embedding (half a byte a weight) and the third being made
    codes, scales = 32000 * 4096 // 2, 32000 * 4
    assert plan.peak - 3 * codes - scales == pytest.approx(0.44e9, rel=0.05)
    assert plan.peak < 2.0e9 and plan.scratch == 0


def test_the_peak_of_gptq_at_full_width():
    """What must be there at once when down_proj is solved, and what the promise allows."""
    layout = Layout.of(Described(SIZES["mistral-7b"]))
    calibration = Calibration(windows=32, length=512)
    config = dataclasses.replace(PRESETS["gptq-int4-g128"], calibration=calibration)
    file, memory = (layout.plan(config, [], where) for where in ("file", "memory"))
    hessian = 14336 * 14336 * 4  # in fp32, and twice that for its factor in fp64; the weight in fp32
    assert 3 * hessian + 14336 * 4096 * 4 < file.peak < 6e9
    tokens, streams = 32 * 512, 2 if calibration.target == "full" else 1
    # the hidden states, and the inputs of down_proj, which are kept until it is quantized
    assert memory.peak - file.peak == tokens * 4096 * 4 * streams + tokens * 14336 * 4
    # what is behind a block stays until the next one is on record
    assert file.scratch == 2 * tokens * 4096 * 4 * streams and memory.scratch == 0


def test_the_ledger_in_words(tiny_checkpoint):
    said = run(
        "plan", tiny_checkpoint, "-c", "gptq-int4-g32", "--windows", 2, "--length", 16, "--lengths", 64
    ).stdout
    assert (
        "scales" in said and "KV cache of 64 tokens" in said and "bits each with everything counted" in said
    )


@pytest.mark.parametrize(
    "text, nbytes",
    [
        ("3.5GiB", 3758096384),
        ("3.5GB", 3500000000),
        ("900MB", 900000000),
        ("1.5MiB", 1572864),
        ("7KiB", 7168),
        ("7kB", 7000),
        ("12 B", 12),
        ("4.5bits", 450),
    ],
)
def test_sizes(text, nbytes):
    assert parse_size(text, 800) == nbytes


@pytest.mark.parametrize("text", ["3.5", "GiB", "-1GB", "3.5gib", "1e3B"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match=r"such as 3\.5GiB"):
        parse_size(text, 800)


def test_presets_that_fit_a_budget(tiny_checkpoint):
    found = run_json("plan", tiny_checkpoint, "--budget", "60kB", "--plain")["budgets"]["60kB"]
    assert found["budget"] == 60000 and found["mixed"] is None
    sizes = {u["name"]: u["nbytes"] for u in found["uniform"]}
    assert (
        sizes
        and max(sizes.values()) <= 60000
        and list(sizes.values()) == sorted(sizes.values(), reverse=True)
    )
    for name, nbytes in sizes.items():
        assert run_json("plan", tiny_checkpoint, "-c", name)["bytes"] == nbytes
    assert "nf4" not in sizes and "int4-g32-all" in sizes  # nf4 keeps an embedding that is too large
    assert all(not PRESETS[name].needs_calibration for name in sizes)
    # a preset that takes the budget to the byte fits it; below the smallest that one is named, with what it takes
    exact = run_json("plan", tiny_checkpoint, "--budget", f"{sizes['int4-g32-all']}B", "--plain")
    assert next(iter(exact["budgets"].values()))["uniform"][0]["nbytes"] == sizes["int4-g32-all"]
    least = min(sizes, key=lambda name: sizes[name])
    says = f"no preset fits {sizes[least] - 1:,} bytes: the smallest, {least}, takes {sizes[least]:,} bytes"
    words = ["plan", tiny_checkpoint, "--plain", "--budget", f"{sizes[least] - 1}B"]
    assert says in " ".join(run(*words, code=1).stderr.split())
    asked = run_json("plan", tiny_checkpoint, "--budget", "60kB")["budgets"]["60kB"]["uniform"]
    assert asked and all(u["name"].startswith("gptq-") for u in asked)


def test_a_mixture_that_fits_and_is_measured(tiny_checkpoint, tiny_text, tmp_path, monkeypatch):
    """The best mixture at the bytes of a preset is predicted, and measured, to be better than it."""
    monkeypatch.setenv("BRISE_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("scipy")
    words = ["plan", tiny_checkpoint, "--plain", "--mixed", "--windows", 4, "--length", 48]
    words += ["--text", f"{tiny_text}#calibration", "--like", "int3-g32-all", "--out", tmp_path / "out"]
    found = run_json(*words)
    (budget,) = found["budgets"].values()
    mixed = budget["mixed"]
    (uniform,) = [u for u in budget["uniform"] if u["name"] == "int3-g32-all"]
    assert mixed["bytes"] <= budget["budget"] == uniform["nbytes"]
    assert 0 < mixed["predicted_kl"] <= uniform["predicted"] and len(set(mixed["modules"].values())) > 1
    (file,) = found["files"]
    run("quantize", tiny_checkpoint, tmp_path / "q", "-c", file)
    assert ledger_of_checkpoint(tmp_path / "q").nbytes == mixed["bytes"]
    assert yaml.safe_load(Path(file).read_text())["rules"]
    run("quantize", tiny_checkpoint, tmp_path / "u", "-c", "int3-g32-all")
    kl = {}
    for name in ("q", "u"):
        said = run_json(
            *("eval", tmp_path / name, "--baseline", tiny_checkpoint, "--no-speed", "--windows", 6),
            *("--length", 64, "--text", f"{tiny_text}#evaluation"),
        )
        kl[name] = said["divergence"]["kl"]
    assert kl["q"] < kl["u"]
    assert run("plan", tiny_checkpoint, "--budget", "2kB", "--mixed", *words[2:10], code=1)


@pytest.mark.parametrize("keep_ends", [False, True])
def test_a_mixture_for_gptq_and_a_tied_head(tiny_checkpoint, keep_ends):
    """Losses that are made up: what counts is that the config says what was allotted, for every module."""
    pytest.importorskip("scipy")
    layout = Layout.of(open_source(tiny_checkpoint))
    specs = candidates(layout, "gptq-")
    paths = [t.path for t in layout.targets.values() if t.tied_to is None]
    losses = {p: {n: (1 + i) * 4.0 ** -int(n[3]) for n in specs} for i, p in enumerate(paths)}
    calibration = Calibration(windows=3, length=16)
    budget = layout.ledger(PRESETS["int3-g32" if keep_ends else "int3-g32-all"]).nbytes
    mixed = mixed_plan(layout, budget, losses, specs, calibration, keep_ends=keep_ends)
    assert mixed.nbytes <= budget and mixed.config.calibration == calibration
    resolved = {path: spec for path, (spec, _) in resolve(mixed.config, layout.targets.values()).items()}
    embedding = resolved.pop("model.embed_tokens")
    assert resolved.pop("lm_head") == embedding
    assert (embedding is None) == keep_ends
    if embedding is not None:
        assert embedding == plain(specs[mixed.allocation.chosen["model.embed_tokens"]])
    for path, spec in resolved.items():
        name = mixed.allocation.chosen[path]
        assert spec == (None if name == "keep" else specs[name])
    assert list(mixed.allocation.chosen) == paths and len(set(mixed.allocation.chosen.values())) > 1


def test_what_a_preset_is_predicted_to_lose(tiny_checkpoint):
    """The sum over what it quantizes: with -all the embedding too, and nothing where a module was not measured."""
    layout = Layout.of(open_source(tiny_checkpoint))
    paths = [t.path for t in layout.targets.values() if t.tied_to is None]
    losses = {p: {"int4-g32": 1.0 if ".layers." in p else 100.0} for p in paths}
    plans = {u.name: u.predicted for u in uniform_plans(layout, 10**9, "", losses)}
    assert plans["int4-g32"] == 14.0 and plans["int4-g32-all"] == 114.0 and plans["nf4"] is None
    assert not any(name.startswith("gptq-") for name in plans)
    assert all(u.name.startswith("gptq-") for u in uniform_plans(layout, 10**9, "gptq-"))


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "nothing to plan"),
        (["-c", "nf4", "--lengths", "a"], "--lengths takes numbers"),
        (["--budget", "3 bananas"], "such as 3.5GiB"),
        (["--budget", "1MB", "--measure"], "--measure needs --mixed"),
    ],
)
def test_mistakes(tiny_checkpoint, words, says):
    assert says in run("plan", tiny_checkpoint, *words, code=1).stderr
