"""The decode loop beside transformers' own generate, on the same weights."""

import copy

import pytest
import torch
from transformers import DynamicCache, MistralConfig
from transformers import MistralForCausalLM as Peer

from brise.kernels import native
from brise.model import decode_engine as engine_module
from brise.model.cache_rows import rows_of
from brise.model.decode_attend import LeanAttention, StepAttention
from brise.model.generate import Generator, Request, RequestError, generate
from brise.model.mistral import MistralForCausalLM
from brise.model.sampling import Sampling
from brise.model.speculative import DraftModel, PromptLookup
from brise.model.whole_step import WholeStep
from brise.quant.apply import quantize_model
from brise.quant.presets import PRESETS

NEW = 24
LENGTHS = (5, 1, 19, 12)


def config(**changes):
    values = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    return MistralConfig(**{**values, **changes})


def pair(**changes):
    torch.manual_seed(0)
    peer = Peer(config(**changes)).eval()
    ours = MistralForCausalLM(config(**changes)).eval()
    ours.load_state_dict(peer.state_dict())
    return peer, ours


@pytest.fixture(scope="module", params=[None, 7], ids=["no window", "window 7"])
def models(request):
    """A peer, ours, left-padded prompts with their mask, and what the peer writes."""
    peer, ours = pair(sliding_window=request.param)
    prompts = [torch.randint(1, 61, (n,)).tolist() for n in LENGTHS]
    width = max(LENGTHS)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    wanted = peer.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return peer, ours, ids, mask, wanted[:, width:].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repack": False},
        {"batch_size": 1},
        {"batch_size": 3, "chunk": 4},
        {"batch_invariant": True, "chunk": 8},
    ],
    ids=str,
)
def test_the_tokens_are_those_of_transformers(models, options):
    _, ours, ids, mask, wanted = models
    assert generate(ours, ids, mask, max_new_tokens=NEW, **options) == wanted


@pytest.mark.parametrize(
    "proposer", [PromptLookup(6), PromptLookup(2, longest=1), "itself", "other"], ids=str
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_drafts_change_nothing_but_the_number_of_steps(models, proposer, batch_size):
    _, ours, ids, mask, wanted = models
    if proposer == "itself":
        proposer = DraftModel(ours, 3)
    elif proposer == "other":
        proposer = DraftModel(pair(num_hidden_layers=1)[1], 3)
    generator = Generator(ours, batch_size=batch_size, proposer=proposer)
    prompts = [[t for t, m in zip(row, kept) if m] for row, kept in zip(ids.tolist(), mask.tolist())]
    done = generator.complete([Request(p, NEW) for p in prompts])
    assert [c.tokens for c in done] == wanted
    counts = generator.counts
    assert counts.tokens == NEW * len(prompts) and counts.accepted <= counts.proposed
    if isinstance(proposer, DraftModel) and proposer._source is ours:
        # all right, but for the ends, which are cut off before they are proposed
        assert counts.acceptance == 1 and counts.steps < NEW * len(prompts) / batch_size / 2
    elif isinstance(proposer, DraftModel):
        assert counts.acceptance < 0.5


def test_sampled_texts_are_the_same_with_drafts(models):
    _, ours, ids, mask, _ = models
    sampling = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.3, seed=3)
    plain = generate(ours, ids, mask, max_new_tokens=NEW, sampling=sampling)
    assert generate(ours, ids, mask, max_new_tokens=NEW, sampling=sampling, proposer=PromptLookup(4)) == plain
    assert generate(ours, ids, mask, max_new_tokens=NEW, sampling=sampling, batch_size=1) == plain
    other = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.3, seed=4)
    assert generate(ours, ids[:1], mask[:1], max_new_tokens=NEW, sampling=other) != plain[:1]


def test_a_repetition_penalty_is_that_of_transformers(models):
    peer, ours, ids, mask, _ = models
    for row in range(2):  # alone: left padding would count as repeated
        prompt = ids[row : row + 1, mask[row] > 0]
        wanted = peer.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False,
            repetition_penalty=1.4, pad_token_id=0,
        )  # fmt: skip
        got = generate(ours, prompt, max_new_tokens=NEW, sampling=Sampling(repetition_penalty=1.4))
        assert got == wanted[:, prompt.shape[1] :].tolist()


