"""Rows of a static cache as views, and moved: all that belongs to a row goes with it, and nothing of the others."""

import pytest
import torch
from transformers import MistralConfig

from brise.model.cache_rows import move_row, rows_of
from brise.model.generate import Generator, Request
from brise.model.mistral import MistralForCausalLM
from brise.model.sampling import Sampling
from brise.model.speculative import PromptLookup
from brise.model.static_cache import StaticRollingCache


def belongings(cache):
    """Every tensor of the cache whose first dimension are the rows, wherever it is kept."""
    owners = [cache.rows, *cache.layers]
    found = {
        (type(owner).__name__, getattr(owner, "index", 0), name): t
        for owner in owners
        for name, t in vars(owner).items()
        if isinstance(t, torch.Tensor)
    }
    assert {t.shape[0] for t in found.values()} == {cache.rows.batch_size}
    return found


@pytest.fixture(params=[False, True], ids=["", "int8"])
def cache(request):
    config = MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=5
    )
    made = StaticRollingCache(config, 4, spare=2, int8=request.param)
    torch.manual_seed(0)
    for t in belongings(made).values():
        t.copy_(torch.randint(1, 100, t.shape))
    assert len(belongings(made)) == (11 if request.param else 7)
    return made


def test_a_row_is_moved_with_all_that_it_has(cache):
    before = {name: t.clone() for name, t in belongings(cache).items()}
    move_row(cache, 2, 1)
    for name, t in belongings(cache).items():
        assert torch.equal(t, before[name][[0, 2, 2, 3]]), name


def test_rows_that_take_the_places_of_others_take_all_with_them(cache):
    """As beams do."""
    before = {name: t.clone() for name, t in belongings(cache).items()}
    cache.reorder_cache(torch.tensor([2, 0, 1, 1]))
    for name, t in belongings(cache).items():
        assert torch.equal(t, before[name][[2, 0, 1, 1]]), name


@pytest.mark.parametrize(
    "rows", [1, [1], torch.tensor([1]), torch.tensor([False, True, False, False])], ids=str
)
def test_a_row_that_is_forgotten_begins_anew(cache, rows):
    before = {name: t.clone() for name, t in belongings(cache).items()}
    cache.reset(rows)
    for (owner, index, name), t in belongings(cache).items():
        wanted = before[owner, index, name]
        if owner == "Rows":
            wanted[1] = 0
        assert torch.equal(t, wanted), name


def test_padding_before_the_text_is_left_out_and_none_within_it(cache):
    mask = torch.tensor([[0, 0, 1, 0, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    cache.pad_left(mask)
    assert cache.start.tolist() == [2, 0, 4, 0]


def test_some_rows_share_the_storage_of_all(cache):
    part = rows_of(cache, 1, 3)
    whole = belongings(cache)
    for name, t in belongings(part).items():
        assert torch.equal(t, whole[name][1:3]), name
        t.add_(1)
        assert torch.equal(t, whole[name][1:3]), name
    part.reset()
    assert cache.seen[[0, 3]].all() and not cache.seen[1:3].any()


SAMPLINGS = [
    Sampling(repetition_penalty=1.9),
    Sampling(1.1, top_k=7, seed=3),
    Sampling(0.9, top_p=0.7, repetition_penalty=1.5, seed=4),
    Sampling(),
    Sampling(1.3, min_p=0.05, seed=5),
    Sampling(0.7, repetition_penalty=1.2, seed=6),
    Sampling(repetition_penalty=1.4),
]


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("drafts", [0, 3])
def test_a_text_goes_on_in_another_row_and_in_one_that_was_used_as_it_would_alone(rows, drafts):
    """Each with settings of its own; of those that run together the first end first, so that the last ones move."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=None, max_position_embeddings=64, initializer_range=0.2,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    requests = [Request([i, 7, 2 * i], 5 + 6 * (i % 3), sampling) for i, sampling in enumerate(SAMPLINGS)]
    # row 0 is free when nothing waits any more, and the text of the last row goes there
    proposer = PromptLookup(drafts) if drafts else None
    together = Generator(model, batch_size=rows, proposer=proposer).complete(requests)
    for request, done in zip(requests, together):
        (alone,) = Generator(model).complete([request])
        assert done.tokens == alone.tokens
