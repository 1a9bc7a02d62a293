"""The static cache against full ones: as a Cache of transformers, and by the decode loop with rows on their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig
from transformers import MistralForCausalLM as Theirs

from brise.kernels.attention_ops import sliding_attention
from brise.model.cache import RollingCache
from brise.model.mistral import MistralForCausalLM
from brise.model.static_cache import StaticRollingCache

WINDOW = 5


def tiny(**changes: Any) -> MistralConfig:
    settings: dict[str, Any] = {
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
    return MistralConfig(**(settings | changes))


@pytest.fixture(scope="module")
def model() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM._from_config(tiny(), attn_implementation="sdpa").eval().double()


@pytest.fixture(scope="module")
def endless() -> MistralForCausalLM:
    torch.manual_seed(0)
    return (
        MistralForCausalLM._from_config(tiny(sliding_window=None), attn_implementation="sdpa").eval().double()
    )


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def static(config: MistralConfig, rows: int, **options: Any) -> StaticRollingCache:
    return StaticRollingCache(config, rows, **{"dtype": torch.float64} | options)


def addresses(cache: StaticRollingCache) -> list[int]:
    states = [t for layer in cache.layers for t in layer.tensors.values()]
    return [t.data_ptr() for t in (*states, cache.seen, cache.start)]


class Quantizing(DynamicCache):
    """A full cache whose old positions are int8; ``fresh``: the new ones come back as they are."""

    fresh = True

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        states = []
        for x in (key_states, value_states):
            scale = x.float().abs().amax(-1, keepdim=True) / 127
            states.append((x / scale).round() * scale.double())
        out = super().update(*states, layer_idx, *args, **kwargs)
        if not self.fresh:
            return out
        old = out[0].shape[2] - key_states.shape[2]
        return tuple(torch.cat((o[:, :, :old], x), 2) for o, x in zip(out, (key_states, value_states)))


# as a Cache of transformers


@pytest.mark.parametrize("pads", [(0, 0), (3, 0), (9, 2)])
@pytest.mark.parametrize(
    "steps", [(1,) * 20, (20,), (13, 1, 1, 1, 4), (4, 1, 1, 1, 1, 12), (6, 9, 5)], ids=str
)
@pytest.mark.parametrize("how", ["window", "bound", "short", "int8"])
def test_as_the_full_cache(
    model: Any, endless: Any, how: str, steps: tuple[int, ...], pads: tuple[int, int]
) -> None:
    """Chunks shorter and longer than the window, prompts longer than it, left padding within and beyond."""
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    used = endless if how == "bound" else model
    options: dict[str, Any] = {"window": {"spare": 2}, "bound": {"length": 20}, "short": {"length": 30}}.get(
        how, {}
    )
    cache = static(used.config, 2, int8=how == "int8", **options)
    full, seen, before, size = (
        (Quantizing() if how == "int8" else DynamicCache()),
        0,
        addresses(cache),
        cache.nbytes,
    )
    assert cache.slots == {"window": 7, "bound": 20, "short": 5, "int8": 5}[how]
    with torch.no_grad():
        for step in steps:
            now, until = ids[:, seen : seen + step], seen + step
            logits = [
                used(now, attention_mask=mask[:, :until], past_key_values=c, use_cache=True).logits
                for c in (cache, full)
            ]
            kept = mask[:, seen:until].bool()
            close(logits[0][kept], logits[1][kept])
            seen = until
            assert cache.get_seq_length() == full.get_seq_length() == seen
    assert addresses(cache) == before and cache.nbytes == size


def test_a_text_shorter_than_the_window_needs_no_more_slots(model: Any) -> None:
    cache, full = static(model.config, 1, length=4), DynamicCache()
    assert cache.slots == cache.limit == 4
    ids = tokens(1, 5)
    with torch.no_grad():
        for now in (ids[:, :3], ids[:, 3:4]):
            close(model(now, past_key_values=cache).logits, model(now, past_key_values=full).logits)
        with pytest.raises(ValueError, match="1 positions after 4 go beyond the 4"):
            model(ids[:, 4:], past_key_values=cache)


def test_generate_and_beams_of_transformers(model: Any) -> None:
    theirs = Theirs(model.config).eval().double()
    theirs.load_state_dict(model.state_dict())
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for options, rows in (({}, 2), ({"num_beams": 3}, 6), ({"prompt_lookup_num_tokens": 3}, 1)):
        given = {"attention_mask": mask[-rows:], "max_new_tokens": 20, "do_sample": False} | options
        cache = static(model.config, rows, spare=8)
        before = addresses(cache)
        want = theirs.generate(ids[-rows:], **given)
        assert torch.equal(theirs.generate(ids[-rows:], past_key_values=cache, **given), want)
        assert addresses(cache) == before


# by the decode loop: the runtime in a few lines


def run(
    model: Any, cache: StaticRollingCache, ids: Tensor, count: Any = None, past: int | None = None
) -> Tensor:
    """New tokens [B, T] of all rows -> logits; ``past``: as a chunk of a prompt, else as a step."""
    inner, (batch, length) = model.model, ids.shape
    positions = cache.advance(length if count is None else count)
    angles = positions[:, None] - cache.start[:, None] + torch.arange(length)
    x = inner.embed_tokens(ids)
    cos, sin = inner.rotary_emb(x, angles.clamp_min(0))
    for i, layer in enumerate(inner.layers):
        attention, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            p(h).view(batch, length, -1, attention.head_dim)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if past is None:
            context = cache.step(i, q, k, v, cos, sin, positions)
        else:
            q, keys, values, first = cache.extend(i, q, k, v, cos, sin, positions, past)
            context = sliding_attention(q, keys, values, window=model.config.sliding_window, starts=first)
        x = x + attention.o_proj(context.reshape(batch, length, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(inner.norm(x))


@pytest.mark.parametrize("how", ["window", "bound"])
@torch.no_grad()
def test_rows_go_on_their_own(model: Any, endless: Any, how: str) -> None:
    """Prompts of other lengths, a row that rests, one that gets another text when its own is over."""
    used = model if how == "window" else endless
    cache = static(used.config, 3, **({} if how == "window" else {"length": 40}))
    before = addresses(cache)
    texts = list(tokens(4, 40))
    done = [0, 0, 0]
    # one row after the other, in chunks; the others rest
    for row, chunks in ((0, (3,)), (1, (9, 4)), (2, (1, 2))):
        for chunk in chunks:
            ids, count = torch.zeros(3, chunk, dtype=torch.long), torch.zeros(3, dtype=torch.int32)
            ids[row], count[row] = texts[row][done[row] : done[row] + chunk], chunk
            logits = run(used, cache, ids, count, past=done[row])[row]
            close(logits, used(texts[row][None, : done[row] + chunk]).logits[0, -chunk:])
            done[row] += chunk
    assert cache.seen.tolist() == done
    for step in range(22):
        if step == 6:
            # row 1 is over: it takes the fourth text, from its beginning
            cache.reset([1])
            texts[1], done[1] = texts[3], 0
        if step == 12:
            cache.reset(torch.tensor([False, False, True]))
            done[2] = 0
        count = torch.ones(3, dtype=torch.int32)
        if step in (4, 5):
            count[0] = 0
        ids = torch.stack([texts[row][done[row]] for row in range(3)])[:, None]
        logits = run(used, cache, ids, count)
        for row in range(3):
            if count[row]:
                done[row] += 1
                close(logits[row], used(texts[row][None, : done[row]]).logits[0, -1:])
    assert cache.seen.tolist() == done and addresses(cache) == before


def padded(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Positions without the padding, as generate() gives them."""
    places = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits


