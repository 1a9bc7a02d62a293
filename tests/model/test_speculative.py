"""Drafts that are wrong in every way: none leaves a trace in the text, and the counts are those of a count by hand."""

import copy

import pytest
import torch
from transformers import MistralConfig

from brise.model import decode_engine
from brise.model.generate import Generator, Request
from brise.model.mistral import MistralForCausalLM
from brise.model.speculative import DraftModel, PromptLookup
from brise.quant.apply import quantize_model
from brise.quant.presets import PRESETS

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

    def __init__(self, texts, wrong=None, steps=((3, 2),), prompts=PROMPTS):
        self.texts, self.wrong, self.steps, self.prompts = texts, wrong, steps, prompts
        self.drafts = max(count for count, _ in steps)
        self.done = self.made = self.right = 0
        self.rows = {}

    def prepare(self, rows, length):
        self.rows.clear()

    def start(self, row, prompt):
        self.rows[row] = list(prompt)

    def move(self, source, target):
        self.rows[target] = self.rows.pop(source)

    def propose(self, texts):
        count, right = self.steps[self.done % len(self.steps)]
        self.done += 1
        drafts = []
        for row, text in enumerate(texts):
            prompt = self.rows[row]
            assert text[: len(prompt)] == prompt, "the rows are those of the engine"
            whole = self.texts[self.prompts.index(prompt)]
            at = len(text) - len(prompt)
            draft = whole[at : at + count]
            for i in range(right, len(draft)):
                draft[i] = (draft[i] + 1) % 61 if self.wrong is None else self.wrong
            drafts.append(draft)
            # one token is the model's own, and what lies behind the end is cut off before it is checked
            checked = len(draft[: len(whole) - at - 1])
            self.made += checked
            self.right += min(right, checked)
        return drafts

    def settle(self, accepted): ...


def texts_of(model, lengths=(NEW,) * 3, **options):
    requests = [Request(p, n) for p, n in zip(PROMPTS, lengths)]
    return [c.tokens for c in Generator(model, batch_size=3, **options).complete(requests)]


def with_drafts(model, proposer, way="whole", rows=3, lengths=(NEW,) * 3, **options):
    generator = Generator(model, batch_size=rows, proposer=proposer, **options)
    engine = generator._engine_for(64)
    engine.whole, engine.lean = engine.whole and way == "whole", way == "lean"
    done = generator.complete([Request(p, n) for p, n in zip(PROMPTS, lengths)])
    return [c.tokens for c in done], generator.counts


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 6])
def test_every_number_of_right_drafts_in_turn(window, rows):
    model = model_of(sliding_window=window)
    # the first to end is in the first row, which another one then takes over
    lengths = (7, NEW, 15)
    texts = texts_of(model, lengths)
    # none, some and all of a step's drafts right; more of them, and fewer
    proposer = Scripted(texts, steps=((3, 0), (4, 4), (1, 0), (4, 1), (2, 2), (3, 2), (1, 1)))
    found, counts = with_drafts(model, proposer, rows=rows, lengths=lengths)
    assert found == texts
    assert (counts.proposed, counts.accepted) == (proposer.made, proposer.right)
    assert counts.tokens == sum(lengths)
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


def test_drafts_of_others_behind_the_last_position_overwrite_nothing(monkeypatch):
    """A text that ends with the ring's last position, beside one that gets longer drafts than it can use."""
    model = model_of()
    prompts = [torch.randint(1, 61, (120,), generator=torch.Generator().manual_seed(1)).tolist(), [1, 2, 3]]
    requests = [Request(prompt, n) for prompt, n in zip(prompts, (8, 60))]
    texts = [c.tokens for c in Generator(model, batch_size=2).complete(requests)]
    choose, kept = decode_engine.choose, []
    monkeypatch.setattr(
        decode_engine, "choose", lambda logits, *rest: (kept.append(logits.clone()), choose(logits, *rest))[1]
    )
    proposer = Scripted(texts, steps=((4, 0),), prompts=prompts)
    found = Generator(model, batch_size=2, proposer=proposer).complete(requests)
    assert [c.tokens for c in found] == texts
    with torch.inference_mode():
        wanted = model(torch.tensor([[*prompts[0], *texts[0]]])).logits[0, 119:127]
    seen = torch.cat(kept)
    nearest = (seen[None] - wanted[:, None]).abs().amax(-1).amin(1)
    assert float(nearest.max()) < 1e-3


def test_what_fills_a_shorter_draft_up_counts_as_none():
    """A model that writes nothing but token 0, which is what shorter drafts are filled up with."""
    model = model_of()
    torch.nn.init.zeros_(model.lm_head.weight)
    proposer = Scripted([], steps=((4, 4),))
    proposer.propose = lambda texts: [[0] * n for n in (4, 1, 2)[: len(texts)]]
    found, counts = with_drafts(model, proposer)
    assert found == [[0] * NEW] * 3
    assert counts.acceptance == 1 and counts.accepted < 3 * NEW - counts.steps


def test_what_is_looked_up_is_the_newest_like_it_in_the_rows_own_text():
    """Beside a search through the whole text."""
    generator = torch.Generator().manual_seed(0)
    lookup = PromptLookup(3, longest=2)
    lookup.prepare(3, 64)

    def searched(text):
        for n in (2, 1):
            ends = [end for end in range(n, len(text)) if text[end - n : end] == text[-n:]]
            if ends:
                return text[ends[-1] : ends[-1] + 3]
        return []

    def some(count):
        return torch.randint(0, 4, (count,), generator=generator).tolist()

    texts = [some(n) for n in (1, 5, 9)]
    for row, text in enumerate(texts):
        lookup.start(row, text)
    found = 0
    for step in range(12):
        if step == 4:  # another text in the same row
            texts[1] = some(2)
            lookup.start(1, texts[1])
        if step == 8:  # and one that takes the place of a text before it
            texts = [texts[2], texts[1]]
            lookup.move(2, 0)
        wanted = [searched(text) for text in texts]
        assert lookup.propose(texts) == wanted
        found += sum(map(bool, wanted))
        texts = [text + some(1 + step % 3) for text in texts]
    assert found > 15


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


def test_the_model_itself_in_two_bits_is_a_draft_model():
    model = model_of()
    texts = texts_of(model)
    small = copy.deepcopy(model)
    quantize_model(small, PRESETS["int2-g32"])
    found, counts = with_drafts(model, DraftModel(small, 3))
    assert found == texts and counts.proposed > 0
    # whatever it is worth here, it is another model and no better
    assert counts.acceptance < 1


def test_a_draft_model_that_is_broken_harms_no_text():
    model = model_of()
    texts = texts_of(model)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[texts[1][4]] = float("nan")
    found, counts = with_drafts(model, DraftModel(broken, 3), rows=2)
    assert found == texts and 0 < counts.accepted < sum(map(len, texts))


def test_a_draft_model_has_room_for_texts_longer_than_those_before():
    model = model_of(max_position_embeddings=512)
    generator = Generator(model, batch_size=2, proposer=DraftModel(model, 3))
    for lengths in ((5, 9), (290, 3), (4, 4)):
        requests = [Request(prompt, n) for prompt, n in zip(PROMPTS, lengths)]
        wanted = [c.tokens for c in Generator(model, batch_size=2).complete(requests)]
        assert [c.tokens for c in generator.complete(requests)] == wanted
        assert generator.counts.acceptance == 1
