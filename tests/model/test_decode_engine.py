"""The engine by itself, in blocks of steps that no host looks into: where a row ends it rests."""

import pytest
import torch
from transformers import MistralConfig

from brise.model.decode_engine import Beginning, DecodeEngine
from brise.model.decode_step import DecodeModel
from brise.model.mistral import MistralForCausalLM
from brise.model.sampling import BROKEN, RESTING, Sampling

STEPS = 20
PROMPTS = [[1, 2, 3], [*range(5, 17)], [9, 8], [30]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=None, max_position_embeddings=128, initializer_range=0.3,
        eos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def texts_of(model):
    """As transformers' generate goes on, a token more than the steps."""
    options = {"max_new_tokens": STEPS + 1, "do_sample": False}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS]


def new_in(texts, row, least):
    """A place of a text from ``least`` on whose token is nowhere before, nor in another text or a prompt."""
    others = {token for other, text in enumerate(texts) if other != row for token in text}
    others |= {token for prompt in PROMPTS for token in prompt}
    text = texts[row]
    return next(i for i in range(least, STEPS) if text[i] not in others and text[i] not in text[:i])


@pytest.mark.parametrize("way", ["whole", "lean", "ops"])
def test_rows_that_end_within_a_block_rest_for_the_rest_of_it(model, way):
    texts = texts_of(model)
    # the first ends with a token, the second has room for 7, the third comes to one that is broken, the last goes on
    end, broken = new_in(texts, 0, 4), new_in(texts, 2, 3)
    with torch.no_grad():
        model.model.embed_tokens.weight[texts[2][broken]] = float("nan")
    never = next(token for token in range(61) if all(token not in text for text in texts))
    engine = DecodeEngine(DecodeModel(model, rows=4), rows=4, length=64, ends=[never, texts[0][end]])
    engine.whole, engine.lean = engine.whole and way == "whole", way == "lean"
    budgets = [50, 7, 50, 50]
    begun = [Beginning(row, p, Sampling(), n) for row, (p, n) in enumerate(zip(PROMPTS, budgets))]
    first = engine.start(begun)
    found = [[token, *rest] for token, rest in zip(first, engine.run(4, STEPS))]
    wanted = [texts[0][: end + 1], texts[1][:7], [*texts[2][: broken + 1], BROKEN], texts[3]]
    assert found == [row + [RESTING] * (STEPS + 1 - len(row)) for row in wanted]
    # each token but the last of a text has been read; of the one that broke all
    assert engine.cache.seen.tolist() == [len(p) + len(row) - 1 for p, row in zip(PROMPTS, wanted)]
    assert engine.states.active.tolist() == [0, 0, 0, 1]


def test_nothing_comes_behind_the_end_though_the_drafts_were_right(model):
    texts = texts_of(model)
    end = new_in(texts, 1, 2)
    drafts = end + 3
    engine = DecodeEngine(
        DecodeModel(model, rows=2 + 2 * drafts), rows=2, length=64, drafts=drafts, ends=[texts[1][end]]
    )
    plain, budget = Sampling(), 5
    engine.start([Beginning(0, PROMPTS[3], plain, budget), Beginning(1, PROMPTS[1], plain, 50)])
    found = engine.verify([texts[3][1 : 1 + drafts], texts[1][1 : 1 + drafts]])
    assert found == [texts[3][1:budget], texts[1][1 : end + 1]]
    assert engine.cache.seen.tolist() == [1 + budget - 1, len(PROMPTS[1]) + end]
    assert engine.run(2, 2) == [[RESTING] * 2] * 2 and engine.cache.seen.tolist() == [
        5,
        len(PROMPTS[1]) + end,
    ]
    engine.release(1)
    assert engine.cache.seen.tolist() == [5, 0], "a free row has nothing to attend to"


@pytest.mark.parametrize("chunk", [64, 7])
def test_prompts_about_as_long_as_the_window_are_read_as_transformers_reads_them(model, chunk):
    model.config.sliding_window = 6
    engine = DecodeEngine(DecodeModel(model, rows=5), rows=5, length=64, chunk=chunk)
    prompts = [torch.arange(1, n + 1) * 7 % 61 for n in (5, 6, 7, 8, 13)]
    with torch.inference_mode():
        # alone, as one of several in a chunk may be cut in two
        last = [hidden for row, p in enumerate(prompts) for hidden in engine._read([row], [p])]
        found = engine.model.logits(torch.stack(last), chunk=True)
        wanted = torch.cat([model(p[None]).logits[:, -1] for p in prompts])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["whole", "lean", "ops"])
@pytest.mark.parametrize("window", [None, 6])
def test_what_runs_while_a_graph_is_captured_leaves_no_trace(model, window, way):
    """Some rows rest, some have settings of their own; then steps and drafts that must not have happened."""
    model.config.sliding_window = window
    engine = DecodeEngine(DecodeModel(model, rows=12), rows=3, length=64, drafts=3)
    engine.whole, engine.lean = engine.whole and way == "whole", way == "lean"
    sampling = Sampling(0.7, repetition_penalty=1.3, seed=3)
    begun = [
        Beginning(row, p, s, 20) for row, (p, s) in enumerate(zip(PROMPTS, (Sampling(), sampling, sampling)))
    ]
    engine.start(begun)
    engine.run(3, 4)
    engine.release(1)
    sampler = vars(engine.states.sampler) | {"vocab": torch.empty(0)}
    rings = [t for layer in engine.cache.layers for t in layer.tensors.values()]
    states = [engine.states.token, engine.states.active, engine.states.left, engine.cursor]
    held = [*states, *sampler.values(), *rings, engine.cache.seen, engine.cache.start]
    before = [t.clone() for t in held]

    def steps():
        for _ in range(3):
            engine._step(engine.cache, engine.states, False)
            engine._verify(engine.cache, engine.states, False, 3)

    with torch.inference_mode():
        engine._quietly(engine.states, steps)
    for now, then in zip(held, before, strict=True):
        assert torch.equal(now, then)
