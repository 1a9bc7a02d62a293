"""What the generator makes of texts: where they stop, and rings that are long enough for the longest."""

import torch
from transformers import MistralConfig

from brise.model.generate import Generator, Request
from brise.model.mistral import MistralForCausalLM


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
