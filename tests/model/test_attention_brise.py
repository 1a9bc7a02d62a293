"""`attn_implementation="brise"` in transformers' models and in ours: the logits, gradients and tokens of `sdpa`."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache, masking_utils

from brise.kernels.attention_reference import visible_in
from brise.kernels.budget import check_budget
from brise.model import attention_brise, mistral
from brise.model.cache import RollingCache

attention_brise.register()

MODELS = {
    "mistral": transformers.MistralForCausalLM,
    "ours": mistral.MistralForCausalLM,
    "llama": transformers.LlamaForCausalLM,
}


def tiny(kind: str = "mistral", **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 7,
        "initializer_range": 0.3,
    }
    if kind == "llama":
        return LlamaConfig(**(settings | changes))
    return MistralConfig(**({**settings, "sliding_window": 6} | changes))


def built(kind: str = "mistral", **changes: Any) -> tuple[Any, Any]:
    """transformers' own model with `sdpa`, and the one under test with `brise`, of the same weights."""
    torch.manual_seed(0)
    config = tiny(kind, **changes)
    stock = MODELS["llama" if kind == "llama" else "mistral"]
    theirs = stock._from_config(copy.deepcopy(config), attn_implementation="sdpa")
    ours = MODELS[kind]._from_config(copy.deepcopy(config), attn_implementation="brise")
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(8, 61, (batch, length), generator=torch.Generator().manual_seed(0))


