"""Saving, loading, placing, tying and swapping: what transformers promises around a model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import MistralConfig, PreTrainedTokenizerFast, pipeline

from brise.model import mistral
from brise.model.mistral import MistralForCausalLM

HEADS = (
    "Model",
    "ForCausalLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


def tiny(**changes: Any) -> MistralConfig:
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "sliding_window": 5,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return MistralConfig(**(settings | changes))


def made(head: str = "ForCausalLM", **changes: Any) -> Any:
    torch.manual_seed(0)
    return getattr(mistral, f"Mistral{head}")(tiny(**changes)).eval()


IDS = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def first(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS)[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_checkpoints_go_both_ways_in_shards(tmp_path: Path, head: str, tied: bool) -> None:
    ours = made(head, tie_word_embeddings=tied)
    ours.save_pretrained(tmp_path / "a", max_shard_size="8KB")
    shards = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["architectures"] == [f"Mistral{head}"]
    theirs, info = getattr(transformers, f"Mistral{head}").from_pretrained(
        tmp_path / "a", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = first(ours)
    assert torch.equal(first(theirs.eval()), expected)
    theirs.save_pretrained(tmp_path / "b", max_shard_size="8KB")
    written = [
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (tmp_path / "a", tmp_path / "b")
    ]
    assert written[0].keys() == written[1].keys() == index["weight_map"].keys()
    assert all(torch.equal(written[0][name], written[1][name]) for name in written[0])
    back = type(ours).from_pretrained(tmp_path / "b")
    assert torch.equal(first(back.eval()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_on_load(tmp_path: Path, dtype: torch.dtype) -> None:
    made().save_pretrained(tmp_path)
    loaded = MistralForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    expected = transformers.MistralForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(first(loaded), first(expected))


def test_backbone_into_head_and_head_into_backbone(tmp_path: Path) -> None:
    causal = made()
    causal.save_pretrained(tmp_path / "causal")
    backbone = mistral.MistralModel.from_pretrained(tmp_path / "causal").eval()
    assert torch.equal(first(backbone), first(causal.model))
    backbone.save_pretrained(tmp_path / "backbone")
    again = mistral.MistralForSequenceClassification.from_pretrained(tmp_path / "backbone")
    assert torch.equal(
        again.model.layers[1].mlp.down_proj.weight, causal.model.layers[1].mlp.down_proj.weight
    )


def test_built_on_meta_and_filled() -> None:
    expected = made()
    with torch.device("meta"):
        empty = MistralForCausalLM(tiny())
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    names = {name for name, _ in empty.named_parameters()}
    assert names == {name for name, _ in expected.named_parameters()}


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_device_map(tmp_path: Path, device_map: Any) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    loaded = MistralForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(first(loaded), first(model))


def test_offloaded_to_disk(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path / "m")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    loaded = MistralForCausalLM.from_pretrained(
        tmp_path / "m", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(first(loaded), first(model))
    assert torch.equal(
        loaded.generate(IDS, max_new_tokens=4, do_sample=False),
        model.generate(IDS, max_new_tokens=4, do_sample=False),
    )


def test_tied() -> None:
    model = made(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.out_features == 70
    assert model(IDS).logits.shape[-1] == 70
    untied = made()
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_plans_are_those_of_transformers() -> None:
    ours, theirs = made(), transformers.MistralForCausalLM(tiny())
    for name in (
        "_no_split_modules",
        "_tied_weights_keys",
        "_skip_keys_device_placement",
        "_keep_in_fp32_modules",
        "_keep_in_fp32_modules_strict",
        "_tp_plan",
        "_pp_plan",
        "_supports_flash_attn",
        "_supports_sdpa",
        "_supports_flex_attn",
        "_supports_attention_backend",
        "_can_compile_fullgraph",
        "_is_stateful",
        "base_model_prefix",
        "main_input_name",
        "config_class",
        "supports_gradient_checkpointing",
        "all_tied_weights_keys",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.can_generate() and not ours.is_remote_code()
    assert not isinstance(ours, transformers.MistralPreTrainedModel)


class Codes(nn.Module):
    """Stands for a quantized Linear: no weight, `in_features`, `out_features` and `bias` only."""

    def __init__(self, dense: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = dense.in_features, dense.out_features, None
        self.register_buffer("codes", dense.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype))


class Rows(nn.Module):
    """Stands for a quantized Embedding."""

    def __init__(self, dense: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = dense.num_embeddings, dense.embedding_dim
        self.register_buffer("codes", dense.weight.detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.codes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_everything_works_with_modules_that_have_no_weight(head: bool, embedding: bool, tied: bool) -> None:
    """Swapped projections, head, embedding: forward, loss, generation, all that ties or initialises."""
    model = made(tie_word_embeddings=tied)
    expected, generated = first(model), model.generate(IDS, max_new_tokens=5, do_sample=False)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Codes(child))
    if head:
        model.lm_head = Codes(model.lm_head)
    if embedding:
        model.set_input_embeddings(Rows(model.get_input_embeddings()))
    swapped = head or embedding
    model.tie_weights()
    model.tie_weights(missing_keys=set(), recompute_mapping=False)
    model.init_weights()
    assert model.all_tied_weights_keys == (
        {"lm_head.weight": "model.embed_tokens.weight"} if tied and not swapped else {}
    )
    assert torch.equal(first(model), expected)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), generated)
    assert model(IDS, labels=IDS).loss.isfinite()
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    copied = copy.deepcopy(model).to(torch.bfloat16)
    assert first(copied).dtype == torch.bfloat16


@pytest.mark.parametrize("head", [False, True])
def test_swapped_model_saves_under_its_own_names(tmp_path: Path, head: bool) -> None:
    model = made(tie_word_embeddings=True)
    if head:
        model.lm_head = Codes(model.lm_head)
    else:
        model.set_input_embeddings(Rows(model.get_input_embeddings()))
    model.tie_weights()
    names = set(model.state_dict())
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names
    assert ("lm_head.codes" in names) == head


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(3, 61)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    raw = Tokenizer(WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = Whitespace()
    made_of = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    made_of.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made_of


def test_text_generation_pipeline(tokenizer: PreTrainedTokenizerFast) -> None:
    ours = made()
    theirs = transformers.MistralForCausalLM(tiny()).eval()
    theirs.load_state_dict(ours.state_dict())
    texts = ["w5 w6 w7 w8", "w9 w10"]
    chat = [{"role": "user", "content": "w5 w6 w7"}]
    results = []
    for model in (ours, theirs):
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
        options = {"max_new_tokens": 6, "do_sample": False}
        results.append((generator(texts, **options), generator(chat, **options)))
    assert results[0] == results[1]
    assert results[0][0][1][0]["generated_text"].startswith("w9 w10")
    assert results[0][1][0]["generated_text"][-1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("text-classification", "ForSequenceClassification"),
        ("token-classification", "ForTokenClassification"),
        ("feature-extraction", "Model"),
    ],
)
def test_other_pipelines(task: Any, head: str, tokenizer: PreTrainedTokenizerFast) -> None:
    ours = made(head, num_labels=3)
    theirs = getattr(transformers, f"Mistral{head}")(tiny(num_labels=3)).eval()
    theirs.load_state_dict(ours.state_dict())
    texts = ["w5 w6 w7 w8", "w9 w10"]
    results = [pipeline(task, model=model, tokenizer=tokenizer)(texts) for model in (ours, theirs)]
    assert results[0] == results[1]
