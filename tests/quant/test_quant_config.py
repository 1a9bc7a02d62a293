"""Specs, rules and presets: round trips through dicts, JSON and YAML, and every error with its way out."""

import dataclasses
import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from brise.quant.algorithms import ALGORITHMS
from brise.quant.config import (
    SCALE_DTYPES,
    SCALE_RULES,
    Calibration,
    ConfigError,
    QuantConfig,
    QuantSpec,
    Rule,
)
from brise.quant.formats import FORMATS
from brise.quant.gptq import GPTQOptions
from brise.quant.presets import PRESETS


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_survive_dict_json_and_yaml(name, tmp_path):
    config = QuantConfig.load(name)
    assert config is PRESETS[name]
    assert QuantConfig.from_dict(config.to_dict()) == config
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    assert QuantConfig.load(tmp_path / "c.json") == config
    assert QuantConfig.load(str(tmp_path / "c.yaml")) == config


def test_presets_that_are_promised():
    for name in (
        "nf4",
        "nf4-dq",
        "nf4-dq-all",
        "int8",
        "int4-g64",
        "gptq-int4-g64",
        "gptq-nf4",
        "gptq-int3-g64",
    ):
        assert name in PRESETS
    body = PRESETS["gptq-nf4"].rules[0].spec
    assert body is not None
    assert (body.format, body.algorithm, body.group_size, body.scale_dtype) == ("nf4", "gptq", 64, "float32")
    for name, config in PRESETS.items():
        assert config.needs_calibration == name.startswith(("gptq-", "classic-gptq-"))
        assert any(rule.matches("lm_head") for rule in config.rules) == name.endswith("-all")
        for path in (
            "model.layers.0.self_attn.q_proj",
            "layers.31.mlp.down_proj",
            "model.layers.7.mlp.up_proj",
        ):
            assert config.rules[0].matches(path)
        assert not config.rules[0].matches("lm_head")
        assert not config.rules[0].matches("model.embed_tokens")


@st.composite
def specs(draw):
    algorithm = draw(st.sampled_from(list(ALGORITHMS)))
    format = draw(st.sampled_from(list(FORMATS)))
    integer = format.startswith("int")
    symmetric = draw(st.booleans()) if integer else True
    double_quant = draw(st.booleans())
    rules = [r for r in SCALE_RULES if r != "absmax_narrow" or (integer and symmetric)]
    scale = draw(st.sampled_from(rules))
    options = None
    if algorithm == "gptq":
        damp = draw(st.floats(1e-6, 1.0))
        options = GPTQOptions(
            act_order=draw(st.booleans()),
            static_groups=True if double_quant or scale == "hessian" else draw(st.booleans()),
            damp=damp,
            damp_max=draw(st.floats(damp, 10.0)),
            block_size=draw(st.integers(1, 4096)),
            refits=draw(st.integers(0, 5)),
        )
    return QuantSpec(
        format=format,
        algorithm=algorithm,
        group_size=draw(st.none() | st.integers(2, 4096)),
        symmetric=symmetric,
        double_quant=double_quant,
        scale=scale,
        scale_dtype=draw(st.sampled_from(SCALE_DTYPES)),
        options=options,
    )


patterns = st.lists(st.text("abc.*[]?0123_", min_size=1, max_size=12), min_size=1, max_size=3).map(tuple)
configs = st.builds(
    QuantConfig,
    st.lists(st.builds(Rule, patterns, st.none() | specs()), min_size=1, max_size=4).map(tuple),
    st.builds(
        lambda walk, **kw: Calibration(true_sequential=walk[0], target=walk[1], **kw),
        walk=st.sampled_from([(True, "quantized"), (False, "quantized"), (True, "full")]),
        text=st.text("abc/. é", min_size=1, max_size=10),
        windows=st.integers(1, 10**6),
        length=st.integers(1, 10**6),
    ),
)


@given(specs())
@settings(max_examples=150)
def test_any_spec_survives(spec):
    data = spec.to_dict()
    assert QuantSpec.from_dict(data) == spec
    assert QuantSpec.from_dict(json.loads(json.dumps(data))) == spec
    assert QuantSpec.from_dict(yaml.safe_load(yaml.safe_dump(data))) == spec
    assert hash(QuantSpec.from_dict(data)) == hash(spec)
    assert set(data) >= {f.name for f in dataclasses.fields(QuantSpec)} - {
        "options"
    }  # complete: no default left out


@given(configs)
@settings(max_examples=100)
def test_any_config_survives(config):
    data = config.to_dict()
    assert QuantConfig.from_dict(data) == config
    assert QuantConfig.from_dict(json.loads(json.dumps(data))) == config
    assert QuantConfig.from_dict(yaml.safe_load(yaml.safe_dump(data))) == config


