"""Rows of a static cache as views, and moved: all that belongs to a row goes with it, and nothing of the others."""

import pytest
import torch
from transformers import MistralConfig

from brise.model.cache_rows import move_row, rows_of
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


def test_some_rows_share_the_storage_of_all(cache):
    part = rows_of(cache, 1, 3)
    whole = belongings(cache)
    for name, t in belongings(part).items():
        assert torch.equal(t, whole[name][1:3]), name
        t.add_(1)
        assert torch.equal(t, whole[name][1:3]), name
    part.reset()
    assert cache.seen[[0, 3]].all() and not cache.seen[1:3].any()
