"""Which module becomes what: on transformers' own tiny Mistral, tied and untied."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from brise.kernels import native
from brise.quant.apply import find_targets, quantize_model, quantize_weight, resolve, swap, tie_quantized
from brise.quant.config import ConfigError, QuantConfig, QuantSpec, Rule
from brise.quant.linear import QuantEmbedding, QuantLinear
from brise.quant.presets import PRESETS

transformers = pytest.importorskip("transformers")

LINEARS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)} | {
    "gate_proj": (128, 64),
    "up_proj": (128, 64),
    "down_proj": (64, 128),
}
PATHS = [f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS]


def tiny(tied: bool = False) -> Any:
    config = transformers.MistralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=None,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config).eval()


def rules(*pairs) -> QuantConfig:
    return QuantConfig(
        tuple(Rule((match,) if isinstance(match, str) else match, spec) for match, spec in pairs)
    )


INT4 = QuantSpec(format="int4", group_size=32)
NF4 = QuantSpec(format="nf4", group_size=32)
IDS = torch.tensor([[1, 5, 9, 95, 0, 7]])


@pytest.mark.parametrize("tied", [False, True])
def test_targets(tied):
    targets = find_targets(tiny(tied))
    assert [t.path for t in targets] == ["model.embed_tokens", *PATHS, "lm_head"]
    for t in targets:
        name = t.path.rpartition(".")[2]
        assert t.shape == SHAPES.get(name, (96, 64))
        assert t.kind == ("embedding" if name == "embed_tokens" else "linear")
        assert t.tied_to == ("model.embed_tokens" if tied and name == "lm_head" else None)


def test_first_match_wins_and_the_rest_is_kept():
    config = rules(("*layers.0.*", None), ("*q_proj", NF4), ("*layers.*", INT4))
    got = resolve(config, find_targets(tiny()))
    assert list(got) == ["model.embed_tokens", *PATHS, "lm_head"]
    for path, (spec, reason) in got.items():
        if "layers.0." in path:
            assert (spec, reason) == (None, "kept by rule *layers.0.*")
        elif path.endswith("q_proj"):
            assert (spec, reason) == (NF4, "rule *q_proj")
        elif "layers.1." in path:
            assert (spec, reason) == (INT4, "rule *layers.*")
        else:
            assert (spec, reason) == (None, "no rule matches it")


def test_rule_that_matches_nothing():
    with pytest.raises(
        ConfigError, match=r"the rule \*layer\.\* matches no module; .*: model\.embed_tokens, model"
    ):
        resolve(rules(("*layers.*", INT4), ("*layer.*", NF4)), find_targets(tiny()))


def test_width_that_is_no_multiple_names_the_module():
    spec = QuantSpec(format="int4", group_size=96)
    with pytest.raises(
        ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj: width 64 is no multiple .* 16 or 32 or 64"
    ):
        resolve(rules(("*layers.*", spec)), find_targets(tiny()))


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(format="int4", group_size=32, algorithm="gptq"), QuantSpec(format="nf4", scale="hessian")],
)
def test_embedding_that_asks_for_inputs(spec):
    with pytest.raises(
        ConfigError, match=r"embed_tokens is an embedding: it has no input .* with algorithm rtn"
    ):
        resolve(rules(("*", spec)), find_targets(tiny()))


def test_tied_head_and_embedding():
    targets = find_targets(tiny(tied=True))
    both = resolve(rules((("*embed_tokens", "lm_head"), NF4)), targets)
    assert both["lm_head"] == (NF4, "tied to model.embed_tokens")
    assert both["model.embed_tokens"] == (NF4, "rule *embed_tokens, lm_head")
    # a rule for the embedding alone takes the head with it
    assert resolve(rules(("*embed_tokens", NF4)), targets)["lm_head"] == (NF4, "tied to model.embed_tokens")
    # neither: both are kept
    assert resolve(rules(("*layers.*", NF4)), targets)["lm_head"] == (None, "tied to model.embed_tokens")
    assert resolve(rules(("*", NF4)), targets)["lm_head"][0] == NF4
    for disagreeing in (
        rules(("lm_head", NF4)),
        rules(("lm_head", NF4), ("*embed_tokens", INT4)),
        rules(("lm_head", None), ("*embed_tokens", INT4)),
        rules(("*embed_tokens", None), ("lm_head", INT4)),
    ):
        with pytest.raises(
            ConfigError, match=r"lm_head shares its weight with model\.embed_tokens, so both must"
        ):
            resolve(disagreeing, targets)
    # untied they may differ
    untied = resolve(rules(("lm_head", NF4), ("*embed_tokens", INT4)), find_targets(tiny()))
    assert (untied["lm_head"][0], untied["model.embed_tokens"][0]) == (NF4, INT4)


def test_every_preset_resolves():
    for name, config in PRESETS.items():
        targets = find_targets(wide())
        specs = {path: spec for path, (spec, _) in resolve(config, targets).items() if spec is not None}
        assert len(specs) == (9 if name.endswith("-all") else 7)


def wide() -> nn.Module:
    """One layer, all widths multiples of 128, no weights."""
    config = transformers.MistralConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )
    with torch.device("meta"):
        return transformers.MistralForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "nf4",
        "nf4-dq-all",
        "fp4-all",
        "int8-all",
        "int4",
        "int4-g64-all",
        "int3-g32-asym",
        "int2-g64-asym-all",
    ],
)
def test_quantize_model(name, tied):
    model = tiny(tied)
    weights = {path: w.detach().clone() for path, w in model.state_dict().items()}
    plain = copy.deepcopy(model)
    report = quantize_model(model, PRESETS[name])
    everything = name.endswith("-all")
    assert [o.path for o in report.outcomes] == ["model.embed_tokens", *PATHS, "lm_head"]
    assert [o.path for o in report.quantized] == [
        *(["model.embed_tokens"] if everything else []),
        *PATHS,
        *(["lm_head"] if everything else []),
    ]
    assert {o.path for o in report.kept} == {o.path for o in report.outcomes} - {
        o.path for o in report.quantized
    }
    for outcome in report.outcomes:
        assert outcome.reason
        module = model.get_submodule(outcome.path)
        original = weights[f"{outcome.path}.weight"]
        if outcome.spec is None:
            assert isinstance(module, nn.Linear | nn.Embedding)
            assert outcome.nbytes is None and outcome.relative_error is None
            assert outcome.reason in ("no rule matches it", "tied to model.embed_tokens")
            assert torch.equal(module.weight, original)
            continue
        assert isinstance(module, QuantLinear | QuantEmbedding)
        expected = quantize_weight(outcome.path, original, outcome.spec)
        for tensor, value in expected.tensors.items():
            assert torch.equal(module.get_buffer(tensor), value)
        error = (original - expected.dequantize()).double()
        assert outcome.relative_error == pytest.approx(
            float((error**2).sum() / (original.double() ** 2).sum()), rel=1e-4
        )
        assert outcome.nbytes == expected.nbytes
        # the same model with the dequantized weight in place of the quantized one
        plain.get_submodule(outcome.path).weight.data = expected.dequantize()
    if tied and everything:
        head, table = model.lm_head, model.model.embed_tokens
        assert all(head.get_buffer(n) is table.get_buffer(n) for n in head.quantized().tensors)
    with torch.no_grad(), native.without():  # torch's own sums, in both
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    data = json.loads(json.dumps(report.to_dict()))
    spec = report.outcomes[1].spec
    assert spec is not None and QuantSpec.from_dict(data["modules"][1]["spec"]) == spec


def test_calibration_is_asked_for():
    model = tiny()
    before = {n: id(m) for n, m in model.named_modules()}
    for name in ("gptq-nf4", "gptq-int4-g64-all"):
        with pytest.raises(ConfigError, match=r"needs calibration data: use brise\.model\.stream"):
            quantize_model(model, PRESETS[name])
    assert {n: id(m) for n, m in model.named_modules()} == before


def test_half_precision_model_stays_in_its_dtype():
    model = tiny(tied=True).to(torch.bfloat16)
    quantize_model(model, PRESETS["nf4-dq-all"])
    assert model.model.embed_tokens.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(IDS).logits.dtype == torch.bfloat16
    other = tiny().to(torch.bfloat16)
    quantize_model(other, PRESETS["nf4-all"], dtype=torch.float16)
    assert other.model.embed_tokens.dtype == torch.float16


def test_a_linear_with_a_bias_keeps_it():
    model: Any = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8, bias=False))
    expected = model[0].bias.detach().clone()
    report = quantize_model(model, rules(("0", NF4)))
    assert torch.equal(model[0].bias, expected)
    assert [(o.path, o.reason) for o in report.kept] == [("1", "no rule matches it")]


def test_weight_that_is_not_finite_names_the_module():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(
        ValueError, match=r"^model\.layers\.1\.mlp\.up_proj: the weight .* holds 1 NaN or infinite"
    ):
        quantize_model(model, PRESETS["nf4"])


@pytest.mark.parametrize("tied", [False, True])
def test_swap_then_strict_load_gives_the_same_model(tied):
    model = tiny(tied)
    report = quantize_model(model, PRESETS["int4-g32-all"])
    empty = tiny(tied)
    specs = {o.path: o.spec for o in report.quantized if o.spec is not None}
    swap(empty, specs, torch.float32)
    for path in specs:
        module = empty.get_submodule(path)
        assert isinstance(module, QuantLinear | QuantEmbedding)
        assert all(t.is_meta for t in module.buffers())
    empty.load_state_dict(model.state_dict(), strict=True, assign=True)
    if tied:
        tie_quantized(empty.lm_head, empty.model.embed_tokens)
        assert empty.lm_head.qweight.data_ptr() == empty.model.embed_tokens.qweight.data_ptr()
    with torch.no_grad():
        assert torch.equal(empty(IDS).logits, model(IDS).logits)


def test_swap_refuses_what_is_no_weight():
    with pytest.raises(ConfigError, match=r"model\.norm is a MistralRMSNorm: only Linear and Embedding"):
        swap(tiny(), {"model.norm": NF4}, torch.float32)


def test_a_quantized_model_has_nothing_left_to_quantize():
    model = tiny()
    quantize_model(model, rules(("*", NF4)))
    assert find_targets(model) == []
    with pytest.raises(ConfigError, match="matches no module"):
        quantize_model(model, rules(("*", NF4)))