def logits_along(model, tokens, **options):
    """Logits [T, vocab] behind each token of a text, by decode steps that are fed it."""
    generator = Generator(model, **options)
    engine = generator._engine_for(len(tokens) + 1)
    cache = rows_of(engine.cache, 0, 1)
    out = []
    with torch.inference_mode():
        for token in tokens:
            step = torch.tensor([[token]])
            out.append(engine._forward(cache, step, torch.ones(1, dtype=torch.int32))[0, 0])
    return torch.stack(out)


def test_logits_of_steps_are_those_of_a_forward_pass(models):
    peer, ours, *_ = models
    tokens = torch.randint(1, 61, (30,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = peer(tokens[None]).logits[0]
        exact = copy.deepcopy(peer).double()(tokens[None]).logits[0]
    got = logits_along(ours, tokens.tolist())
    assert relative(got, exact) <= 2 * relative(theirs, exact)


class RoundedCache(DynamicCache):
    """Keys and values rounded to 127 steps of the largest value of their token and head."""

    def update(self, keys, values, *args, **kwargs):
        steps = [t.abs().amax(-1, keepdim=True) / 127 for t in (keys, values)]
        rounded = [(t / step).round() * step for t, step in zip((keys, values), steps)]
        return super().update(*rounded, *args, **kwargs)


def test_int8_keys_and_values_are_those_of_a_peer_whose_cache_rounds(models):
    peer, ours, *_ = models
    tokens = torch.randint(1, 61, (30,))
    with torch.inference_mode():
        wanted = peer(tokens[None], past_key_values=RoundedCache()).logits[0]
        exact = peer(tokens[None]).logits[0]
    codes = logits_along(ours, tokens.tolist(), int8_cache=True)
    # a value at the border of two steps may fall to either side: far less than what the steps do
    assert relative(codes, wanted) < 0.1 * relative(exact, wanted)


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def test_the_compiled_step_the_lean_way_and_the_ops_agree(models, monkeypatch):
    _, ours, ids, mask, wanted = models
    used = []
    ways = {WholeStep: "whole", LeanAttention: "lean", StepAttention: None}
    for kind in ways:
        call = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda s, *args, call=call: (used.append(type(s)), call(s, *args))[1]
        )
    for kind, way in ways.items():
        generator = Generator(ours, batch_size=4)
        engine = generator._engine_for(64)
        if kind is WholeStep and not engine.whole:
            assert "no compiled code" in engine.model.whole.refused, "the model is one that it takes"
            continue
        engine.whole, engine.lean = way == "whole", way == "lean"
        used.clear()
        prompts = [[t for t, m in zip(row, kept) if m] for row, kept in zip(ids.tolist(), mask.tolist())]
        assert [c.tokens for c in generator.complete([Request(p, NEW) for p in prompts])] == wanted
        assert set(used) == {kind}


def test_memory_stays_what_it_is_however_long_the_text():
    _, ours = pair(sliding_window=7, max_position_embeddings=4096)
    generator = Generator(ours)
    engine = generator._engine_for(1000)
    assert engine.cache.slots == 7
    where = [t.data_ptr() for layer in engine.cache.layers for t in layer.tensors.values()]
    done = generator.complete([Request([1, 2, 3], 400)])
    assert len(done[0].tokens) == 400 and generator._engine is engine
    assert [t.data_ptr() for layer in engine.cache.layers for t in layer.tensors.values()] == where


@pytest.mark.parametrize("compiled", [True, False], ids=["", "nothing compiled"])
@pytest.mark.parametrize("preset", [None, "int4-g32", "nf4-dq"])
def test_in_batch_invariant_mode_a_prompt_has_the_logits_that_it_has_alone(preset, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "_aside", [True])
    _, ours = pair(intermediate_size=128)
    if preset is not None:
        quantize_model(ours, PRESETS[preset])
    prompts = [torch.randint(1, 61, (n,)).tolist() for n in (3, 30, 9, 11, 2)]
    choose = engine_module.choose
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(
        engine_module, "choose", lambda logits, *rest: (kept.append(logits.clone()), choose(logits, *rest))[1]
    )
    generator = Generator(ours, batch_size=4, batch_invariant=True, chunk=8)
    generator.complete([Request(p, 6) for p in prompts])
    together = {row.numpy().tobytes() for logits in kept for row in logits}
    kept.clear()
    Generator(ours, batch_size=1, batch_invariant=True, chunk=8).complete([Request(p, 6) for p in prompts])
    alone = [row.numpy().tobytes() for logits in kept for row in logits]
    assert len(alone) == 30 and set(alone) <= together


def test_texts_end_with_eos_and_rows_are_given_to_waiting_prompts(models):
    _, ours, ids, mask, wanted = models
    eos = wanted[0][4]
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in wanted]
    prompts = [[t for t, m in zip(row, kept) if m] for row, kept in zip(ids.tolist(), mask.tolist())]
    generator = Generator(ours, batch_size=2, eos=[eos])
    done = generator.complete([Request(p, NEW) for p in prompts * 3])
    assert [c.tokens for c in done] == cut * 3
    assert [c.reason for c in done[:4]] == ["eos" if eos in row else "length" for row in wanted]


