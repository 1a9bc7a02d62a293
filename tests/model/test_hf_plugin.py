"""After ``import brise.model.hf`` transformers reads, makes and writes our folders; without it, it refuses them."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from brise.model.checkpoint import CheckpointError, CheckpointReader, load_model, save_model
from brise.model.hf import BriseConfig
from brise.model.mistral import MistralForCausalLM
from brise.quant.apply import quantize_model
from brise.quant.config import ConfigError, QuantConfig, QuantSpec, Rule
from brise.quant.linear import QuantEmbedding, QuantLinear
from brise.quant.presets import PRESETS

IDS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES = {
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
}
EVERYTHING = {True: "nf4-dq-all", False: "int4-g32-asym-all"}


def plain(family="mistral", dtype=torch.float32, **changes):
    cls, config = FAMILIES[family]
    torch.manual_seed(0)
    model = cls._from_config(config(**SMALL | changes), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def quantized(family="mistral", preset="nf4-dq-all", **changes):
    """The oracle: the same class, its modules swapped by brise.quant alone."""
    model = plain(family, **changes)
    quantize_model(model, PRESETS[preset])
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_folder_in_stock_and_own_class(tmp_path, tied, dtype):
    oracle = quantized(preset=EVERYTHING[tied], dtype=dtype, tie_word_embeddings=tied, sliding_window=5)
    folder = save_model(oracle, tmp_path / "m", max_shard_bytes=30_000)
    stock, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(stock) is transformers.MistralForCausalLM and stock.dtype == dtype
    assert not any(info.values()), info
    own = MistralForCausalLM.from_pretrained(folder)
    for model in (stock, own):
        assert isinstance(model.lm_head, QuantLinear) and isinstance(model.model.embed_tokens, QuantEmbedding)
        assert torch.equal(logits(model), logits(oracle))
        shared = model.lm_head.qweight.data_ptr() == model.model.embed_tokens.qweight.data_ptr()
        assert shared is tied
        model.tie_weights()
        assert torch.equal(logits(model), logits(oracle))
    assert torch.equal(logits(load_model(save_model(stock, tmp_path / "again"))), logits(oracle))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_quantize_while_loading(tmp_path, family, tied):
    source = plain(family, tie_word_embeddings=tied)
    source.save_pretrained(tmp_path / "source", max_shard_size="50KB")
    preset = EVERYTHING[tied]
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", quantization_config=BriseConfig(preset), output_loading_info=True
    )
    assert not any(info.values()), info
    oracle = quantized(family, preset, tie_word_embeddings=tied)
    assert type(model) is type(oracle)
    assert torch.equal(logits(model), logits(oracle))
    assert not [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]

    model.save_pretrained(tmp_path / "out")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again), logits(oracle))
    if family == "mistral":
        assert torch.equal(logits(load_model(tmp_path / "out")), logits(oracle))
    else:
        with pytest.raises(CheckpointError, match=f"'mistral', got '{family}'"):
            load_model(tmp_path / "out")


def test_rules_of_a_config(tmp_path):
    plain().save_pretrained(tmp_path / "source")
    spec = QuantSpec(format="int8")
    rules = QuantConfig((Rule(("*k_proj",), None), Rule(("*self_attn*",), spec)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=BriseConfig(rules))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert isinstance(attention.q_proj, QuantLinear) and attention.q_proj.spec == spec
    assert type(attention.k_proj) is type(mlp.up_proj) is torch.nn.Linear
    model.save_pretrained(tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert QuantConfig.from_dict(entry["config"]) == rules and len(entry["modules"]) == 6
    assert load_model(tmp_path / "out").config.quantization_config == entry

    path = tmp_path / "rules.json"
    path.write_text(json.dumps(rules.to_dict()))
    assert BriseConfig(path).config == BriseConfig.from_dict({"config": rules.to_dict()}).config == rules
    assert BriseConfig().config == PRESETS["nf4"]
    by_dict = {"quant_method": "brise", "config": "nf4-dq"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=by_dict)
    assert model.model.layers[0].mlp.up_proj.spec.double_quant


def test_what_cannot_be_done_says_so(tmp_path):
    plain().save_pretrained(tmp_path / "source")
    load = AutoModelForCausalLM.from_pretrained
    with pytest.raises(ConfigError, match="brise quantize"):
        load(tmp_path / "source", quantization_config=BriseConfig("gptq-nf4"))
    with pytest.raises(ConfigError, match="nor a preset"):
        BriseConfig("nf5")
    nothing = QuantConfig((Rule(("*nothing*",), QuantSpec(format="nf4")),))
    with pytest.raises(ConfigError, match="matches no module"):
        load(tmp_path / "source", quantization_config=BriseConfig(nothing))
    with pytest.raises(ValueError, match="disk"):
        load(tmp_path / "source", quantization_config=BriseConfig("nf4"), device_map={"": "disk"})
    wide = QuantConfig((Rule(("*layers*",), QuantSpec(format="nf4", group_size=96)),))
    with pytest.raises(ConfigError, match="no multiple of group_size 96"):
        load(tmp_path / "source", quantization_config=BriseConfig(wide))


def test_a_weight_that_cannot_be_quantized_stops_the_load(tmp_path):
    source = plain()
    with torch.no_grad():
        source.model.layers[1].mlp.up_proj.weight[3, 3] = float("inf")
    source.save_pretrained(tmp_path / "source")
    with pytest.raises(RuntimeError, match="automatic conversion"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=BriseConfig("nf4"))


def test_a_weight_that_is_missing_stops_the_load(tmp_path):
    plain().save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds no weight of model\.layers\.1\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=BriseConfig("nf4"))


@pytest.mark.parametrize("damage", ["missing", "shape", "dtype", "left over", "spec"])
def test_a_damaged_folder_is_refused(tmp_path, damage):
    """transformers itself would warn, and fill the gap with random numbers."""
    folder = save_model(quantized(preset="nf4"), tmp_path / "m")
    path, file = "model.layers.1.mlp.up_proj", folder / "model.safetensors"
    tensors = load_file(file)
    if damage == "missing":
        del tensors[f"{path}.scales"]
    elif damage == "shape":
        tensors[f"{path}.scales"] = tensors[f"{path}.scales"].T.contiguous()
    elif damage == "dtype":
        tensors[f"{path}.scales"] = tensors[f"{path}.scales"].half()
    elif damage == "left over":
        tensors[f"{path}.weight"] = torch.ones(128, 64)
    else:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["specs"][0]["group_size"] = 32
        (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"proj\.(scales|weight)"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_base_model_and_another_head(tmp_path):
    oracle = quantized(preset="nf4-all")
    folder = save_model(oracle, tmp_path / "m")
    base = AutoModel.from_pretrained(folder)
    assert isinstance(base.embed_tokens, QuantEmbedding)
    with torch.no_grad():
        expected = oracle.model(IDS).last_hidden_state
        assert torch.equal(base(IDS).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert isinstance(classifier.model.layers[0].mlp.up_proj, QuantLinear)
    assert type(classifier.score) is torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(classifier.model(IDS).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    assert "layers.0.mlp.up_proj.qweight" in CheckpointReader(tmp_path / "base").names
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base").model
    with torch.no_grad():
        assert torch.equal(again(IDS).last_hidden_state, expected)


def test_dtype_device_map_and_to(tmp_path):
    oracle = quantized(preset="nf4-dq-all", tie_word_embeddings=True)
    folder = save_model(oracle, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="auto")
    assert model.dtype == torch.bfloat16 and model.model.embed_tokens(IDS).dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(load_model(folder, dtype=torch.bfloat16)))
    scales = model.lm_head.scales_absmax
    assert scales.dtype == torch.float32
    model.to(torch.float32)
    assert model.model.embed_tokens(IDS).dtype == torch.float32
    assert torch.equal(model.lm_head.scales_absmax, scales)
    source = tmp_path / "source"
    plain(dtype=torch.float16).save_pretrained(source)
    config = BriseConfig("int8")
    loaded = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="auto")
    assert loaded.dtype == torch.float16
    assert torch.equal(logits(loaded), logits(quantized(preset="int8", dtype=torch.float16)))


def test_generate_and_train_an_input(tmp_path):
    folder = save_model(quantized(preset="nf4"), tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), load_model(folder).generate(IDS, **options))
    embedded = model.model.embed_tokens(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=IDS).loss.backward()
    assert embedded.grad is not None and bool(embedded.grad.abs().sum() > 0)


@pytest.mark.parametrize("tied", [False, True])
def test_dequantize(tmp_path, tied):
    oracle = quantized("qwen2", EVERYTHING[tied], tie_word_embeddings=tied)
    folder = save_model(oracle, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert not [m for m in model.modules() if isinstance(m, QuantLinear | QuantEmbedding)]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    torch.testing.assert_close(logits(model), logits(oracle), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))


def test_two_configurations_at_once_keep_that_of_the_folder(tmp_path):
    folder = save_model(quantized(preset="nf4"), tmp_path / "m")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BriseConfig("int8"))
    assert model.model.layers[0].mlp.up_proj.spec.format == "nf4"


def test_without_the_import_transformers_refuses(tmp_path):
    """In a process of its own: the stock loader only warns of the unknown method, but the guard stops it."""
    made = {"ours": save_model(quantized(preset="int8"), tmp_path / "ours")}
    plain().save_pretrained(tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", quantization_config=BriseConfig("nf4-all")
    ).save_pretrained(tmp_path / "saved")
    made["saved"] = tmp_path / "saved"
    code = (
        "import sys\nfrom transformers import AutoModel, AutoModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        "    for cls in (AutoModel, AutoModelForCausalLM):\n"
        "        try:\n            cls.from_pretrained(folder)\n"
        "        except RuntimeError as error:\n            print('refused', error)\n"
        "        else:\n            print('loaded')\n"
        "assert 'brise.model.hf' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, made.values())], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused") == 4 and "loaded" not in done.stdout, done.stdout
    for folder in made.values():
        assert not [n for n in CheckpointReader(folder).names if n.endswith("q_proj.weight")]
        guards = {n: t for n, t in load_file(folder / "model.safetensors").items() if t.numel() == 0}
        assert len(guards) == 1 and all(n.endswith(".weight") for n in guards)