def test_defaults_follow_the_format():
    for name, group, dtype in (
        ("nf4", 64, "float32"),
        ("fp4", 64, "float32"),
        ("int8", None, "float16"),
        ("int4", 128, "float16"),
        ("int3", 128, "float16"),
        ("int2", 128, "float16"),
    ):
        spec = QuantSpec(format=name)
        assert (spec.group_size, spec.scale_dtype, spec.algorithm) == (group, dtype, "rtn")
        assert (spec.symmetric, spec.double_quant, spec.scale) == (True, False, "absmax")
    assert QuantSpec(format="nf4", group_size=None).group_size is None
    assert QuantSpec(format="int4", algorithm="gptq").options == GPTQOptions()
    assert QuantSpec(format="int4", algorithm="gptq", options={"damp": 0.1}).options.damp == 0.1


def test_frozen():
    spec = QuantSpec(format="nf4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.format = "int4"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["nf4"].rules = ()  # type: ignore[misc]


def test_needs_hessian():
    assert not QuantSpec(format="nf4").needs_hessian
    assert not QuantSpec(format="nf4", scale="mse").needs_hessian
    assert QuantSpec(format="nf4", scale="hessian").needs_hessian
    assert QuantSpec(format="nf4", algorithm="gptq").needs_hessian
    rules = (Rule(("a",), None), Rule(("b",), QuantSpec(format="int4", scale="hessian")))
    assert QuantConfig(rules).needs_calibration
    assert not QuantConfig(rules[:1]).needs_calibration


SPEC_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({}, "a spec needs a format, got only nothing"),
    ({"algorithm": "rtn"}, "a spec needs a format, got only algorithm"),
    ({"format": "int5"}, r"unknown format 'int5'; known: nf4, fp4, int2, int3, int4, int8"),
    ({"format": None}, "unknown format None"),
    ({"format": ["nf4"]}, r"unknown format \['nf4'\]"),
    ({"format": "nf4", "algorithm": "awq"}, r"unknown algorithm 'awq'; known: rtn, gptq"),
    ({"format": "nf4", "groupsize": 64}, "unknown key in a spec: groupsize; known: format, alg"),
    ({"format": "nf4", "group_size": 0}, "group_size must be an integer of at least 2 or null, got 0"),
    ({"format": "nf4", "group_size": 1}, "at least 2 or null, got 1"),
    ({"format": "nf4", "group_size": -2}, "at least 2 or null, got -2"),
    ({"format": "nf4", "group_size": 64.0}, r"at least 2 or null, got 64\.0"),
    ({"format": "nf4", "group_size": "64"}, "at least 2 or null, got '64'"),
    ({"format": "nf4", "group_size": True}, "at least 2 or null, got True"),
    ({"format": "int4", "symmetric": "no"}, "symmetric must be true or false, got 'no'"),
    ({"format": "int4", "symmetric": 0}, "symmetric must be true or false, got 0"),
    ({"format": "int4", "double_quant": None}, "double_quant must be true or false, got None"),
    ({"format": "nf4", "symmetric": False}, "nf4 has no zero point: leave symmetric at true"),
    ({"format": "fp4", "symmetric": False}, "fp4 has no zero point: leave symmetric at true"),
    ({"format": "nf4", "scale": "absmax_narrow"}, "a rule for integers; nf4 takes absmax, mse or hessian"),
    ({"format": "int4", "scale": "absmax_narrow", "symmetric": False}, r"use absmax \(the range from min"),
    ({"format": "nf4", "scale": "max"}, "one of absmax, absmax_narrow, mse, hessian, got 'max'"),
    ({"format": "nf4", "scale_dtype": "int8"}, "one of float16, bfloat16, float32, got 'int8'"),
    ({"format": "nf4", "options": {"damp": 0.1}}, "unknown option of rtn: damp; known: none"),
    ({"format": "nf4", "algorithm": "gptq", "options": {"dampp": 1}}, "option of gptq: dampp; known: act_"),
    ({"format": "nf4", "algorithm": "gptq", "options": 3}, "options of gptq must be a GPTQOptions, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), SPEC_ERRORS)
def test_spec_errors(data, message):
    with pytest.raises(ConfigError, match=message):
        QuantSpec.from_dict(data)
    with pytest.raises(ConfigError):  # and as part of a whole config
        QuantConfig.from_dict({"rules": [{"match": "*", **data}]})


NF4 = {"match": "*", "format": "nf4"}
CONFIG_ERRORS: list[tuple[Any, str]] = [
    ([], "a config is a mapping with rules, got list"),
    (None, "a config is a mapping with rules, got NoneType"),
    ({}, "rules must be a list of mappings"),
    ({"rules": []}, "a config needs at least one rule"),
    ({"rules": {}}, "rules must be a list of mappings"),
    ({"rules": ["nf4"]}, "rules must be a list of mappings"),
    ({"rules": [NF4], "rule": []}, "unknown key in a config: rule; known: rules, calibration"),
    ({"rules": [{"format": "nf4"}]}, "a rule needs match: a module path pattern or a list of them, got None"),
    ({"rules": [{**NF4, "match": []}]}, r"a rule needs match.*got \[\]"),
    ({"rules": [{**NF4, "match": 3}]}, "a rule needs match.*got 3"),
    ({"rules": [{**NF4, "match": ["a", 3]}]}, "a rule needs match.*'a', 3"),
    ({"rules": [{"match": "*", "keep": True, "format": "nf4"}]}, "unknown key in a rule that keeps: format"),
    ({"rules": [{**NF4, "keep": False}]}, "unknown key in a spec: keep"),
    ({"rules": [{"match": "*"}]}, "a spec needs a format"),
    ({"rules": [NF4], "calibration": {"window": 3}}, "key in a calibration: window; known: text, w"),
    ({"rules": [NF4], "calibration": "boolq"}, "calibration must be a mapping, got 'boolq'"),
    ({"rules": [NF4], "calibration": []}, "calibration must be a mapping"),
    ({"rules": [NF4], "calibration": {"windows": 0}}, "windows must be a positive integer, got 0"),
    ({"rules": [NF4], "calibration": {"length": "1k"}}, "length must be a positive integer, got '1k'"),
    ({"rules": [NF4], "calibration": {"windows": True}}, "windows must be a positive integer, got True"),
    ({"rules": [NF4], "calibration": {"target": "both"}}, "target must be quantized or full, got 'both'"),
    ({"rules": [NF4], "calibration": {"target": "full", "true_sequential": False}}, "in true-sequential order"),
    ({"rules": [NF4], "calibration": {"text": 3}}, "text must be a text by name or a file, got 3"),
    ({"rules": [NF4], "calibration": {"true_sequential": 1}}, "true_sequential must be true or false, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), CONFIG_ERRORS)
def test_config_errors(data, message):
    with pytest.raises(ConfigError, match=message):
        QuantConfig.from_dict(data)


def test_load_errors(tmp_path):
    with pytest.raises(
        ConfigError, match="nf5 is neither a file nor a preset; presets: nf4, nf4-all, gptq-nf4"
    ):
        QuantConfig.load("nf5")
    with pytest.raises(ConfigError, match="neither a file nor a preset"):
        QuantConfig.load(tmp_path)
    for name, text in (
        ("a.yaml", "rules: [\n"),
        ("a.json", "{'rules': 1}"),
        ("b.json", ""),
        ("a.yml", "\t- x: ["),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=rf"{name} is not valid \.{name[2:]}"):
            QuantConfig.load(tmp_path / name)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00rules")
    with pytest.raises(ConfigError, match="is not valid"):
        QuantConfig.load(tmp_path / "binary.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="mapping with rules, got NoneType"):
        QuantConfig.load(tmp_path / "empty.yaml")
    (tmp_path / "evil.yaml").write_text("!!python/object/apply:os.system [echo]")
    with pytest.raises(ConfigError, match="is not valid"):
        QuantConfig.load(tmp_path / "evil.yaml")


def test_a_file_as_a_user_writes_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        """
rules:
  - match: ["*layers.0.*", "*layers.29.*"]
    keep: true
  - match: "*down_proj"
    format: int8
    scale: absmax_narrow
  - match: "*layers.*"
    format: int4
    algorithm: gptq
    group_size: 64
    symmetric: false
    options: {damp: 0.05, act_order: false}
calibration: {windows: 16, length: 512}
"""
    )
    config = QuantConfig.load(path)
    kept, down, rest = config.rules
    assert kept == Rule(("*layers.0.*", "*layers.29.*"), None)
    assert down.match == ("*down_proj",)
    assert down.spec == QuantSpec(format="int8", scale="absmax_narrow", group_size=None)
    assert rest.spec == QuantSpec(
        format="int4",
        algorithm="gptq",
        group_size=64,
        symmetric=False,
        options=GPTQOptions(damp=0.05, act_order=False),
    )
    assert config.calibration == Calibration(windows=16, length=512)


def test_patterns_are_shell_wildcards_over_whole_paths():
    rule = Rule(("*layers.[0-3].*", "lm_head"), None)
    assert rule.matches("model.layers.2.mlp.up_proj")
    assert not rule.matches("model.layers.4.mlp.up_proj")
    assert not rule.matches("model.layers.12.mlp.up_proj")
    assert rule.matches("lm_head") and not rule.matches("model.lm_head") and not rule.matches("lm_head.x")
    assert not Rule(("LM_HEAD",), None).matches("lm_head")
