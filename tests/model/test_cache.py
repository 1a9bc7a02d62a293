"""The rolling cache against the full one, and its ring against a plain list of positions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, MistralConfig
from transformers import MistralForCausalLM as Theirs

from brise.model.cache import RollingCache, RollingLayer
from brise.model.mistral import MistralForCausalLM

WINDOW = 5


def tiny(**changes: Any) -> MistralConfig:
    settings_: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "sliding_window": WINDOW,
        "pad_token_id": 0,
        "eos_token_id": None,
        "initializer_range": 0.3,
    }
    return MistralConfig(**(settings_ | changes))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM._from_config(tiny(), attn_implementation=request.param).eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def positions(start: int, count: int, batch: int = 1) -> Tensor:
    """Keys that say which position they are: [batch, 1, count, 1], row b offset by 1000 b."""
    row = torch.arange(start, start + count, dtype=torch.float64)
    return (row + 1000 * torch.arange(batch, dtype=torch.float64)[:, None])[:, None, :, None]


def read(states: tuple[Tensor, Tensor]) -> list[float]:
    keys, values = states
    assert torch.equal(values, -keys)
    return keys[0, 0, :, 0].tolist()


def take(layer: RollingLayer, start: int, count: int) -> list[float]:
    return read(layer.update(positions(start, count), -positions(start, count)))


# against the full cache


@pytest.mark.parametrize("pads", [(0, 0), (3, 0), (9, 2)])
@pytest.mark.parametrize(
    "steps", [(1,) * 20, (20,), (13, 1, 1, 1, 4), (4, 1, 1, 1, 1, 12), (5, 5, 5, 5), (6, 9, 5)], ids=str
)
def test_as_the_full_cache(model: MistralForCausalLM, steps: tuple[int, ...], pads: tuple[int, int]) -> None:
    """Chunks shorter and longer than the window, prompts longer than it, left padding within and beyond."""
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    cache, full, seen = RollingCache(model.config), DynamicCache(), 0
    with torch.no_grad():
        for step in steps:
            now, until = ids[:, seen : seen + step], seen + step
            logits = [
                model(now, attention_mask=mask[:, :until], past_key_values=c, use_cache=True).logits
                for c in (cache, full)
            ]
            kept = mask[:, seen:until].bool()
            close(logits[0][kept], logits[1][kept])
            seen = until
            assert cache.get_seq_length() == full.get_seq_length() == seen


def test_memory_is_constant_however_long_the_text(model: MistralForCausalLM) -> None:
    cache, ids = RollingCache(model.config), tokens(1, 300)
    assert cache.nbytes == 0
    expected = 2 * 2 * 2 * WINDOW * 8 * 4  # layers, keys and values, KV heads, slots, head_dim, bytes
    addresses = None
    with torch.no_grad():
        whole = model(ids).logits
        for start in range(0, 300, 4):
            logits = model(ids[:, start : start + 4], past_key_values=cache).logits
            close(logits, whole[:, start : start + 4])
            rings = [x for layer in cache.rings for x in (layer.keys, layer.values)]
            assert all(x.shape == (1, 2, WINDOW, 8) for x in rings)
            assert cache.nbytes == sum(x.untyped_storage().nbytes() for x in rings) == expected
            addresses = addresses or [x.data_ptr() for x in rings]
            assert addresses == [x.data_ptr() for x in rings], "a ring was allocated anew"
    assert cache.get_seq_length() == 300 and cache.get_max_length() == WINDOW


def test_works_in_transformers_own_model(model: MistralForCausalLM) -> None:
    theirs = Theirs._from_config(
        copy.deepcopy(model.config), attn_implementation=model.config._attn_implementation
    ).eval()
    theirs.load_state_dict(model.state_dict())
    ids = tokens(1, 12)
    expected = theirs.generate(ids, max_new_tokens=20, do_sample=False)
    for each in (theirs, model):
        cache = RollingCache(each.config)
        got = each.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=cache)
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
        {"prefill_chunk_size": 3},
    ],
    ids=str,
)
def test_generates_as_the_full_cache(model: MistralForCausalLM, options: dict[str, Any]) -> None:
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    generated = []
    for cache in (RollingCache(model.config), DynamicCache()):
        torch.manual_seed(5)
        arguments = {"do_sample": False, "max_new_tokens": 18} | options
        generated.append(model.generate(ids, attention_mask=mask, past_key_values=cache, **arguments))
    assert torch.equal(*generated)


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_assisted_generation_rolls_back(model: MistralForCausalLM, how: str) -> None:
    """Rejected candidates are cropped after the ring has wrapped over what they pushed out."""
    ids = tokens(1, 4).repeat(1, 3)
    torch.manual_seed(1)
    assistant = MistralForCausalLM(tiny(num_hidden_layers=1)).eval()
    options: dict[str, Any] = (
        {"prompt_lookup_num_tokens": 4} if how == "prompt lookup" else {"assistant_model": assistant}
    )
    cache = RollingCache(model.config)
    expected = model.generate(ids, max_new_tokens=25, do_sample=False)
    got = model.generate(ids, max_new_tokens=25, do_sample=False, past_key_values=cache, **options)
    assert torch.equal(got, expected)


def test_continues_a_conversation(model: MistralForCausalLM) -> None:
    cache, first = RollingCache(model.config), tokens(1, 8)
    second = torch.cat(
        (model.generate(first, max_new_tokens=7, do_sample=False, past_key_values=cache), first), 1
    )
    got = model.generate(second, max_new_tokens=7, do_sample=False, past_key_values=cache)
    assert torch.equal(got, model.generate(second, max_new_tokens=7, do_sample=False))


def test_gradients_pass_through(model: MistralForCausalLM) -> None:
    ids, gradients = tokens(1, 12), []
    for cache in (RollingCache(model.config), DynamicCache()):
        model.zero_grad()
        loss = torch.zeros(())
        for start, until in ((0, 7), (7, 8), (8, 12)):
            loss = loss + model(ids[:, start:until], past_key_values=cache).logits.square().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for got, expected in zip(*gradients):
        close(got, expected)


# the ring alone


def test_slots_and_returned_order() -> None:
    layer = RollingLayer(3)
    assert take(layer, 0, 2) == [0, 1]
    assert take(layer, 2, 1) == [0, 1, 2]
    assert take(layer, 3, 1) == [1, 2, 3]
    assert layer.keys is not None and layer.keys[0, 0, :, 0].tolist() == [3, 1, 2]  # position p in slot p % 3
    assert take(layer, 4, 5) == [2, 3, 4, 5, 6, 7, 8]
    assert layer.keys[0, 0, :, 0].tolist() == [6, 7, 8]
    assert layer.get_mask_sizes(2) == (4, 7)


def test_returned_states_survive_the_next_update() -> None:
    layer = RollingLayer(3)
    take(layer, 0, 3)
    states = layer.update(positions(3, 1), -positions(3, 1))
    before = states[0].clone()
    take(layer, 4, 3)
    assert torch.equal(states[0], before)


steps = st.lists(
    st.tuples(st.integers(1, 9), st.one_of(st.none(), st.integers(0, 9))), min_size=1, max_size=12
)


@settings(max_examples=150, deadline=None)
@given(window=st.integers(1, 6), record_from=st.integers(0, 4), steps=steps)
def test_ring_against_a_list(window: int, record_from: int, steps: list[tuple[int, int | None]]) -> None:
    """Any run of updates and crops returns the last W - 1 positions of a plain list, then the new ones.

    A crop after which that could not be is refused.
    """
    layer, seen, held_from = RollingLayer(window), 0, 0
    for index, (count, crop) in enumerate(steps):
        if index == record_from:
            layer.activate_past_recording()
        reach = min(seen, window - 1)
        assert layer.get_mask_sizes(count) == (reach + count, seen - reach)
        assert take(layer, seen, count) == list(range(seen - reach, seen + count))
        seen += count
        if not layer.record_past:
            held_from = max(held_from, seen - window)
        if crop is None or crop > seen:
            continue
        if max(seen - crop - window + 1, 0) < held_from:
            with pytest.raises(RuntimeError, match="activate_past_recording"):
                layer.crop(-crop)
            continue
        layer.crop(-crop)
        seen -= crop
        held_from = max(held_from, seen - window)
        assert layer.get_seq_length() == seen


def test_one_token_can_always_be_taken_back_and_a_second_cannot() -> None:
    layer = RollingLayer(3)
    take(layer, 0, 8)
    layer.crop(-1)
    with pytest.raises(
        RuntimeError, match=r"positions from 4 on are needed again.*starts at 5, and 0 before it"
    ):
        layer.crop(-1)
    assert take(layer, 7, 1) == [5, 6, 7]


def test_crop_refusals() -> None:
    layer = RollingLayer(3)
    layer.crop(0)
    with pytest.raises(ValueError, match=r"crop\(2\): expected 0 or a negative number"):
        layer.crop(2)
    take(layer, 0, 2)
    with pytest.raises(ValueError, match="holds only 2 positions"):
        layer.crop(-3)
    layer.crop(-2)
    assert take(layer, 0, 1) == [0]


def test_rows_are_chosen_repeated_and_reordered() -> None:
    layer = RollingLayer(3)
    layer.activate_past_recording()
    layer.update(positions(0, 5, batch=3), -positions(0, 5, batch=3))

    def rows() -> list[float]:
        keys, _ = layer.update(
            positions(5, 1, batch=layer.keys.shape[0]), positions(5, 1, layer.keys.shape[0])
        )
        layer.crop(-1)
        return keys[:, 0, 0, 0].tolist()

    assert rows() == [3, 1003, 2003]
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert rows() == [2003, 3, 3]
    layer.batch_select_indices(torch.tensor([True, True, False]))
    assert rows() == [2003, 3]
    layer.batch_repeat_interleave(2)
    assert rows() == [2003, 2003, 3, 3]


def test_rows_follow_into_what_was_recorded() -> None:
    layer = RollingLayer(3)
    layer.activate_past_recording()
    layer.update(positions(0, 3, batch=2), -positions(0, 3, batch=2))
    layer.update(positions(3, 3, batch=2), -positions(3, 3, batch=2))
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.crop(-3)
    keys, _ = layer.update(positions(3, 1, batch=2), -positions(3, 1, batch=2))
    assert keys[:, 0, :2, 0].tolist() == [[1001, 1002], [1, 2]]


def test_reset_starts_anew() -> None:
    layer = RollingLayer(3)
    layer.activate_past_recording()
    take(layer, 0, 8)
    layer.reset()
    assert take(layer, 0, 2) == [0, 1]
    assert take(layer, 2, 2) == [0, 1, 2, 3]
    layer.crop(-3)
    assert take(layer, 1, 1) == [0, 1]


def test_training_steps_through_one_cache(model: MistralForCausalLM) -> None:
    cache, ids, gradients = RollingCache(model.config), tokens(1, 12), []
    for _ in range(2):
        model.zero_grad()
        model(ids[:, :7], past_key_values=cache)
        model(ids[:, 7:], past_key_values=cache).logits.square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
        cache.reset()
    assert torch.equal(*gradients)


def test_reset_keeps_the_allocation() -> None:
    cache = RollingCache(tiny())
    states = torch.randn(1, 2, 8, 8)
    for layer in range(2):
        cache.update(states, states, layer)
    address, nbytes = cache.rings[0].keys.data_ptr(), cache.nbytes
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == nbytes
    assert cache.update(states, states, 0)[0].shape == states.shape
    assert cache.rings[0].keys.data_ptr() == address


def test_early_initialization() -> None:
    cache = RollingCache(tiny())
    cache.early_initialization(3, 2, 8, torch.float16, torch.device("cpu"))
    assert cache.is_initialized and cache.rings[1].values.shape == (3, 2, WINDOW, 8)
    assert cache.nbytes == 2 * 2 * 3 * 2 * WINDOW * 8 * 2


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"config.sliding_window, which is None.*use a DynamicCache"):
        RollingCache(tiny(sliding_window=None))
    with pytest.raises(ValueError, match="sliding_window is 0"):
        RollingLayer(0)
    mixed = tiny()
    mixed.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="sliding attention in every layer"):
        RollingCache(mixed)
    layer = RollingLayer(3)
    take(layer, 0, 1)
    with pytest.raises(ValueError, match=r"the ring was made for \[1, 1, any, 1\].*got \[2, 1, 1, 1\]"):
        layer.update(positions(1, 1, batch=2), positions(1, 1, batch=2))
