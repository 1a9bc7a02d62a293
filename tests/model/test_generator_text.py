"""What the generator makes of texts: how they come, where they stop, whose turn is next, rings long enough for all."""

import pytest
import torch
from transformers import MistralConfig

from brise.model.generate import Generator, Request, generate
from brise.model.mistral import MistralForCausalLM
from brise.model.sampling import Sampling


class Letters:
    """A tokenizer of one letter a token; token 0 is special."""

    def decode(self, tokens, skip_special_tokens=False, clean_up_tokenization_spaces=True):
        assert not clean_up_tokenization_spaces
        return "".join(chr(96 + t) if t else "" if skip_special_tokens else "<s>" for t in tokens)


def model_of(**changes):
    torch.manual_seed(0)
    values = {
        "vocab_size": 27, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "sliding_window": None, "max_position_embeddings": 1024, "initializer_range": 0.3,
        "eos_token_id": None, "bos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    return MistralForCausalLM(MistralConfig(**(values | changes))).eval()


def test_a_text_ends_with_its_stop_string_and_nothing_comes_after_it():
    model = model_of()
    generator = Generator(model, Letters(), batch_size=2)
    prompts = [[1, 2, 3], [4, 5]]
    wholes = generator.complete([Request(p, 30) for p in prompts])
    # three tokens that end in the middle of the first text; the other text has a stop string that never comes
    stop = wholes[0].text[8:11]
    end = wholes[0].text.index(stop) + 3
    events = list(
        generator.stream([Request(prompts[0], 30, stop=(stop,)), Request(prompts[1], 30, stop=("aaaaaa",))])
    )
    first, other = sorted((e.completion for e in events if e.completion), key=lambda c: c.index)
    assert (first.reason, first.text) == ("stop", wholes[0].text[: end - 3])
    letters = [i for i, token in enumerate(wholes[0].tokens) if token]
    assert first.tokens == wholes[0].tokens[: letters[end - 1] + 1]
    assert (other.reason, other.text, other.tokens) == ("length", wholes[1].text, wholes[1].tokens)
    assert "".join(e.text for e in events if e.index == 0) == first.text


class Unfinished(Letters):
    """What there is ends in half a character, always."""

    def decode(self, tokens, **options):
        return super().decode(tokens, **options) + ("\N{REPLACEMENT CHARACTER}" if tokens else "")


def test_a_stop_string_before_half_a_character_is_seen_at_the_end():
    model = model_of()
    (whole,) = Generator(model, Letters()).complete([Request([1, 2, 3], 9)])
    stop = whole.text[5]
    (done,) = Generator(model, Unfinished()).complete([Request([1, 2, 3], 9, stop=(stop,))])
    assert (done.reason, done.text) == ("stop", whole.text[: whole.text.index(stop)])


def test_special_tokens_are_no_text():
    model = model_of()
    torch.nn.init.zeros_(model.lm_head.weight)  # nothing but token 0
    (done,) = Generator(model, Letters()).complete([Request([1, 2], 5)])
    assert done.tokens == [0] * 5 and done.text == ""


def test_the_ring_is_as_long_as_the_longest_text_whichever_comes_first():
    model = model_of()
    requests = [Request([1, 2], 5), Request([3], 300), Request([4], 2)]
    wanted = [Generator(model).complete([r])[0].tokens for r in requests]
    for order in ([0, 1, 2], [1, 0, 2], [2, 0, 1]):
        done = Generator(model, batch_size=2).complete([requests[i] for i in order])
        assert [c.tokens for c in done] == [wanted[i] for i in order]
    short = Generator(model_of(max_position_embeddings=40))
    (done,) = short.complete([Request([1], 100)])
    assert (done.reason, len(done.tokens)) == ("positions", 39)
    assert short._engine.cache.slots == 40, "no longer than the model's positions"


def test_a_text_comes_as_it_is_written():
    model = model_of()
    prompts = [[1, 2, 3], [4, 5]]
    events = list(Generator(model, Letters(), batch_size=2).stream([Request(p, 9) for p in prompts]))
    assert [len(event.tokens) for event in events] == [1] * 18
    for event in events:
        assert event.text == Letters().decode(event.tokens, True, False)


def test_a_text_may_end_with_its_first_token():
    model = model_of()
    prompts = [[1, 2, 3], [4, 5], [6]]
    options = {"max_new_tokens": 8, "do_sample": False}
    first = int(model.generate(torch.tensor(prompts[:1]), **options)[0, 3])
    theirs = [
        model.generate(torch.tensor([p]), eos_token_id=first, **options)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert theirs[0] == [first] and len(theirs[1]) > 1
    generator = Generator(model, batch_size=2, eos=[first])
    done = generator.complete([Request(prompts[i], 8) for i in (0, 1, 0, 2, 0)])
    assert [c.tokens for c in done] == [theirs[i] for i in (0, 1, 0, 2, 0)]
    assert [done[i].reason for i in (0, 2, 4)] == ["eos"] * 3


@pytest.mark.parametrize("block", [1, 32])
def test_what_waits_takes_a_row_as_soon_as_one_is_free(block):
    generator = Generator(model_of(), batch_size=2)
    generator.block = block
    # two steps each, within the 29 of the long one
    done = generator.complete([Request([1], 3) for _ in range(6)] + [Request([2], 30)] * 1)
    assert generator.counts.steps == 3 * 2 + 29
    generator.counts.steps = 0
    long_first = generator.complete([Request([2], 30), *(Request([1], 3) for _ in range(14))])
    assert generator.counts.steps == 29 and long_first[0].tokens == done[-1].tokens


@pytest.mark.parametrize("block", [3, 8, 32])
def test_blocks_of_steps_as_on_a_gpu_make_the_same_texts(block):
    """Ends by a token, a stop string, a budget and a broken row, all of them within a block."""
    model = model_of(max_position_embeddings=64)
    made = Generator(model, Letters(), batch_size=3)
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
    wholes = made.complete([Request(p, 40) for p in prompts])
    stop = wholes[0].text[5:8]
    stopped = {*range(1, 11), *wholes[0].tokens[:12]}
    ends = [next(t for t in wholes[1].tokens[4:] if t not in stopped)]
    broken = next(t for t in wholes[2].tokens[4:] if t not in {*stopped, *ends})
    with torch.no_grad():
        model.model.embed_tokens.weight[broken] = float("nan")
    requests = [
        Request(prompts[0], 40, stop=(stop,)), Request(prompts[1], 40), Request(prompts[2], 40), Request([11], 7),
        Request(prompts[3], 100), Request([12, 13], 1), Request([14], 30, Sampling(1.0, seed=5), ("q",)),
    ]  # fmt: skip
    one, many = (Generator(model, Letters(), batch_size=3, eos=ends) for _ in "ab")
    many.block = block
    wanted = one.complete(requests)
    assert many.complete(requests) == wanted
    assert {done.reason for done in wanted} >= {"stop", "eos", "error", "length"}
    assert many.counts.tokens == one.counts.tokens


def test_each_prompt_of_a_batch_has_a_seed_of_its_own():
    model = model_of()
    given = [Sampling(temperature=1.5, seed=3 + b) for b in range(3)]
    alone = [generate(model, [[5, 6]], max_new_tokens=20, sampling=s)[0] for s in given]
    assert generate(model, [[5, 6]] * 3, max_new_tokens=20, sampling=given[0]) == alone
    assert len(set(map(tuple, alone))) == 3