def test_what_cannot_be_done_is_said_and_the_others_are_done(models):
    _, ours, *_ = models
    good = Request([1, 2, 3], 5)
    bad = {
        "no tokens": Request([], 5),
        "token 61 at place 1": Request([1, 61], 5),
        "token -1 at place 0": Request([-1], 5),
        "256 positions": Request([1] * 256, 5),
        "at least 1, got 0": Request([1], 0),
        "integer of at least 1, got 2.5": Request([1], 2.5),
        "got float at place 1": Request([1, 2.0], 5),
        "got Tensor at place 0": Request(torch.tensor([1, 2]), 5),
        "got list at place 0": Request([[1, 2]], 5),
        "strings that are not empty": Request([1], 5, stop=("a", "")),
        "in a list, got 'ab'": Request([1], 5, stop="ab"),
        "need a tokenizer": Request([1], 5, stop=("a",)),
    }
    generator = Generator(ours, batch_size=2)
    alone = generator.complete([good])[0].tokens
    done = generator.complete([good, *bad.values(), good])
    assert done[0].tokens == done[-1].tokens == alone
    assert [c.index for c in done] == list(range(len(bad) + 2))
    for completion, says in zip(done[1:-1], bad):
        assert completion.reason == "error" and says in completion.error
    with pytest.raises(RequestError, match="no tokens"):
        generate(ours, [[1], []])
    for ids, mask, says in (
        (torch.tensor([1, 2]), None, r"must be \[B, T\].*got \[2\]"),
        ([1, 2], None, "a list of prompts"),
        ([[1, 2]], [[1]], "the shape of the input_ids"),
    ):
        with pytest.raises(RequestError, match=says):
            generate(ours, ids, mask)
    assert generate(ours, [[9, 1, 2, 3]], [[0, 1, 1, 1]], max_new_tokens=5) == [alone]
    long = generator.complete([Request([1] * 250, 20)])[0]
    assert (len(long.tokens), long.reason) == (6, "positions")


@pytest.mark.parametrize("repack", [True, False])
def test_logits_that_are_not_finite_end_their_row_and_no_other(repack):
    _, ours = pair()
    # the broken one is the longest: what it leaves lies behind the end of the texts that take its row after it
    prompts = [[1, 2, 3], [*range(5, 29), 60, 7], [8, 9]]
    alone = generate(ours, prompts, max_new_tokens=10)
    assert all(60 not in row for row in alone)
    with torch.no_grad():
        ours.model.embed_tokens.weight[60] = float("nan")
    generator = Generator(ours, batch_size=2, repack=repack)
    done = generator.complete([Request(p, 10) for p in [*prompts, prompts[0], prompts[2]]])
    assert [c.tokens for c in done] == [alone[0], [], alone[2], alone[0], alone[2]]
    assert done[1].reason == "error" and "not finite" in done[1].error
    # what stayed there would send every step of the texts after it the slow way
    rings = [t for layer in generator._engine.cache.layers for t in layer.tensors.values()]
    assert all(bool(t.isfinite().all()) for t in rings)
    with pytest.raises(FloatingPointError, match="prompt 1: the model's logits are not finite"):
        generate(ours, prompts, max_new_tokens=2)