def padded(side: str, length: int = 17) -> tuple[Tensor, Tensor]:
    """Three texts, of 17, 12 and 1 tokens, padded on one side."""
    ids, mask = tokens(3, length), torch.ones(3, length, dtype=torch.long)
    for row, missing in enumerate((0, 5, length - 1)):
        part = slice(0, missing) if side == "left" else slice(length - missing, length)
        ids[row, part], mask[row, part] = 0, 0
    return ids, mask


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_it_is_registered_when_it_is_asked_for_and_not_before() -> None:
    code = """
import torch, transformers
from brise.model.mistral import MistralForCausalLM
from transformers import AttentionInterface, AttentionMaskInterface, MistralConfig
config = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, vocab_size=16)
assert "brise" not in AttentionInterface() and "brise" not in AttentionMaskInterface()
ours = MistralForCausalLM._from_config(MistralConfig(**config))
ours.set_attn_implementation("brise")
assert ours.config._attn_implementation == "brise"
assert "brise" in AttentionInterface() and "brise" in AttentionMaskInterface()
AttentionInterface._global_mapping.pop("brise"), AttentionMaskInterface._global_mapping.pop("brise")
MistralForCausalLM._from_config(MistralConfig(**config), attn_implementation="brise")
AttentionInterface._global_mapping.pop("brise")
try:
    transformers.MistralForCausalLM._from_config(MistralConfig(**config), attn_implementation="brise")
    raise SystemExit("a stock model knows brise without being told")
except ValueError:
    pass
import brise.model.hf
stock = transformers.MistralForCausalLM._from_config(MistralConfig(**config), attn_implementation="brise")
stock(torch.arange(5)[None])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("side", ["left", "right", None])
def test_logits_and_gradients(kind: str, side: str | None) -> None:
    theirs, ours = built(kind)
    ids, mask = padded(side) if side else (tokens(2, 17), None)
    keep = torch.ones_like(ids).bool() if mask is None else mask.bool()
    labels = ids.masked_fill(~keep, -100)
    results = []
    for model in (theirs, ours):
        out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        results.append((out.logits[keep], {n: p.grad for n, p in model.named_parameters()}))
    close(results[1][0], results[0][0])
    for name, grad in results[0][1].items():
        close(results[1][1][name], grad)


def test_a_training_step_lowers_the_loss() -> None:
    _, ours = built("ours")
    ours.train()
    ids, mask = padded("right")
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = ours(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda config: DynamicCache(),
    "sliding": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
    "rolling": lambda config: RollingCache(config),
}


@pytest.mark.parametrize(
    "kind,cache", [(k, c) for k in MODELS for c in CACHES if (k, c) != ("llama", "rolling")]
)
def test_greedy_generation_with_every_cache(kind: str, cache: str) -> None:
    theirs, ours = built(kind)
    ids, mask = padded("left", 9)
    results = [
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=16,
            past_key_values=make(model.config),
            disable_compile=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for model, make in ((theirs, lambda config: DynamicCache()), (ours, CACHES[cache]))
    ]
    assert torch.equal(results[1].sequences, results[0].sequences)
    for got, expected in zip(results[1].logits, results[0].logits, strict=True):
        close(got, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
    ],
)
def test_generation_in_other_ways(options: dict[str, Any]) -> None:
    theirs, ours = built()
    ids = tokens(1, 5).repeat(1, 3)
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, **options}
    assert torch.equal(ours.generate(ids, **arguments), theirs.generate(ids, **arguments))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("side", ["left", None])
def test_a_prompt_in_pieces(cache: str, side: str | None) -> None:
    theirs, ours = built("ours")
    ids, mask = padded("left", 23)
    mask = mask if side else torch.ones_like(mask)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        past, got = CACHES[cache](ours.config), []
        for first, end in ((0, 11), (11, 12), (12, 23)):
            seen = mask[:, :end] if side else None
            out = ours(ids[:, first:end], attention_mask=seen, past_key_values=past, use_cache=True)
            got.append(out.logits)
    close(torch.cat(got, 1)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", ["positions", "positions, cached", "cu_seq_lens, cached"])
def test_packed_texts_do_not_see_each_other(kind: str, how: str) -> None:
    _, ours = built(kind)
    texts = [tokens(1, 30)[:, a:b] for a, b in ((0, 1), (1, 14), (14, 30))]
    expected = torch.cat([ours(text).logits for text in texts], 1)
    options: dict[str, Any] = {"use_cache": how.endswith("cached")}
    if how.startswith("positions"):
        options["position_ids"] = torch.cat([torch.arange(t.shape[1]) for t in texts])[None]
    else:
        # rotation is relative within a text, so absolute positions serve as well
        ends = torch.tensor([0, 1, 14, 30], dtype=torch.int32)
        options |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 16, "max_length_k": 16}
    close(ours(torch.cat(texts, 1), **options).logits, expected)
    with torch.inference_mode():
        if "position_ids" in options:
            options["position_ids"] = options["position_ids"].clone()
        close(ours(torch.cat(texts, 1), **options).logits, expected)
    alone = ours(torch.cat(texts, 1), use_cache=False).logits
    assert not torch.allclose(alone, expected, atol=1e-2), "the test would see no difference"


def test_packed_texts_that_look_both_ways() -> None:
    _, ours = built()
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    ends = torch.tensor([0, 5, 9], dtype=torch.int32)

    def run(part: slice, **packing: Any) -> Tensor:
        states = (x[:, :, part] for x in (q, k, v))
        return attention_brise.brise_attention_forward(ours, *states, None, is_causal=False, **packing)[0]

    alone = torch.cat((run(slice(0, 5)), run(slice(5, 9))), 1)
    close(run(slice(0, 9), cu_seq_lens_q=ends, cu_seq_lens_k=ends), alone)


def test_positions_are_read_anew_when_they_changed() -> None:
    """The layers share what was read off one tensor: another one, or a change in place, is read again."""
    _, ours = built()
    text = tokens(1, 30)

    def cut(at: int) -> Tensor:
        return torch.cat((ours(text[:, :at]).logits, ours(text[:, at:]).logits), 1)

    first, second = torch.arange(30)[None], torch.cat((torch.arange(5), torch.arange(25)))[None]
    whole = ours(text, position_ids=first).logits
    close(ours(text, position_ids=second).logits, cut(5))
    close(ours(text, position_ids=first).logits, whole)
    first[:, 14:] -= 14
    close(ours(text, position_ids=first).logits, cut(14))


MAKERS = {
    "causal": masking_utils.create_causal_mask,
    "sliding": masking_utils.create_sliding_window_causal_mask,
    "chunked": masking_utils.create_chunked_causal_mask,
    "both ways": masking_utils.create_bidirectional_mask,
    "both ways, sliding": masking_utils.create_bidirectional_sliding_window_mask,
}


def masks(make: Callable[..., Any], **arguments: Any) -> tuple[Tensor, Tensor]:
    """What transformers' own factory makes for `sdpa`, and ours as booleans [B, T, keys]."""
    found = []
    for name in ("sdpa", "brise"):
        config = arguments["config"]
        config._attn_implementation = name
        found.append(make(**arguments))
    expected, got = found
    if got is None:
        return expected[:, 0], torch.ones(expected.shape[-2:]).tril(
            expected.shape[-1] - expected.shape[-2]
        ).bool()
    assert got.dtype == torch.int32 and got.shape[1] == 1
    if got.shape[2] == 0:
        length = expected.shape[-1]
        position = torch.arange(expected.shape[2]) + length - expected.shape[2]
        got = torch.stack(((position - got.shape[3] + 1).clamp(min=0), position + 1)).int()[None, None]
    return expected[:, 0], visible_in(got[:, 0], expected.shape[-1]).expand(expected.shape[0], -1, -1)


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize(
    "kind,cached", [(k, c) for k in MAKERS for c in (False, True) if not (c and k[0] == "b")]
)
def test_the_mask_is_that_of_transformers(kind: str, side: str | None, cached: bool) -> None:
    config = tiny(sliding_window=6)
    if kind == "chunked":
        config.attention_chunk_size, config.sliding_window = 4, None
    make = MAKERS[kind]
    length = 17
    mask = padded(side, length)[1] if side else None
    past = None
    if cached:
        past = DynamicCache()
        past.update(torch.zeros(3, 2, 9, 8), torch.zeros(3, 2, 9, 8), 0)
    new = length - 9 if cached else length
    arguments = {"config": config, "inputs_embeds": torch.zeros(3, new, 8), "attention_mask": mask}
    arguments["past_key_values"] = past
    skip = "allow_is_bidirectional_skip" if kind.startswith("both") else "allow_is_causal_skip"
    expected, got = masks(make, **arguments, **{skip: False})
    assert torch.equal(got.expand_as(expected), expected)


