"""Text as it comes: whole characters, and nothing of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from brise.model.text_stream import TextStream


def decode(tokens):
    return bytes(tokens).decode(errors="replace")


def pieces_of(text, stop=(), size=1):
    stream = TextStream(decode, stop)
    data = text.encode()
    pieces = [stream.push(list(data[i : i + size])) for i in range(0, len(data), size)]
    pieces.append(stream.end())
    assert "".join(pieces) == stream.text
    return pieces, stream


def test_never_half_a_character():
    pieces, stream = pieces_of("a€b🌬c")
    assert stream.text == "a€b🌬c" and [p for p in pieces if p] == ["a", "€", "b", "🌬", "c"]


@given(st.text(max_size=30), st.integers(1, 7))
def test_the_pieces_are_the_text(text, size):
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert pieces_of(text, size=size)[1].text == text


@given(
    st.text("ab", max_size=25), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5)
)
def test_a_text_ends_before_the_first_stop_string(text, stop, size):
    """The first that is whole as the tokens come; of several at once the one that begins first."""
    ends = [end for end in range(1, len(text) + 1) if any(s in text[:end] for s in stop)]
    found = [text[: ends[0]].find(s) for s in stop if s in text[: ends[0]]] if ends else []
    stream = pieces_of(text, stop, size)[1]
    assert stream.text == (text[: min(found)] if found else text)
    assert (stream.stopped is None) == (not found)


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(decode, ["END"])
    assert [stream.push([c]) for c in b"xENENDy"] == ["x", "", "", "EN", "", "", ""]
    assert stream.stopped == "END" and stream.text == "xEN"


def test_half_a_character_at_the_end_is_shown_as_what_it_is():
    stream = TextStream(decode)
    assert [stream.push([c]) for c in "a€".encode()[:3]] == ["a", "", ""]
    assert stream.end() == "\N{REPLACEMENT CHARACTER}" and stream.text == decode(list("a€".encode()[:3]))


def test_a_token_may_be_decoded_in_another_way_at_the_beginning():
    """As sentencepiece does, which drops a space there."""
    words = {0: " the", 1: " wind", 2: "s"}
    stream = TextStream(lambda tokens: "".join(words[t] for t in tokens).removeprefix(" "))
    assert [stream.push([t]) for t in (0, 1, 2, 0)] == ["the", " wind", "s", " the"]


@pytest.fixture(scope="module")
def by_bytes():
    """Mistral's kind of tokenizer: sentencepiece's marks for spaces, and bytes for what is not in the vocabulary."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁the", "a", "▁wind"]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("text", ["🌬🌬🌬🌬🌬", "a€🌬日本語 a🌬é", "日本語日本語日本語"])
def test_characters_made_of_byte_tokens_come_whole_one_by_one(by_bytes, text):
    tokens = [by_bytes.token_to_id(f"<0x{b:02X}>") for b in text.encode()]
    stream = TextStream(by_bytes.decode)
    pieces = [stream.push([token]) for token in tokens]
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.end() == "" and stream.text == by_bytes.decode(tokens) == text


def test_tokens_without_text_are_no_context(by_bytes):
    the, begin, wind = map(by_bytes.token_to_id, ("▁the", "<s>", "▁wind"))
    stream = TextStream(by_bytes.decode)
    assert [stream.push([t]) for t in (the, begin, begin, wind)] == ["the", "", "", " wind"]


def test_bytes_that_are_no_character_hold_nothing_up(by_bytes):
    byte = {b: by_bytes.token_to_id(f"<0x{b:02X}>") for b in range(256)}
    a, decoded = by_bytes.token_to_id("a"), []
    stream = TextStream(lambda tokens: (decoded.append(len(tokens)), by_bytes.decode(tokens))[1], ["STOP"])
    tokens = [*(byte[b] for b in "€".encode()), byte[0x82], a, a, *[byte[0x82]] * 200, a]
    pieces = [stream.push([token]) for token in tokens]
    assert pieces[:6] == ["", "", "€", "", "\N{REPLACEMENT CHARACTER}a", "a"] and pieces[-1].endswith("a")
    assert stream.text == "€\N{REPLACEMENT CHARACTER}aa" + "\N{REPLACEMENT CHARACTER}" * 200 + "a"
    assert max(decoded) < 40


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="not be empty"):
        TextStream(decode, [""])
