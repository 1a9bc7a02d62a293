"""Hessians of one pass: against hooks on transformers' model, and what is solved from them against a plain run."""

import dataclasses

import pytest
import torch
from transformers import MistralForCausalLM

from brise.model.checkpoint import CheckpointError, load_model
from brise.model.hessian_store import HEAD, gather_hessians, open_store
from brise.model.stream import quantize_checkpoint
from brise.quant.apply import quantize_weight
from brise.quant.config import Calibration, ConfigError, QuantConfig, QuantSpec, Rule
from brise.quant.presets import PRESETS

ONCE = Calibration(hessians="once", true_sequential=False)


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (6, 32), generator=torch.Generator().manual_seed(seed))


def config(**spec) -> QuantConfig:
    return QuantConfig((Rule(("*layers.*",), QuantSpec(algorithm="gptq", **spec)),), ONCE)


@pytest.fixture(scope="module")
def store(tiny_checkpoint, tmp_path_factory):
    return gather_hessians(tiny_checkpoint, ids(), tmp_path_factory.mktemp("hessians"))


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint):
    """Path -> every input of that Linear, float64 [tokens, K], as transformers' own model gives them."""
    model = MistralForCausalLM.from_pretrained(tiny_checkpoint).eval()
    seen = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, path=path: seen.__setitem__(path, args[0].double().flatten(0, 1))
            )
    with torch.no_grad():
        model(ids())
    return seen


def test_every_hessian_is_that_of_the_unquantized_model(store, inputs):
    assert store.tokens == 6 * 32 and store.blocks == ("model.layers.0", "model.layers.1", HEAD)
    stages = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    for block in store.blocks[:-1]:
        for stage, name in enumerate(stages):
            x = inputs[f"{block}.{name}"]
            torch.testing.assert_close(store.load(block)[stage].double(), x.T @ x, rtol=1e-4, atol=1e-3)
    x = inputs["lm_head"]
    torch.testing.assert_close(store.load(HEAD)[0].double(), x.T @ x, rtol=1e-4, atol=1e-3)


def test_a_checkpoint_is_what_the_algorithm_makes_of_each_weight_by_itself(
    store, tiny_checkpoint, tmp_path, inputs
):
    wanted = config(format="int4", group_size=32)
    quantize_checkpoint(
        tiny_checkpoint, tmp_path / "out", wanted, calibration=ids(), hessians=store.folder.parent
    )
    made = load_model(tmp_path / "out")
    plain = load_model(tiny_checkpoint)
    for path in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        stage = 0 if "v_proj" in path else 3
        hessian = store.load(path[:14])[stage]
        alone = quantize_weight(
            path, plain.get_submodule(path).weight.data, wanted.rules[0].spec, hessian
        ).dequantize(torch.float32)
        got = made.get_submodule(path).quantized().dequantize(torch.float32)
        assert torch.equal(got, alone), path
        # and the Hessian was used: plain rounding has the larger error in the outputs
        rounded = quantize_weight(
            path, plain.get_submodule(path).weight.data, QuantSpec(format="int4", group_size=32)
        ).dequantize(torch.float32)
        w, x = plain.get_submodule(path).weight.double(), inputs[path]
        errors = [float(((q.double() - w) @ x.T).norm()) for q in (got, rounded)]
        assert errors[0] < 0.9 * errors[1], path


def test_many_are_solved_without_the_model_running(store, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("brise.model.hessian_store._gather", lambda *_: pytest.fail("the model ran again"))
    specs = [
        {"format": "int3", "group_size": 16},
        {"format": "nf4", "group_size": 32, "options": {"damp": 0.1, "act_order": False}},
        {"format": "int4", "group_size": None, "scale": "mse"},
    ]
    for number, spec in enumerate(specs):
        out = tmp_path / str(number)
        quantize_checkpoint(
            tiny_checkpoint, out, config(**spec), calibration=ids(), hessians=store.folder.parent
        )
        entry = load_model(out).config.quantization_config
        assert (entry if isinstance(entry, dict) else entry.to_dict())["config"]["calibration"][
            "hessians"
        ] == "once"
    with pytest.raises(pytest.fail.Exception, match="ran again"):
        quantize_checkpoint(
            tiny_checkpoint,
            tmp_path / "other",
            config(format="int4", group_size=32),
            calibration=ids(1),
            hessians=store.folder.parent,
        )


def test_without_a_folder_they_are_gathered_and_go(store, tiny_checkpoint, tmp_path):
    wanted = config(format="int4", group_size=32)
    head = Rule(("lm_head", "*embed_tokens"), QuantSpec(format="int8"))
    wanted = dataclasses.replace(wanted, rules=(*wanted.rules, head))
    quantize_checkpoint(tiny_checkpoint, tmp_path / "out", wanted, calibration=ids())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    quantize_checkpoint(
        tiny_checkpoint, tmp_path / "kept", wanted, calibration=ids(), hessians=store.folder.parent
    )
    one, two = (load_model(tmp_path / name)(ids()).logits for name in ("out", "kept"))
    assert torch.equal(one, two)


def test_a_store_that_lacks_a_file_is_refused(tiny_checkpoint, tmp_path):
    store = gather_hessians(tiny_checkpoint, ids(), tmp_path)
    (store.folder / "head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks head.safetensors: delete the folder"):
        open_store(store.folder)


def test_what_once_cannot_be_together_with():
    with pytest.raises(ConfigError, match="set target to quantized"):
        Calibration(hessians="once")
    with pytest.raises(ConfigError, match="sequential or once, got 'twice'"):
        Calibration(hessians="twice")
    with pytest.raises(ConfigError, match="whole number or null"):
        Calibration(seed=-1)


def test_configs_of_before_are_written_as_they_were():
    before = PRESETS["gptq-nf4"].to_dict()["calibration"]
    assert set(before) == {"text", "windows", "length", "true_sequential", "target"}
    later = dataclasses.replace(ONCE, seed=3).to_dict()
    assert later["hessians"] == "once" and Calibration.from_dict(later).seed == 3