def test_what_the_loop_cannot_run_it_refuses():
    peer, ours = pair()
    with pytest.raises(TypeError, match=r"brise\.model\.mistral"):
        Generator(peer)
    dynamic = MistralForCausalLM(
        config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    )
    with pytest.raises(ValueError, match="angles that change"):
        Generator(dynamic)
    with pytest.raises(ValueError, match="same vocabulary"):
        Generator(ours, proposer=DraftModel(pair(vocab_size=50)[1]))


def test_one_stream_at_a_time(models):
    _, ours, *_ = models
    generator = Generator(ours, batch_size=2)
    wanted = [c.tokens for c in generator.complete([Request([3, 4], 6), Request([5], 6)])]
    first = generator.stream([Request([3, 4], 6)])
    next(first)
    with pytest.raises(RuntimeError, match="another stream"):
        generator.complete([Request([5], 6)])
    assert [c.tokens for e in first if (c := e.completion)] == wanted[:1]
    left = generator.stream([Request([3, 4], 6)])
    next(left)
    left.close()  # its row is free again, and the next text begins in it as in a new one
    assert [c.tokens for c in generator.complete([Request([5], 6), Request([3, 4], 6)])] == wanted[::-1]


def quantized(model):
    quantize_model(model, PRESETS["int8"])


def stepped(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)


@pytest.mark.parametrize(
    "change",
    [
        quantized,
        stepped,
        lambda m: m.to(torch.bfloat16),
        lambda m: m.load_state_dict({n: t * 2 for n, t in m.state_dict().items()}),
        lambda m: setattr(m.model.norm.weight, "data", torch.ones(64)),
        lambda m: setattr(
            m.model.layers[0].mlp, "up_proj", torch.nn.Sequential(m.model.layers[0].mlp.up_proj)
        ),
    ],
    ids=["quantized", "stepped", "another dtype", "loaded", "data", "wrapped"],
)
def test_a_model_that_was_changed_needs_a_new_generator(change):
    _, ours = pair()
    generator = Generator(ours)
    generator.complete([Request([1, 2], 3)])
    # another generator arranges the weights anew and changes none
    Generator(ours, batch_size=2, proposer=DraftModel(ours)).complete([Request([1, 2], 3)])
    ours.generate(torch.tensor([[1, 2]]), max_new_tokens=2)
    generator.complete([Request([1, 2], 3)])
    change(ours)
    with pytest.raises(RuntimeError, match="make a new one"):
        generator.complete([Request([1, 2], 3)])
    ours.float()
    wanted = ours.generate(torch.tensor([[1, 2]]), max_new_tokens=8, do_sample=False)[:, 2:].tolist()
    assert [c.tokens for c in Generator(ours).complete([Request([1, 2], 8)])] == wanted


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 7, "layer_types": ["full_attention"] * 2},
        {"sliding_window": 7, "layer_types": ["sliding_attention"] * 2},
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
        {"head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"rms_norm_eps": 0.5},
        {"tie_word_embeddings": True, "hidden_act": "gelu", "num_key_value_heads": 1},
    ],
    ids=str,
)
def test_kinds_of_mistral(changes):
    peer, ours = pair(**changes)
    ids = torch.randint(1, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    wanted = peer.generate(ids, max_new_tokens=NEW, do_sample=False)[:, 20:].tolist()
    assert generate(ours, ids, max_new_tokens=NEW) == wanted


@pytest.mark.parametrize("eos", [None, 0, [0, 3]], ids=str)
def test_what_ends_a_text_is_what_ends_it_for_transformers(models, eos):
    peer, ours, _, _, wanted = models
    ours, peer = copy.copy(ours), copy.copy(peer)
    first = wanted[1]
    named = None if eos is None else first[3] if eos == 0 else [first[6], first[4]]
    for model in (ours, peer):
        model.config = copy.deepcopy(model.config)
        model.config.eos_token_id = first[2]  # what the generation config is made from, and no more
        model.generation_config = copy.deepcopy(model.generation_config)
        model.generation_config.eos_token_id = named
    ids = torch.tensor([[models[2][1, -1].item()]])
    theirs = peer.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[:, 1:].tolist()
    assert generate(ours, ids, max_new_tokens=NEW) == theirs
    assert (len(theirs[0]) == NEW) == (eos is None)
