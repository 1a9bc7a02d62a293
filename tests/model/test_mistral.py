"""Our Mistral against transformers' own with the same weights: numbers, losses, gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, MistralConfig, StaticCache

from brise.model import mistral
from brise.model.linear import linear_factory, make_linear

IMPLEMENTATIONS = ("eager", "sdpa")
VOCAB = 61


def tiny(**changes: Any) -> MistralConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
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


def pair(
    config: MistralConfig,
    implementation: str = "sdpa",
    head: str = "ForCausalLM",
    dtype: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """transformers' model and ours, in eval mode, with one set of weights."""
    torch.manual_seed(0)
    theirs = getattr(transformers, f"Mistral{head}")._from_config(
        copy.deepcopy(config), attn_implementation=implementation
    )
    ours = getattr(mistral, f"Mistral{head}")._from_config(
        copy.deepcopy(config), attn_implementation=implementation
    )
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype).eval(), ours.to(dtype).eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def padded(batch: int, length: int, side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask; row i has 2 i padding tokens on one side."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        columns = slice(0, 2 * row) if side == "left" else slice(length - 2 * row, length)
        ids[row, columns], mask[row, columns] = 0, 0
    return ids, mask


CONFIGS = {
    "window shorter than the text": {},
    "window longer than the text": {"sliding_window": 40},
    "window of one": {"sliding_window": 1},
    "no window": {"sliding_window": None},
    "one query per key head": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "head_dim given": {"head_dim": 12},
    "tied": {"tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_forward_and_gradients(changes: dict[str, Any], implementation: str) -> None:
    theirs, ours = pair(tiny(**changes), implementation)
    ids = tokens(2, 13)
    arguments = {"labels": ids, "output_hidden_states": True, "output_attentions": implementation == "eager"}
    expected, got = theirs(ids, **arguments), ours(ids, **arguments)
    close(got.logits, expected.logits)
    close(got.loss, expected.loss)
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    for a, b in zip(got.hidden_states, expected.hidden_states):
        close(a, b)
    if implementation == "eager":
        assert len(got.attentions) == 2
        for a, b in zip(got.attentions, expected.attentions):
            close(a, b)
    expected.loss.backward()
    got.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == set(gradients)
    for name, parameter in ours.named_parameters():
        close(parameter.grad, gradients[name])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_to_the_bit(dtype: torch.dtype, implementation: str) -> None:
    theirs, ours = pair(tiny(), implementation, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(ours(tokens(2, 11)).logits, theirs(tokens(2, 11)).logits)
    assert ours(tokens(1, 2)).logits.dtype == dtype


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str, implementation: str) -> None:
    theirs, ours = pair(tiny(), implementation)
    ids, mask = padded(3, 12, side)
    with torch.no_grad():
        expected, got = theirs(ids, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits
    close(got, expected)
    # and padding changes nothing for the tokens that are none
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        shifted = ours(ids, attention_mask=mask, position_ids=positions).logits
        for row in range(3):
            close(shifted[row][mask[row].bool()], ours(ids[row : row + 1, mask[row].bool()]).logits[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_window_boundary_by_brute_force(implementation: str) -> None:
    """One layer: logits at a query move when a key is replaced iff query - W < key <= query."""
    window, length = 4, 10
    ours = pair(tiny(num_hidden_layers=1, sliding_window=window), implementation)[1]
    ids = tokens(1, length)
    with torch.no_grad():
        base = ours(ids).logits[0]
        for key in range(length):
            changed = ids.clone()
            changed[0, key] = changed[0, key] % (VOCAB - 1) + 1
            moved = (ours(changed).logits[0] != base).any(-1).tolist()
            assert moved == [query - window < key <= query for query in range(length)], f"key {key}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_finished_mask(implementation: str) -> None:
    """A 4-D mask is used as it is: no causality, no window is added."""
    theirs, ours = pair(tiny(), implementation)
    ids = tokens(2, 7)
    keep = torch.rand((2, 1, 7, 7), generator=torch.Generator().manual_seed(1)) < 0.5
    keep |= torch.eye(7, dtype=torch.bool)
    additive = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=additive).logits
        close(ours(ids, attention_mask=additive).logits, expected)
        close(ours(ids, attention_mask=keep).logits, expected)


def test_position_ids() -> None:
    theirs, ours = pair(tiny())
    ids, positions = (
        tokens(2, 9),
        torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 2, 4, 6, 8, 10, 12, 14, 16]]),
    )
    mask = torch.ones_like(ids)
    with torch.no_grad():
        got = ours(ids, attention_mask=mask, position_ids=positions).logits
        close(got, theirs(ids, attention_mask=mask, position_ids=positions).logits)
        assert not torch.allclose(got[1], ours(ids).logits[1], atol=1e-3)


def test_packed_texts_do_not_see_each_other() -> None:
    theirs, ours = pair(tiny(sliding_window=20))
    ids, positions = tokens(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        got = ours(ids, position_ids=positions, use_cache=False).logits
        close(got, theirs(ids, position_ids=positions, use_cache=False).logits)
        close(got[:, 4:], ours(ids[:, 4:]).logits)


def test_embeddings_instead_of_ids() -> None:
    theirs, ours = pair(tiny())
    ids = tokens(2, 6)
    embeddings = theirs.get_input_embeddings()(ids).detach()
    close(ours(inputs_embeds=embeddings).logits, theirs(ids).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds, got both"):
        ours(ids, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds, got neither"):
        ours()


def test_logits_to_keep() -> None:
    theirs, ours = pair(tiny())
    ids = tokens(2, 6)
    per_text = torch.tensor([[0, 3], [5, 1]])
    where = torch.rand(2, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    with torch.no_grad():
        full = ours(ids).logits
        for n in (0, 1, 4):
            kept = ours(ids, logits_to_keep=n).logits
            close(kept, theirs(ids, logits_to_keep=n).logits)
            close(kept, full[:, -n:] if n else full)
        close(ours(ids, logits_to_keep=torch.tensor([1, 4])).logits, full[:, [1, 4]])
        close(ours(ids, logits_to_keep=per_text).logits, full[torch.tensor([[0], [1]]), per_text])
        close(ours(ids, logits_to_keep=where).logits, full[where])


def test_loss_options() -> None:
    theirs, ours = pair(tiny())
    ids = tokens(2, 8)
    labels = ids.clone()
    labels[:, :3] = -100
    for extra in ({}, {"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(7)}):
        close(ours(ids, labels=labels, **extra).loss, theirs(ids, labels=labels, **extra).loss)


def test_return_dict() -> None:
    theirs, ours = pair(tiny())
    ids = tokens(1, 4)
    expected = theirs(ids, labels=ids, return_dict=False, use_cache=False, output_hidden_states=True)
    got = ours(ids, labels=ids, return_dict=False, use_cache=False, output_hidden_states=True)
    assert isinstance(got, tuple) and len(got) == len(expected) == 3
    close(got[1], expected[1])
    ours.config.return_dict = False
    assert isinstance(ours(ids), tuple)
    assert isinstance(ours.model(ids), tuple)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    theirs, ours = pair(tiny(attention_dropout=0.2), "eager")
    ids = tokens(2, 9)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert ours.is_gradient_checkpointing
    for model in (theirs, ours):
        model.train()
        torch.manual_seed(3)
        model(ids, labels=ids).loss.backward()
    for expected, got in zip(theirs.parameters(), ours.parameters()):
        close(got.grad, expected.grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_dropout_by_seed(implementation: str) -> None:
    theirs, ours = pair(tiny(attention_dropout=0.5), implementation)
    ids = tokens(2, 9)
    still = ours(ids).logits
    logits = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(4)
        logits.append(model(ids).logits)
    close(logits[1], logits[0])
    assert not torch.allclose(logits[1], still, atol=1e-3)


def caches(config: MistralConfig) -> dict[str, Any]:
    return {
        "none given": lambda: None,
        "dynamic, sliding": lambda: DynamicCache(config=config),
        "dynamic, full": lambda: DynamicCache(),
        "static": lambda: StaticCache(config=config, max_cache_len=24),
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("steps", [(1,) * 14, (6, 1, 1, 1, 5), (3, 9, 2), (12, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", list(caches(tiny())))
def test_cached_continuation(kind: str, steps: tuple[int, ...], implementation: str) -> None:
    """Step by step, left-padded, through each cache: the logits of the whole text at once."""
    theirs, ours = pair(tiny(), implementation)
    cache = caches(ours.config)[kind]()
    ids, mask = padded(2, 14, "left")
    with torch.no_grad():
        whole = theirs(ids, attention_mask=mask).logits
        seen = 0
        for step in steps:
            until = seen + step
            out = ours(
                ids[:, seen:until], attention_mask=mask[:, :until], past_key_values=cache, use_cache=True
            )
            kept = mask[:, seen:until].bool()
            close(out.logits[kept], whole[:, seen:until][kept])
            cache, seen = out.past_key_values, until
    assert cache.get_seq_length() == seen


def test_use_cache_false_keeps_nothing() -> None:
    ours = pair(tiny())[1]
    assert ours(tokens(1, 3), use_cache=False).past_key_values is None
    assert ours(tokens(1, 3), use_cache=False, past_key_values=DynamicCache()).past_key_values is None
    ours.config.use_cache = False
    assert ours(tokens(1, 3)).past_key_values is None


def test_attention_implementation_is_chosen_by_name() -> None:
    """A kernel registered under a name is called with the window; no mask is made unless it registers one."""
    seen: list[Any] = []

    def probe(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        seen.append((tuple(q.shape), tuple(k.shape), mask, kwargs["sliding_window"], kwargs["scaling"]))
        assert torch.equal(kwargs["position_ids"], torch.arange(9)[None])
        return q.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("brise_probe", probe)
    try:
        ours = pair(tiny())[1]
        ours.set_attn_implementation("brise_probe")
        ours(tokens(2, 9))
    finally:
        del transformers.AttentionInterface._global_mapping["brise_probe"]
    assert seen == [((2, 4, 9, 8), (2, 2, 9, 8), None, 5, 8**-0.5)] * 2


def test_switching_the_implementation_of_a_model() -> None:
    _theirs, ours = pair(tiny(), "eager")
    ids, mask = padded(2, 9, "left")
    with torch.no_grad():
        expected = ours(ids, attention_mask=mask).logits
        ours.set_attn_implementation("sdpa")
        assert ours.config._attn_implementation == "sdpa"
        close(ours(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


def test_every_dense_layer_comes_from_the_factory() -> None:
    made: list[tuple[int, int, bool]] = []

    def factory(in_features: int, out_features: int, bias: bool) -> nn.Module:
        made.append((in_features, out_features, bias))
        return nn.Linear(in_features, out_features, bias=bias)

    heads = {
        "Model": 0,
        "ForCausalLM": 1,
        "ForSequenceClassification": 1,
        "ForTokenClassification": 1,
        "ForQuestionAnswering": 1,
    }
    for name, extra in heads.items():
        made.clear()
        with linear_factory(factory):
            model = getattr(mistral, f"Mistral{name}")(tiny())
        assert len(made) == 14 + extra == sum(isinstance(m, nn.Linear) for m in model.modules())
    made.clear()
    make_linear(3, 4)
    assert made == []


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match=r"num_attention_heads is 4, expected a multiple of .* = 3"):
        mistral.MistralModel(tiny(num_key_value_heads=3, head_dim=8))


def test_compiled_whole() -> None:
    ours = pair(tiny())[1]
    ids = tokens(2, 8)
    with torch.no_grad():
        compiled = torch.compile(ours, backend="eager", fullgraph=True)
        close(compiled(ids, use_cache=False).logits, ours(ids, use_cache=False).logits)