@torch.no_grad()
def test_left_padding_then_the_decode_loop(model: Any) -> None:
    """A padded prompt goes through transformers, or in chunks; the steps that follow are those of the full cache."""
    ids = tokens(3, 24)
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[2, :2] = 0
    for how in ("transformers", "chunks"):
        cache, full = static(model.config, 3), DynamicCache()
        cache.pad_left(mask[:, :12])
        assert cache.start.tolist() == [9, 0, 2]
        want = padded(model, ids[:, :12], mask[:, :12], full)
        if how == "transformers":
            got = padded(model, ids[:, :12], mask[:, :12], cache)
        else:
            chunks = [(0, 4), (4, 5), (5, 12)]
            got = torch.cat([run(model, cache, ids[:, a:b], past=a) for a, b in chunks], dim=1)
        kept = mask[:, :12].bool()
        close(got[kept], want[kept])
        for t in range(12, 24):
            got = run(model, cache, ids[:, t : t + 1])
            close(got, padded(model, ids[:, t : t + 1], mask[:, : t + 1], full))
        # and back
        more = tokens(3, 3, seed=9)
        longer = torch.cat((mask, torch.ones_like(more)), dim=1)
        got, want = (padded(model, more, longer, c) for c in (cache, full))
        close(got, want)


@torch.no_grad()
def test_several_tokens_at_once_and_some_taken_back(model: Any) -> None:
    """A speculative step that is wrong leaves no trace, in rows that accept differently much."""
    cache, texts, done = static(model.config, 2, spare=3), tokens(2, 60), [2, 2]
    run(model, cache, texts[:, :2], past=0)
    for accepted in ((4, 1), (1, 1), (2, 3), (1, 4), (4, 4), (3, 1)):
        ids = torch.stack([texts[row][done[row] : done[row] + 4] for row in range(2)])
        for row in range(2):
            ids[row, accepted[row] :] = 60 - ids[row, accepted[row] :]
        logits = run(model, cache, ids)
        for row in range(2):
            good = accepted[row]
            close(logits[row, :good], model(texts[row][None, : done[row] + good]).logits[0, -good:])
            done[row] += good
        cache.retract(4 - torch.tensor(accepted, dtype=torch.int32))
        assert cache.seen.tolist() == done
    with pytest.raises(ValueError, match="window of 5 and 5 queries need 9 slots, the ring has 8"):
        run(model, cache, texts[:, :5])


