"""Named protocols, each against a slow twin that goes token by token, and lm-eval's own loop."""

import math

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from brise.eval.data import Text, TextError, load_text
from brise.eval.evaluate import evaluate
from brise.eval.protocols import PROTOCOLS, NamedProtocol, protocol_text, protocol_windows, raw_text
from brise.eval.scoring import score

LENGTH = 16


class Tokenizer:
    """Bytes, with BOS 1 before every text, as Mistral's does, or without."""

    def __init__(self, bos: bool) -> None:
        self.bos, self.eos_token_id = bos, 2
        self.bos_token_id = 1 if bos else None

    def __call__(self, text, add_special_tokens=True, **_):
        ids = [3 + b for b in text.encode()]
        return {"input_ids": [1, *ids] if self.bos and add_special_tokens else ids}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=None,
        initializer_range=0.3,
        max_position_embeddings=64,
        eos_token_id=2,
    )
    return MistralForCausalLM(config).eval()


TEXT = Text("passages", tuple(f"Passage {i}: light, lighter, the lightest wind." for i in range(5)))


def short(name: str) -> NamedProtocol:
    rule = PROTOCOLS[name]
    return NamedProtocol(name, LENGTH, rule.stride * LENGTH // rule.length, rule.scored, rule.raw)


def log_probs(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)


def gptq_2048(model, tokenizer, text):
    ids = tokenizer("\n\n".join(text.passages))["input_ids"]
    losses = []
    for i in range(len(ids) // LENGTH):
        window = ids[i * LENGTH : (i + 1) * LENGTH]
        found = log_probs(model, window)
        losses.append(-sum(float(found[t - 1, window[t]]) for t in range(1, LENGTH)) / (LENGTH - 1))
    return sum(losses) / len(losses), len(losses) * (LENGTH - 1)


def stride_512(model, tokenizer, text):
    ids = tokenizer("\n\n".join(text.passages))["input_ids"]
    total, scored, done = 0.0, set(), 0
    for begin in range(0, len(ids), LENGTH // 4):
        end = min(begin + LENGTH, len(ids))
        found = log_probs(model, ids[begin:end])
        for t in range(max(done, begin + 1), end):
            total -= float(found[t - begin - 1, ids[t]])
            assert t not in scored
            scored.add(t)
        done = end
        if end == len(ids):
            break
    assert scored == set(range(1, len(ids)))  # every token once, to the very end
    return total / len(scored), len(scored)


def llamacpp_512(model, tokenizer, text):
    ids = tokenizer("\n\n".join(text.passages))["input_ids"]
    total = count = 0
    for i in range(len(ids) // LENGTH):
        window = ids[i * LENGTH : (i + 1) * LENGTH]
        if tokenizer.bos:
            window = [1, *window[1:]]
        found = log_probs(model, window)
        for j in range(LENGTH // 2, LENGTH - 1):
            total -= float(found[j, window[j + 1]])
            count += 1
    return total / count, count


TWINS = {"gptq-2048": gptq_2048, "stride-512": stride_512, "llamacpp-512": llamacpp_512}


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", TWINS)
def test_a_protocol_gives_the_figure_of_its_twin(name, bos, model):
    tokenizer = Tokenizer(bos)
    windows = protocol_windows(short(name), TEXT, tokenizer)
    nll, tokens = TWINS[name](model, tokenizer, TEXT)
    got = score(model, windows, batch=3).perplexity
    assert got.tokens == tokens
    assert got.nll == pytest.approx(nll, rel=1e-5)
    assert windows.protocol == name
    first = protocol_windows(short(name), TEXT, tokenizer, 2)
    assert first.count == 2 and torch.equal(first.ids, windows.ids[:2])


@pytest.mark.parametrize("bos", [True, False])
def test_word_perplexity_is_lm_evals(bos, model):
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed")
    tokenizer = Tokenizer(bos)
    pages = ("One word, or two.", "A much longer page with\n more than one window of text in it.", "é", " ")
    windows = protocol_windows(short("lmeval-word"), Text("pages", pages), tokenizer)
    total = words = size = 0
    for page in pages[:3]:  # a page of blanks is no document
        ids = tokenizer(page, add_special_tokens=False)["input_ids"]
        rolling = utils.get_rolling_token_windows(ids, 1 if bos else 2, LENGTH, 1)
        for context, continuation in map(utils.make_disjoint_window, rolling):
            given = (context + continuation)[-(LENGTH + 1) :][:-1]
            found = log_probs(model, given)[-len(continuation) :]
            total -= sum(float(row[token]) for row, token in zip(found, continuation))
        words += len(page.split())
        size += len(page.encode())
    scores = score(model, windows, batch=2)
    got = scores.words
    assert (got.words, got.bytes, got.documents) == (words, size, 3)
    assert got.value == pytest.approx(math.exp(total / words), rel=1e-4)
    assert got.bits_per_byte == pytest.approx(total / size / math.log(2), rel=1e-5)
    assert got.byte_value == pytest.approx(math.exp(total / size), rel=1e-5)
    assert scores.perplexity.nll == pytest.approx(total / scores.perplexity.tokens, rel=1e-5)


def test_the_raw_file_is_what_llamacpp_reads(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n\n\ntwo\n")
    assert raw_text(load_text(str(path))) == "one\n\n\n\ntwo\n"
    # the hub's rows of wikitext: a line feed at the end of each, and nothing where the file has " \n"
    hub = Text("hub:Salesforce/wikitext:wikitext-2-raw-v1:test:text", ("", " = A = \n", "", "b \n"))
    assert raw_text(hub) == " \n = A = \n \nb \n"


def test_llamacpp_is_given_the_raw_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n\n\ntwo and three\n")  # its paragraphs, joined, would be shorter
    windows = protocol_windows(short("llamacpp-512"), load_text(str(path)), Tokenizer(False))
    assert windows.ids.flatten().tolist() == [3 + b for b in path.read_bytes()[:LENGTH]]


def test_a_text_of_whole_windows_leaves_no_rest():
    text = Text("t", ("a" * 2 * LENGTH,))
    for name in ("gptq-2048", "llamacpp-512"):
        assert protocol_windows(short(name), text, Tokenizer(False)).count == 2
    # with BOS the last token is one too many
    assert protocol_windows(short("gptq-2048"), text, Tokenizer(True)).count == 2
    assert (
        protocol_windows(short("gptq-2048"), Text("t", ("a" * (2 * LENGTH - 1),)), Tokenizer(True)).count == 2
    )


def test_words_are_counted_as_lm_eval_counts_them():
    theirs = pytest.importorskip(
        "lm_eval.tasks.wikitext.preprocess_wikitext", reason="lm-eval is not installed"
    )
    pages = (" \n = A = \n two  words\n ", "é\tb")  # blanks at the ends count there
    windows = protocol_windows(short("lmeval-word"), Text("pages", pages), Tokenizer(True))
    results = [theirs.process_results({"page": page}, (0.0,)) for page in pages]
    assert windows.words == tuple(found["word_perplexity"][1] for found in results)
    assert windows.bytes == tuple(found["byte_perplexity"][1] for found in results)


def test_windows_longer_than_the_models_positions_are_refused():
    rule = short("gptq-2048")
    assert protocol_windows(rule, TEXT, Tokenizer(True), 1, LENGTH).count == 1
    with pytest.raises(TextError, match=f"windows of {LENGTH} tokens, the model {LENGTH - 1} positions"):
        protocol_windows(rule, TEXT, Tokenizer(True), 1, LENGTH - 1)


def test_a_protocol_is_in_the_row_and_refuses_what_it_decides(tiny_checkpoint, tiny_text, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "gptq-2048", short("gptq-2048"))
    row = evaluate(tiny_checkpoint, text=str(tiny_text), protocol="gptq-2048", windows=3)
    free = evaluate(tiny_checkpoint, text=str(tiny_text), windows=3, length=LENGTH)
    assert (row.protocol.name, row.protocol.windows, free.protocol.name) == ("gptq-2048", 3, "free")
    # the very same tokens: the figures agree, and still the rows are not of one table
    assert row.perplexity == free.perplexity and row.key != free.key
    with pytest.raises(TextError, match="stride and a BOS of its own"):
        evaluate(tiny_checkpoint, text=str(tiny_text), protocol="gptq-2048", stride=4)
    with pytest.raises(TextError, match="expected a protocol of gptq-2048"):
        evaluate(tiny_checkpoint, text=str(tiny_text), protocol="gptq-4096")
    monkeypatch.setitem(PROTOCOLS, "gptq-2048", NamedProtocol("gptq-2048", 2048, 2048, "all"))
    with pytest.raises(TextError, match="windows of 2048 tokens, the model 128 positions"):
        evaluate(tiny_checkpoint, text=str(tiny_text), protocol="gptq-2048")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_without_a_hub_the_error_says_so(name):
    with pytest.raises(TextError, match=r"hub:.*wikitext.*could not be loaded"):
        protocol_text(PROTOCOLS[name], None)


def test_too_short_a_text_is_refused():
    for name in PROTOCOLS:
        with pytest.raises(TextError, match="expected 99 windows"):
            protocol_windows(short(name), TEXT, Tokenizer(True), 99)
    with pytest.raises(TextError, match="expected some windows"):
        protocol_windows(short("gptq-2048"), Text("t", ("a",)), Tokenizer(True))
