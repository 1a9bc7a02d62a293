"""Sweeps written down: what a file says, what is a slip in it, and several models in one."""

import json
import shutil

import pytest

from brise.eval.spec import SpecError, load_spec, run_spec
from brise.eval.sweep import run_sweep
from brise.model.checkpoint import CheckpointError
from brise.quant.config import QuantConfig, QuantSpec

from .small_sweep import CONFIGS


@pytest.fixture(scope="module")
def settings(tiny_text):
    return {"text": f"{tiny_text}#evaluation", "windows": 4, "length": 32}


@pytest.fixture(scope="module")
def here(tiny_checkpoint, settings, tmp_path_factory):
    """The rows of a sweep in this process."""
    out = tmp_path_factory.mktemp("here")
    return run_sweep(tiny_checkpoint, CONFIGS, out, **settings).rows


SPEC = """
models: [{model}]
configs:
  - int8
  - beside.json
  - name: mine
    rules: [{{match: "*layers.*", format: int4, group_size: 32, algorithm: gptq}}]
    calibration: {{text: "{text}#calibration", windows: 4, length: 32}}
metrics:
  - {{text: "{text}#evaluation", windows: 4, length: 32}}
  - {{text: "{text}#evaluation", windows: 2, length: 32, dtype: bfloat16}}
calibration: {{windows: 3, once: true}}
"""


def test_a_sweep_written_down(here, tiny_checkpoint, tiny_text, tmp_path):
    path = tmp_path / "sweep.yaml"
    (tmp_path / "beside.json").write_text(json.dumps(CONFIGS["nf4"].to_dict()))
    path.write_text(SPEC.format(model=tiny_checkpoint, text=tiny_text))
    spec = load_spec(path)
    assert list(spec.configs) == ["int8", "beside", "mine"] and spec.cells == 8
    result = run_spec(spec, tmp_path / "out")
    assert not result.failures and len(result.rows) == 8
    by = {(row.name, row.protocol.dtype): row for row in result.rows}
    assert by["int8", "float32"].perplexity == here[1].perplexity
    mine = by["mine", "float32"]
    assert mine.config["calibration"]["windows"] == 3 and mine.config["calibration"]["hessians"] == "once"
    assert by["mine", "bfloat16"].protocol.windows == 2
    assert run_spec(spec, tmp_path / "out").skipped == ["source", "int8", "beside", "mine"] * 2


@pytest.mark.parametrize(
    "text, says",
    [
        ("models: [a]\nconfigs: [nf4]\nmetric: {}", "unknown key metric"),
        ("models: a\nconfigs: [nf4]", "models must be a list"),
        ("models: [a]\nconfigs: []", "configs must be a list"),
        ("models: [a]\nconfigs: [nf4, nf4]", "two configurations are named nf4"),
        ("models: [a]\nconfigs: [{rules: []}]", "needs a name"),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {window: 3}", "unknown key window; known: text"),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {speed: fast}", "speed must be"),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {speed: {prompts: 3}}", "speed: "),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {dtype: float12}", "unknown dtype 'float12'"),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {tasks: lambada}", "tasks must be a list"),
        ("models: [a]\nconfigs: [nf4]\ncalibration: {window: 3}", "unknown key window"),
        ("models: [a]\nconfigs: [{name: b, preset: nf4, rules: []}]", "configs: b: unknown key rules"),
        ("models: [a, a]\nconfigs: [nf4]", "the model a is named twice"),
        ("models: [a]\nconfigs: [nf4]\nmetrics: []", "got an empty list"),
        (
            "models: [a]\nconfigs: [nf4]\nmetrics: {windows: '3'}",
            "windows must be a whole number of at least 0",
        ),
        (
            "models: [a]\nconfigs: [nf4]\nmetrics: {length: 0}",
            "length must be a whole number of at least 1, got 0",
        ),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {batch: true}", "batch must be a whole number"),
        (
            "models: [a]\nconfigs: [nf4]\nmetrics: {seed: -1}",
            "seed must be a whole number of at least 0, got -1",
        ),
        (
            "models: [a]\nconfigs: [nf4]\nmetrics: {protocol: gptq}",
            "protocol must be free or one of gptq-2048",
        ),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {dtype: int8}", "unknown dtype 'int8'"),
        (
            "models: [a]\nconfigs: [nf4]\nmetrics: {speed: {repeats: 0}}",
            "speed: expected repeats of at least 1",
        ),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {tasks: [lambada_ofline:0]}", "NAME:LIMIT"),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {tasks: [ark_offline]}", "unknown task 'ark_offline'"),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {batches: [1]}", "give both or neither"),
        (
            "models: [a]\nconfigs: [nf4]\nmetrics: {batches: [0], contexts: [4]}",
            "batches must be whole numbers",
        ),
        ("models: [a]\nconfigs: [nf4]\ncalibration: {once: 'no'}", "once must be true or false, got 'no'"),
        (
            "models: [a]\nconfigs: [nf4]\ncalibration: {draws: three}",
            "draws must be a whole number of at least 0",
        ),
        (
            "models: [a]\nconfigs: [nf4]\ncalibration: {windows: 0}",
            "windows must be a whole number of at least 1",
        ),
        ("[1, 2]", "expected a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_file_that_describes_no_sweep(text, says, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=says):
        load_spec(path)


def test_every_model_is_found_before_the_first_is_worked_on(tiny_checkpoint, settings, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"models: [{tiny_checkpoint}, {tmp_path / 'none'}]\nconfigs: [int8]")
    with pytest.raises(CheckpointError, match="none"):
        run_spec(load_spec(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_that_cannot_begin_does_not_stop_the_others(tiny_checkpoint, settings, tmp_path):
    """And checkpoints of two models of one name do not lie on top of one another."""
    other = tmp_path / "other" / tiny_checkpoint.name
    shutil.copytree(tiny_checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    path, notes = tmp_path / "sweep.yaml", []
    metrics = "{" + f"text: '{settings['text']}', windows: 4, length: 32" + "}"
    path.write_text(f"models: [{other}, {tiny_checkpoint}]\nconfigs: [int8]\nmetrics: {metrics}")
    result = run_spec(load_spec(path), tmp_path / "out", note=notes.append)
    assert [row.name for row in result.rows] == ["source", "int8"]
    assert [f.name for f in result.failures] == [f"part 1 ({other})"]
    assert "at most 16 tokens" in str(result.failures[0]) and str(result.failures[0]) in notes
    assert (tmp_path / "out" / "tiny-2" / "int8" / "config.json").is_file()


def test_draws_and_one_pass(tiny_checkpoint, tiny_text, settings, tmp_path):
    spec = QuantSpec(format="int4", group_size=32, algorithm="gptq")
    calibration = {"text": f"{tiny_text}#calibration", "windows": 2, "length": 32}
    config = QuantConfig.from_dict(
        {"rules": [{"match": "*layers.*", **spec.to_dict()}], "calibration": calibration}
    )
    result = run_sweep(
        tiny_checkpoint,
        {"gptq": config, "int8": CONFIGS["int8"]},
        tmp_path,
        draws=2,
        calibrate_once=True,
        **settings,
    )
    assert [row.name for row in result.rows] == [
        "source",
        "gptq.d0",
        "gptq.d1",
        "int8",
    ] and not result.failures
    one, two = result.rows[1:3]
    assert one.perplexity != two.perplexity and one.config["calibration"]["seed"] == 0
    assert len(list((tmp_path / ".cells" / "hessians").glob("*/manifest.json"))) == 2
