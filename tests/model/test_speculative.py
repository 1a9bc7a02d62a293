"""Drafts that are wrong in every way: none leaves a trace in the text, and the counts are those of a count by hand."""

import pytest
import torch
from transformers import MistralConfig

from brise.model.generate import Generator, Request
from brise.model.mistral import MistralForCausalLM
from brise.model.speculative import DraftModel

NEW = 24
PROMPTS = [[1, 2, 3], [*range(5, 17)], [9]]


def model_of(**changes):
    torch.manual_seed(0)
    values = {
        "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "sliding_window": None, "max_position_embeddings": 128, "initializer_range": 0.3,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    return MistralForCausalLM(MistralConfig(**(values | changes))).eval()


class Scripted:
    """Drafts of the true text, of which number ``right`` is the first that is replaced, by ``wrong``.

    One script for all rows: how many drafts the next step gets, and how many of them are right.
    """

    def __init__(self, texts, wrong=None, steps=((3, 2),)):
        self.texts, self.wrong, self.steps = texts, wrong, steps
        self.drafts = max(count for count, _ in steps)
        self.done = self.made = self.right = 0

    def prepare(self, rows, length): ...

    def start(self, row, prompt): ...

    def move(self, source, target): ...

    def propose(self, texts):
        count, right = self.steps[self.done % len(self.steps)]
        self.done += 1
        drafts = []
        for text in texts:
            prompt, whole = next((p, t) for p, t in zip(PROMPTS, self.texts) if text[: len(p)] == p)
            at = len(text) - len(prompt)
            draft = whole[at : at + count]
            for i in range(right, len(draft)):
                draft[i] = (draft[i] + 1) % 61 if self.wrong is None else self.wrong
            drafts.append(draft)
            # one token is the model's own, and what lies behind the end is cut off before it is checked
            self.made += len(draft[: NEW - at - 1])
            self.right += min(right, len(draft[: NEW - at - 1]))
        return drafts

    def settle(self, accepted): ...


def texts_of(model, **options):
    done = Generator(model, batch_size=3, **options).complete([Request(p, NEW) for p in PROMPTS])
    return [c.tokens for c in done]


def with_drafts(model, proposer, way="whole", rows=3, **options):
    generator = Generator(model, batch_size=rows, proposer=proposer, **options)
    engine = generator._engine_for(64)
    engine.whole, engine.lean = engine.whole and way == "whole", way == "lean"
    done = generator.complete([Request(p, NEW) for p in PROMPTS])
    return [c.tokens for c in done], generator.counts


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 6])
def test_every_number_of_right_drafts_in_turn(window, rows):
    model = model_of(sliding_window=window)
    texts = texts_of(model)
    # none, some and all of a step's drafts right; more of them, and fewer
    proposer = Scripted(texts, steps=((3, 0), (4, 4), (1, 0), (4, 1), (2, 2), (3, 2), (1, 1)))
    found, counts = with_drafts(model, proposer, rows=rows)
    assert found == texts
    assert (counts.proposed, counts.accepted) == (proposer.made, proposer.right)
    assert counts.tokens == NEW * len(PROMPTS)
    assert 0 < counts.accepted < counts.proposed
    assert counts.acceptance == counts.accepted / counts.proposed


@pytest.mark.parametrize("way", ["whole", "lean", "ops", "int8", "invariant"])
def test_a_draft_that_breaks_is_rejected_and_leaves_nothing(way):
    """What is not finite lies behind the text, in the step that rejects it and in the ring after that."""
    model = model_of(sliding_window=20 if way == "ops" else None)
    options = {"int8_cache": way == "int8", "batch_invariant": way == "invariant"}
    texts = texts_of(model, **options)
    broken = next(token for token in range(61) if all(token not in text for text in (*PROMPTS, *texts)))
    with torch.no_grad():
        model.model.embed_tokens.weight[broken] = float("nan")
    # a step without drafts, whose queries meet what the others left
    proposer = Scripted(texts, broken, steps=((3, 1), (0, 0), (2, 0)))
    found, counts = with_drafts(model, proposer, way, **options)
    assert found == texts and counts.accepted == proposer.right > 0


def test_what_fills_a_shorter_draft_up_counts_as_none():
    """A model that writes nothing but token 0, which is what shorter drafts are filled up with."""
    model = model_of()
    torch.nn.init.zeros_(model.lm_head.weight)
    proposer = Scripted([], steps=((4, 4),))
    proposer.propose = lambda texts: [[0] * n for n in (4, 1, 2)[: len(texts)]]
    found, counts = with_drafts(model, proposer)
    assert found == [[0] * NEW] * 3
    assert counts.acceptance == 1 and counts.accepted < 3 * NEW - counts.steps


def test_a_draft_model_goes_on_from_what_was_right():
    """The model itself as its draft model, wrong on purpose every other time: its next drafts are right again."""
    model = model_of()
    texts = texts_of(model)
    proposer = DraftModel(model, 3)
    propose, asked = proposer.propose, []

    def disturbed(given):
        drafts = propose(given)
        asked.append(len(drafts))
        if len(asked) % 2:
            return drafts
        return [[*draft[:1], *((token + 1) % 61 for token in draft[1:])] for draft in drafts]

    proposer.propose = disturbed
    found, counts = with_drafts(model, proposer)
    assert found == texts
    # of 4 tokens, and of 2, in turn
    assert counts.steps <= 2 + 2 * (NEW - 1) / 6