def test_the_mask_of_packed_texts_and_of_blocks() -> None:
    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 0]])
    config = tiny(sliding_window=3)
    embeds = torch.zeros(2, 10, 8)
    for make in (masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask):
        common = {"config": config, "inputs_embeds": embeds, "attention_mask": None, "past_key_values": None}
        expected, got = masks(make, **common, position_ids=position)
        assert torch.equal(got, expected)
        blocks = torch.tensor([[-1, -1, 0, 0, 0, 0, -1, 1, 1, -1]]).expand(2, -1)
        expected, got = masks(make, **common, block_sequence_ids=blocks)
        assert torch.equal(got, expected)


def test_the_fast_way_without_a_mask() -> None:
    """Nothing padded or packed: no bounds are made, and the kernel works them out from the window."""
    common = {"batch_size": 2, "q_length": 5, "kv_length": 9, "q_offset": 4}
    assert attention_brise.brise_mask(**common) is None
    # a static cache holds keys behind the last query: their interval has to be said
    early = attention_brise.brise_mask(**(common | {"q_offset": 2}))
    assert early is not None and early[:, 0, 1].tolist() == [[3, 4, 5, 6, 7]] * 2 and not early[:, 0, 0].any()
    window = {"local_size": 4, "allow_is_causal_skip": True, "config": tiny()}
    ones = torch.ones(2, 9, dtype=torch.long)
    mask = attention_brise.brise_mask(**common, **window, attention_mask=ones)
    assert mask is not None and mask.shape == (2, 1, 0, 4)
    assert attention_brise.brise_mask(**common, **(window | {"local_size": 9})) is None
    assert attention_brise.brise_mask(**common, **(window | {"local_size": 8})) is not None


def test_compiled_whole() -> None:
    theirs, ours = built("ours", num_hidden_layers=1)
    ids, mask = padded("left")
    compiled = torch.compile(ours.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(ids, attention_mask=mask, use_cache=False)[0]
        close(got[mask.bool()], theirs.model(ids, attention_mask=mask)[0][mask.bool()])


def test_under_autocast() -> None:
    theirs, ours = built("ours")
    ids = tokens(2, 12)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, eager = ours(ids).logits, theirs(ids).logits
        # as adapters make them: queries in float32 beside values in the lower precision
        q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8).bfloat16()
        out, _ = attention_brise.brise_attention_forward(ours, q, k, v, None, is_causal=True)
    assert got.dtype == eager.dtype == out.dtype == torch.bfloat16
    with torch.no_grad():
        exact = theirs.double()(ids).logits
    check_budget(got, eager, exact)


def test_what_it_does_not_do_is_refused() -> None:
    _, ours = built("ours", attention_dropout=0.1)
    ids = tokens(2, 6)
    with pytest.raises(ValueError, match=r"no dropout, got 0.1: set config.attention_dropout to 0"):
        ours.train()(ids)
    ours.eval()
    for mask in (torch.ones(2, 1, 6, 6, dtype=torch.bool), torch.zeros(2, 1, 6, 6)):
        with pytest.raises(ValueError, match=r"no finished mask, got torch.\w+ \[2, 1, 6, 6\]"):
            ours(ids, attention_mask=mask)
    holes = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="zeros between its ones"):
        ours(ids, attention_mask=holes)
    with pytest.raises(ValueError, match="use 'sdpa' or 'flex_attention'"):
        masking_utils.create_causal_mask(
            ours.config, torch.zeros(2, 6, 8), None, None, or_mask_function=lambda b, h, q, k: q >= 0
        )
    x = torch.zeros(1, 2, 4, 8)
    for option in ({"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"output_attentions": True}):
        with pytest.raises(ValueError, match=f"has no {next(iter(option))}"):
            attention_brise.brise_attention_forward(ours, x, x, x, None, **option)
    ends = torch.tensor([0, 4])
    two = torch.zeros(2, 2, 4, 8)
    with pytest.raises(ValueError, match="a batch of 2: flatten it"):
        attention_brise.brise_attention_forward(
            ours, two, two, two, None, cu_seq_lens_q=ends, cu_seq_lens_k=ends
        )
    with pytest.raises(ValueError, match="in both directions"):
        attention_brise.brise_attention_forward(ours, x, x, x, None, sliding_window=2, is_causal=False)
