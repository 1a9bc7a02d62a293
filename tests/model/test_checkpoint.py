"""A model that is saved and loaded again is the same model to the bit: quantized, tied, sharded, or not."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from transformers import MistralConfig

from brise.model import checkpoint, mistral
from brise.model.checkpoint import CheckpointError, CheckpointReader, load_model, load_tokenizer, save_model
from brise.quant.apply import quantize_model
from brise.quant.config import QuantConfig, QuantSpec, Rule
from brise.quant.linear import QuantEmbedding, QuantLinear
from brise.quant.presets import PRESETS

IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))


def make(dtype=torch.float32, preset=None, cls="MistralForCausalLM", **changes):
    """A small model with random weights, quantized by a preset or not."""
    config = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 5,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = getattr(mistral, cls)._from_config(MistralConfig(**config | changes), dtype=dtype).eval()
    if preset is not None:
        quantize_model(model, PRESETS[preset])
    return model


def outputs(model, ids=IDS):
    with torch.no_grad():
        out = model(ids)
    return [v for k, v in out.items() if isinstance(v, torch.Tensor) and k != "past_key_values"]


def assert_same(a, b):
    for x, y in zip(outputs(a), outputs(b), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("dtype", "preset"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float32, "nf4-dq-all"),
        (torch.bfloat16, "nf4"),
        (torch.float16, "int4-g32-asym-all"),
        (torch.bfloat16, "int8-all"),
        (torch.float32, "int3-g64"),
    ],
)
def test_round_trip_is_exact(tmp_path, tied, dtype, preset):
    model = make(dtype, preset, tie_word_embeddings=tied)
    loaded = load_model(save_model(model, tmp_path / "m"))
    assert type(loaded) is type(model) and not loaded.training
    assert_same(model, loaded)
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("preset", [None, "nf4-dq-all"])
def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path, preset):
    first = save_model(make(preset=preset, tie_word_embeddings=True), tmp_path / "a", max_shard_bytes=40_000)
    second = save_model(load_model(first), tmp_path / "b", max_shard_bytes=40_000)
    names = sorted(p.name for p in first.iterdir())
    assert "model-00002-of-00002.safetensors" in names or preset is None
    assert names == sorted(p.name for p in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize(
    "cls",
    [
        "MistralModel",
        "MistralForSequenceClassification",
        "MistralForTokenClassification",
        "MistralForQuestionAnswering",
    ],
)
def test_other_classes(tmp_path, cls):
    model = make(cls=cls)
    spec = QuantSpec(format="int8")
    quantize_model(model, QuantConfig((Rule(("*layers.*",), spec),)))
    loaded = load_model(save_model(model, tmp_path / "m"))
    assert type(loaded).__name__ == cls
    assert_same(model, loaded)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["50KB", "1GB"])
def test_folders_of_transformers(tmp_path, tied, shard):
    """The oracle is the stock class: its folder, its logits."""
    torch.manual_seed(0)
    stock = transformers.MistralForCausalLM(make(tie_word_embeddings=tied).config).eval()
    stock.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "50KB")
    assert ("lm_head.weight" in CheckpointReader(tmp_path).names) is not tied
    loaded = load_model(tmp_path)
    assert_same(stock, loaded)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_ours(tmp_path, tied):
    model = make(torch.bfloat16, tie_word_embeddings=tied)
    save_model(model, tmp_path / "m", max_shard_bytes=40_000)
    stock, info = transformers.MistralForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values()) and stock.dtype == torch.bfloat16
    assert_same(stock.eval(), model)


def test_quantized_modules_and_ties(tmp_path):
    model = make(torch.bfloat16, "nf4-dq-all", tie_word_embeddings=True)
    folder = save_model(model, tmp_path / "m", config=PRESETS["nf4-dq-all"])
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "brise" and entry["format_version"] == 1
    assert QuantConfig.from_dict(entry["config"]) == PRESETS["nf4-dq-all"]
    assert entry["modules"]["lm_head"] == entry["modules"]["model.embed_tokens"]
    assert not [n for n in CheckpointReader(folder).names if n.startswith("lm_head")]
    loaded = load_model(folder)
    head, embedding = loaded.lm_head, loaded.model.embed_tokens
    assert isinstance(head, QuantLinear) and isinstance(embedding, QuantEmbedding)
    assert head.qweight.data_ptr() == embedding.qweight.data_ptr()
    assert embedding(IDS).dtype == torch.bfloat16
    assert isinstance(loaded.model.layers[1].mlp.down_proj, QuantLinear)


def test_rules_survive_a_reload_and_are_made_up_where_unknown(tmp_path):
    rules = PRESETS["int4-g32"]
    folder = save_model(make(preset="int4-g32"), tmp_path / "a", config=rules)
    again = save_model(load_model(folder), tmp_path / "b")
    entry = json.loads((again / "config.json").read_text())["quantization_config"]
    assert QuantConfig.from_dict(entry["config"]) == rules
    unknown = save_model(make(preset="int4-g32"), tmp_path / "c")
    entry = json.loads((unknown / "config.json").read_text())["quantization_config"]
    (rule,) = QuantConfig.from_dict(entry["config"]).rules
    assert set(rule.match) == set(entry["modules"]) and rule.spec == rules.rules[0].spec


def test_dtype(tmp_path):
    model = make(torch.float32, "int4-g32-all", tie_word_embeddings=False)
    folder = save_model(model, tmp_path / "m")
    cast = load_model(folder, dtype=torch.bfloat16)
    assert cast.model.norm.weight.dtype == torch.bfloat16 and cast.config.dtype == torch.bfloat16
    assert torch.equal(cast.model.norm.weight, model.model.norm.weight.bfloat16())
    assert torch.equal(cast.lm_head.scales, model.lm_head.scales)
    assert cast(IDS).logits.dtype == torch.bfloat16
    assert load_model(folder).dtype == torch.float32


def test_dtype_is_that_of_the_weights_where_config_names_none(tmp_path):
    folder = save_model(make(torch.bfloat16, "int4-g32-all"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).dtype == torch.bfloat16
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    assert load_model(folder).dtype == torch.bfloat16


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc/self/maps")
def test_weights_are_the_mapped_file(tmp_path):
    """No copy in between: each weight lies in a map of its shard."""
    folder = save_model(make(preset="nf4"), tmp_path / "m")
    loaded = load_model(folder)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [
        tuple(int(x, 16) for x in parts[0].split("-"))
        for parts in maps
        if parts[-1] == str(folder / "model.safetensors")
    ]
    assert len(spans) == 1
    for name, tensor in loaded.state_dict().items():
        assert spans[0][0] <= tensor.data_ptr() < spans[0][1], name
    # private: training the weights does not reach the disk
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        loaded.model.norm.weight.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


def test_loading_leaves_the_random_state_alone(tmp_path):
    folder = save_model(make(preset="nf4"), tmp_path / "m")
    before = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e4},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
    ],
)
def test_rotary_buffers_are_made_anew(tmp_path, rope):
    model = make(torch.bfloat16, "nf4", rope_parameters=rope)
    loaded = load_model(save_model(model, tmp_path / "m"))
    rotary, again = model.model.rotary_emb, loaded.model.rotary_emb
    assert again.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, again.inv_freq)
    assert torch.equal(rotary.original_inv_freq, again.original_inv_freq)
    assert rotary.attention_scaling == again.attention_scaling
    assert_same(model, loaded)


def test_attention_implementation_and_generation(tmp_path):
    model = make(preset="nf4")
    model.generation_config.max_new_tokens = 4
    model.generation_config.do_sample = False
    folder = save_model(model, tmp_path / "m")
    eager = load_model(folder, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert eager.generation_config.max_new_tokens == 4
    assert torch.equal(model.generate(IDS[:1]), load_model(folder).generate(IDS[:1]))
    with pytest.raises(CheckpointError, match="no_such_attention"):
        load_model(folder, attn_implementation="no_such_attention")


def test_a_tied_head_that_is_stored_twice(tmp_path):
    """Some writers store both copies: equal ones are taken, different ones are an error."""
    from safetensors.torch import load_file, save_file

    model = make(tie_word_embeddings=True)
    folder = save_model(model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    loaded = load_model(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(model, loaded)
    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is there and is not model\.embed"):
        load_model(folder)


def test_a_head_untied_by_hand_is_saved_as_its_own(tmp_path):
    model = make(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    loaded = load_model(save_model(model, tmp_path / "m"))
    assert not loaded.config.tie_word_embeddings
    assert_same(model, loaded)


def test_tensors_one_by_one_and_all_at_once_agree(tmp_path):
    folder = save_model(make(preset="nf4-dq"), tmp_path / "m", max_shard_bytes=20_000)
    reader = CheckpointReader(folder)
    together = dict(reader.tensors())
    assert sorted(together) == reader.names
    for name in reader.names:
        alone = reader.tensor(name)
        assert (alone.dtype, tuple(alone.shape)) == reader.info(name)
        assert torch.equal(alone, together[name]) and alone.nbytes == reader.nbytes(name)
    with pytest.raises(CheckpointError, match=r"no tensor nothing\.weight"):
        reader.tensor("nothing.weight")


def test_saved_config_names_no_path_of_this_machine(tmp_path):
    folder = save_model(load_model(save_model(make(), tmp_path / "a")), tmp_path / "b")
    assert str(tmp_path) not in (folder / "config.json").read_text()


def small_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "breeze": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)


def test_tokenizer_goes_along(tmp_path):
    small_tokenizer(tmp_path / "source")
    folder = save_model(make(), tmp_path / "m", copy_from=tmp_path / "source")
    assert load_tokenizer(folder)("a breeze here")["input_ids"] == [1, 2, 0]
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(save_model(make(), tmp_path / "none"))


def test_sources(tmp_path, monkeypatch):
    assert checkpoint.resolve_source(tmp_path) == tmp_path
    assert checkpoint.resolve_source(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    for bad, message in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "nothing", "no folder"),
        ("./nothing", "no folder"),
        ("a/b/c", "no folder"),
        ("../up", "no folder"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.resolve_source(bad)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match=r"nobody/nothing is no folder here, and the hub"):
        checkpoint.resolve_source("nobody/nothing")


def test_a_hub_name_in_the_cache(tmp_path, monkeypatch):
    """The hub's cache is links into blobs beside the snapshots: these are followed."""
    model = make(preset="nf4")
    plain = save_model(model, tmp_path / "m")
    repo = tmp_path / "hub" / "models--some--breeze"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    for i, file in enumerate(sorted(plain.iterdir())):
        file.rename(repo / "blobs" / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert_same(model, load_model("some/breeze"))
