"""`generate` in its modes and caches: the tokens transformers' own Mistral makes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, MistralConfig, StaticCache

from brise.model.mistral import MistralForCausalLM

Pair = tuple[transformers.MistralForCausalLM, MistralForCausalLM]


def tiny(**changes: Any) -> MistralConfig:
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "sliding_window": 6,
        "pad_token_id": 0,
        "eos_token_id": 7,
        "initializer_range": 0.3,
    }
    return MistralConfig(**(settings | changes))


def built(implementation: str, **changes: Any) -> Pair:
    torch.manual_seed(0)
    config = tiny(**changes)
    theirs = transformers.MistralForCausalLM._from_config(
        copy.deepcopy(config), attn_implementation=implementation
    )
    ours = MistralForCausalLM._from_config(copy.deepcopy(config), attn_implementation=implementation)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def models(request: pytest.FixtureRequest) -> Pair:
    return built(request.param)


def prompt(batch: int = 2, length: int = 9) -> tuple[Tensor, Tensor]:
    """Left-padded by 3 in the last row."""
    ids = torch.randint(8, 61, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if batch > 1:
        ids[-1, :3], mask[-1, :3] = 0, 0
    return ids, mask


def assert_same(models: Pair, ids: Tensor, mask: Tensor, **options: Any) -> None:
    results = []
    for model in models:
        torch.manual_seed(11)
        arguments = {"do_sample": False, "max_new_tokens": 16} | options
        results.append(
            model.generate(
                ids,
                attention_mask=mask,
                return_dict_in_generate=True,
                output_logits=True,
                **{name: value() if callable(value) else value for name, value in arguments.items()},
            )
        )
    expected, got = results
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy without a cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 1.5},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache, beams": {"cache_implementation": "static", "disable_compile": True, "num_beams": 2},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "sliding static cache": {"cache_implementation": "sliding_window", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 4},
    "hidden states": {"output_hidden_states": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(models: Pair, mode: str) -> None:
    assert_same(models, *prompt(), **MODES[mode])


@pytest.mark.parametrize(
    "cache",
    [
        lambda: DynamicCache(),
        lambda: DynamicCache(config=tiny()),
        lambda: StaticCache(config=tiny(), max_cache_len=40),
    ],
    ids=["dynamic", "sliding", "static"],
)
def test_cache_objects(models: Pair, cache: Any) -> None:
    assert_same(models, *prompt(), past_key_values=cache, disable_compile=True)


def test_no_window_and_grouped_heads() -> None:
    for changes in ({"sliding_window": None}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}):
        assert_same(built("sdpa", **changes), *prompt())


def test_prompt_lookup(models: Pair) -> None:
    ids, mask = prompt(1, 5)
    ids, mask = ids.repeat(1, 3), mask.repeat(1, 3)
    options = {"do_sample": False, "max_new_tokens": 20}
    expected = models[0].generate(ids, attention_mask=mask, **options)
    for model in models:
        got = model.generate(ids, attention_mask=mask, prompt_lookup_num_tokens=3, **options)
        assert torch.equal(got, expected)


def test_assisted(models: Pair) -> None:
    """The helper model may be ours or theirs, in front of either."""
    ids, mask = prompt(1)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20}
    expected = models[0].generate(ids, **options)
    assistants = built("sdpa", num_hidden_layers=1)
    for model in models:
        for assistant in assistants:
            assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)


def test_from_embeddings(models: Pair) -> None:
    ids, mask = prompt()
    theirs, ours = models
    embeddings = ours.get_input_embeddings()(ids).detach()
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 10}
    got = ours.generate(inputs_embeds=embeddings, **options)
    assert torch.equal(got, theirs.generate(inputs_embeds=embeddings, **options))
    assert torch.equal(got, ours.generate(ids, **options)[:, ids.shape[1] :])


def test_left_padding_does_not_change_the_text(models: Pair) -> None:
    ids, mask = prompt()
    ours = models[1]
    together = ours.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=None)
    alone = ours.generate(ids[-1:, 3:], do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(together[-1:, 9:], alone[:, 6:])


def test_continuation_from_a_returned_cache(models: Pair) -> None:
    ids, _ = prompt(1)
    ours = models[1]
    options = {"do_sample": False, "eos_token_id": None}
    whole = ours.generate(ids, max_new_tokens=14, **options)
    first = ours.generate(ids, max_new_tokens=6, return_dict_in_generate=True, **options)
    got = ours.generate(first.sequences, max_new_tokens=8, past_key_values=first.past_key_values, **options)
    assert torch.equal(got, whole)


def test_static_cache_compiles() -> None:
    """One decoding step traced whole, as `generate` does with a static cache on an accelerator."""
    ours = built("sdpa")[1]
    ids, mask = prompt()
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    expected = ours.generate(ids, **options)
    forward = ours.forward
    ours.forward = torch.compile(forward, backend="eager", fullgraph=True)  # type: ignore[method-assign]
    got = ours.generate(ids, cache_implementation="static", **options)
    assert torch.equal(got, expected)