@torch.no_grad()
def test_int8_keys_and_values(model: Any) -> None:
    """The logits of a full cache of the same codes; memory is one byte a value, and a scale a token and head."""
    cache, full, ids = static(model.config, 2, int8=True), Quantizing(), tokens(2, 20)
    assert cache.nbytes == 2 * 2 * 2 * 2 * WINDOW * (8 + 4) + 3 * 2 * 4
    close(run(model, cache, ids[:, :3], past=0), model(ids[:, :3], past_key_values=full).logits)
    close(run(model, cache, ids[:, 3:9], past=3), model(ids[:, 3:9], past_key_values=full).logits)
    # a step reads its own token from the ring as well
    full.fresh = False
    for t in range(9, 20):
        close(run(model, cache, ids[:, t : t + 1]), model(ids[:, t : t + 1], past_key_values=full).logits)


@torch.no_grad()
def test_crop_and_reset(model: Any) -> None:
    ids, whole = tokens(2, 30), model(tokens(2, 30)).logits
    cache = static(model.config, 2, spare=3)
    model(ids[:, :20], past_key_values=cache)
    cache.crop(-4)
    cache.crop(0)
    close(model(ids[:, 16:22], past_key_values=cache).logits, whole[:, 16:22])
    copied = copy.deepcopy(cache)
    with pytest.raises(
        RuntimeError, match=r"positions from 13 on.*ring of 8 starts at 14; make the cache with spare=4"
    ):
        cache.crop(-5)
    cache.crop(-2)
    # what was overwritten stays lost, although the ring would be long enough for two more
    with pytest.raises(RuntimeError, match="positions from 13 on are needed again"):
        cache.crop(-3)
    close(model(ids[:, 20:30], past_key_values=cache).logits, whole[:, 20:30])
    close(model(ids[:, 22:30], past_key_values=copied).logits, whole[:, 22:30])
    for bad in (1, -31):
        with pytest.raises(ValueError, match="of at most the 30 positions seen"):
            cache.crop(bad)
    cache.reset()
    assert cache.get_seq_length() == 0
    close(model(ids[:, :7], past_key_values=cache).logits, whole[:, :7])


@torch.no_grad()
def test_what_was_taken_back_has_overwritten_what_it_did(model: Any) -> None:
    cache = static(model.config, 2, spare=3)
    model(tokens(2, 20), past_key_values=cache)
    cache.retract(3)
    with pytest.raises(RuntimeError, match=r"positions from 11 on.*ring of 8 starts at 12"):
        cache.crop(-2)
    cache.crop(-1)
    whole = model(tokens(2, 20)).logits
    close(model(tokens(2, 20)[:, 16:], past_key_values=cache).logits, whole[:, 16:])


@torch.no_grad()
def test_memory_is_constant_and_that_of_the_rolling_cache(model: Any) -> None:
    cache, rolling = static(model.config, 1), RollingCache(model.config)
    ids, before = tokens(1, 200), addresses(cache)
    whole = model(ids).logits
    model(ids[:, :3], past_key_values=rolling)
    assert cache.nbytes == rolling.nbytes + 12
    close(run(model, cache, ids[:, :60], past=0), whole[:, :60])
    for t in range(60, 200):
        close(run(model, cache, ids[:, t : t + 1]), whole[:, t : t + 1])
    assert addresses(cache) == before and cache.nbytes == rolling.nbytes + 12


def test_bad_input(model: Any, endless: Any) -> None:
    with pytest.raises(ValueError, match="no sliding window, so the cache needs a bound: give length="):
        static(endless.config, 1)
    for name, value in (("batch_size", 0), ("length", 0), ("spare", -1)):
        with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
            StaticRollingCache(model.config, **({"batch_size": 1} | {name: value}))
    mixed = tiny()
    mixed.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="same attention in every layer"):
        static(mixed, 1)
    cache = static(model.config, 2)
    with pytest.raises(ValueError, match=r"made for \[2, 2, any, 8\].*got \[3, 2, 4, 8\]"):
        model(tokens(3, 4), past_key_values=cache)
    with pytest.raises(ValueError, match=r"must be \[2, T\], got \[3, 4\]"):
        cache.pad_left(torch.ones(3, 4))
    for change in (
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
    ):
        with pytest.raises(ValueError, match="made for 2 rows and keeps them"):
            change()
    cache.advance(torch.tensor([1, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"rows have seen \[1, 3\] positions"):
        model(tokens(2, 1), past_key_values=cache)
