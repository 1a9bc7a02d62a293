"""``quantization_config`` of other libraries: what is written, by hand, and what is not read, by its key."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig

from brise.model.checkpoint import CheckpointError, save_model
from brise.model.foreign.export import export_checkpoint
from brise.model.foreign.reader import open_checkpoint
from brise.model.mistral import MistralForCausalLM
from brise.quant.apply import quantize_model
from brise.quant.config import QuantConfig

ORDER = {"algorithm": "gptq", "options": {"act_order": True, "static_groups": False}}
RULES = {
    "sym": {"format": "int4", "group_size": 32},
    "asym": {"format": "int4", "group_size": 32, "symmetric": False},
    "row8": {"format": "int8"},
    "fp4": {"format": "fp4", "group_size": 32},
    "nf4-dq": {"format": "nf4", "group_size": 32, "double_quant": True},
}
MADE = {
    "gptq": "sym",
    "gptq_v2": "asym",
    "awq": "asym",
    "compressed-tensors": "sym",
    "bitsandbytes": "nf4-dq",
    "bitsandbytes-int8": "row8",
}
UP = "model.layers.0.mlp.up_proj"
KEPT = "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Sources in bfloat16, one Linear kept, and a folder of each library."""
    root = tmp_path_factory.mktemp("configs")
    config = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 1, "num_key_value_heads": 1, "sliding_window": None}  # fmt: skip
    for name, rule in RULES.items():
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**config)).to(torch.bfloat16)
        rules = [{"match": "*gate_proj", "keep": True}, {"match": "*layers.*", **rule}]
        quantize_model(model, QuantConfig.from_dict({"rules": rules}))
        save_model(model, root / f"src-{name}")
    for name, source in MADE.items():
        export_checkpoint(root / f"src-{source}", root / name, name, requantize=True)
    return root


def entry(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


BITS4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": ["lm_head", KEPT],
    "llm_int8_threshold": 6.0,
}
INT8 = {k: v for k, v in BITS4.items() if not k.startswith("bnb")} | {
    "load_in_4bit": False,
    "load_in_8bit": True,
}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "dynamic": {r"-:^model\.layers\.0\.mlp\.gate_proj$": {}},
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["lm_head", KEPT],
}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
           "dynamic": False, "actorder": None}  # fmt: skip
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": WEIGHTS,
            "input_activations": None,
            "output_activations": None,
        }
    },
    "ignore": ["lm_head", KEPT],
    "kv_cache_scheme": None,
}
ROWS = WEIGHTS | {"num_bits": 8, "strategy": "channel", "group_size": None}


def group(weights: dict) -> dict:
    return {"config_groups": {"group_0": PACKED["config_groups"]["group_0"] | {"weights": weights}}}


@pytest.mark.parametrize(
    "source, format, expected",
    [
        ("nf4-dq", "bitsandbytes", BITS4),
        ("fp4", "bitsandbytes", BITS4 | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
        ("row8", "bitsandbytes-int8", INT8),
        ("sym", "gptq", GPTQ),
        ("asym", "gptq_v2", GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}),
        ("row8", "gptq", GPTQ | {"bits": 8, "group_size": -1}),
        ("asym", "awq", AWQ),
        ("sym", "compressed-tensors", PACKED),
        ("asym", "compressed-tensors", PACKED | group(WEIGHTS | {"symmetric": False})),
        ("row8", "compressed-tensors", PACKED | group(ROWS)),
    ],
)
def test_what_config_json_says(root, tmp_path, source, format, expected):
    export_checkpoint(root / f"src-{source}", tmp_path / "out", format)
    found = entry(tmp_path / "out")
    said = found.pop("meta", {"quantizer": ["brise:"]})["quantizer"][0]
    assert found == expected and said.startswith("brise:")
    for own in (tmp_path / "out").glob("quantize_config.json"):
        assert json.loads(own.read_text()) == entry(tmp_path / "out")
    assert (tmp_path / "out" / "quantize_config.json").exists() == (found["quant_method"] == "gptq")


def test_an_order_of_channels_is_declared(root, tmp_path):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig.from_pretrained(root / "src-sym", quantization_config=None))
    save_model(model, tmp_path / "dense")
    from brise.model.stream import quantize_checkpoint

    rules = QuantConfig.from_dict(
        {"rules": [{"match": "*down_proj", "format": "int4", "group_size": 32, **ORDER}]}
    )
    ids = torch.arange(64).view(4, 16) % 32
    quantize_checkpoint(tmp_path / "dense", tmp_path / "src", rules, calibration=ids)
    export_checkpoint(tmp_path / "src", tmp_path / "out", "gptq")
    assert entry(tmp_path / "out")["desc_act"] is True


def damaged(root: Path, folder: Path, name: str, change) -> Path:
    shutil.copytree(root / name, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def put(**new):
    return lambda entry: entry.update(new)


def weights(**new):
    return lambda entry: entry["config_groups"]["group_0"]["weights"].update(new)


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("gptq", put(pack_dtype="int8"), "pack_dtype"),
        ("gptq", put(checkpoint_format="marlin"), "expected gptq or gptq_v2"),
        ("gptq", put(bits=5), "expected 2 or 3 or 4 or 8"),
        ("gptq", put(bits="4"), "expected an integer"),
        ("gptq", put(group_size=16, dynamic={}), "group_size is 16, but .* has groups of 32"),
        ("gptq", put(quant_method="hqq"), "known are brise, gptq, awq"),
        ("awq", put(version="gemv"), "version .* 'gemv', expected gemm"),
        ("awq", put(bits=3), "expected 4"),
        ("awq", put(group_size=64), "group_size is 64"),
        ("compressed-tensors", put(format="int-quantized"), "expected pack-quantized"),
        ("compressed-tensors", put(quantization_status="frozen"), "'frozen', expected compressed"),
        ("compressed-tensors", put(config_groups=[]), "config_groups of compressed-tensors must be"),
        ("compressed-tensors", weights(type="float"), "int by group or channel"),
        ("compressed-tensors", weights(strategy="tensor"), "int by group or channel"),
        ("compressed-tensors", weights(group_size=0), "a positive number"),
        ("compressed-tensors", weights(symmetric=False), "no group in"),
        ("compressed-tensors", weights(num_bits=8), "no group in"),
        ("compressed-tensors", lambda e: e["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
         "quantizes activations"),
        ("bitsandbytes", put(bnb_4bit_quant_storage="bfloat16"), "bnb_4bit_quant_storage"),
        ("bitsandbytes-int8", put(load_in_8bit=False), "no tensor of it is"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_its_key(root, tmp_path, name, change, says):
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(damaged(root, tmp_path / "m", name, change))


def rename(**names):
    def change(entry):
        for old, new in names.items():
            entry[new] = entry.pop(old)

    return change


@pytest.mark.parametrize(
    "name, change",
    [
        ("gptq_v2", rename(checkpoint_format="format")),
        ("gptq", lambda entry: entry.pop("checkpoint_format")),
        ("awq", rename(bits="w_bit", group_size="q_group_size")),
        ("awq", rename(version="checkpoint_format")),
        ("bitsandbytes-int8", rename(load_in_8bit="_load_in_8bit")),
    ],
)
def test_older_names_of_keys_are_read(root, tmp_path, name, change):
    same(root / name, damaged(root, tmp_path / "m", name, change))


def test_a_config_in_quantize_config_json_alone_is_read(root, tmp_path):
    shutil.copytree(root / "gptq", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    same(root / "gptq", tmp_path / "m")


def same(one: Path, other: Path) -> None:
    a, b = open_checkpoint(one), open_checkpoint(other)
    assert a.names == b.names and f"{UP}.qweight" in a.names
    assert a.config["quantization_config"] == b.config["quantization_config"]
    assert all(torch.equal(a.tensor(n), b.tensor(n)) for n in a.names)


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("bitsandbytes-int8", lambda s: s.pop(f"{UP}.weight"), f"{UP}.SCB is there without"),
        ("bitsandbytes-int8", lambda s: s[f"{UP}.weight_format"].fill_(1), "weight_format is 1"),
        ("bitsandbytes", lambda s: s.pop(f"{UP}.weight.absmax"), "lacks, or has too many of, weight.absmax"),
        ("gptq", lambda s: s.pop(f"{UP}.scales"), f"{UP} has no scales"),
        (
            "gptq",
            lambda s: s.update({f"{UP}.scales": s[f"{UP}.scales"].double()}),
            "expected float16, bfloat16",
        ),
    ],
)
def test_tensors_that_do_not_belong_together(root, tmp_path, name, change, says):
    shutil.copytree(root / name, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    change(stored)
    save_file(stored, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match=says):
        opened = open_checkpoint(tmp_path / "m")
        [opened.tensor(n) for n in opened.names]


def test_a_decoded_embedding_has_the_models_dtype(root, tmp_path):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig.from_pretrained(root / "src-sym", quantization_config=None))
    model.to(torch.bfloat16)
    quantize_model(model, QuantConfig.from_dict({"rules": [{"match": "*", **RULES["sym"]}]}))
    save_model(model, tmp_path / "src")
    plan = export_checkpoint(tmp_path / "src", tmp_path / "out", "gptq")
    assert not plan.lossless and f"decoded weights are rounded by up to {2**-8:.2e}" in plan.describe()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == stored["lm_head.weight"].dtype == torch.bfloat16
    assert "Decoded: lm_head, model.embed_tokens." in (tmp_path / "out" / "README.md").read_text()


def test_awq_has_one_group_size(root, tmp_path):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig.from_pretrained(root / "src-sym", quantization_config=None))
    rules = [
        {"match": "*down_proj", "format": "int4", "group_size": 64},
        {"match": "*layers.*", **RULES["sym"]},
    ]
    quantize_model(model, QuantConfig.from_dict({"rules": rules}))
    save_model(model, tmp_path / "src")
    with pytest.raises(
        CheckpointError, match="AWQ has one group_size for all modules, this model has 32, 64"
    ):
        export_checkpoint(tmp_path / "src", tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()
