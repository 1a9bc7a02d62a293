"""Texts and windows: worked out by hand, and properties over all small cases."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brise.eval import data
from brise.eval.data import (
    SPLITS,
    Text,
    TextError,
    bos_of,
    calibration_ids,
    check_disjoint,
    cut_windows,
    load_text,
    make_windows,
    split_passages,
    tokenize,
)


class Words:
    """A tokenizer of words that are numbers; `adds_bos` as Mistral's does."""

    def __init__(self, bos_token_id=None, adds_bos=False):
        self.bos_token_id, self.adds_bos = bos_token_id, adds_bos

    def __call__(self, text, add_special_tokens=True, **kwargs):
        ids = [int(word) if word.isdigit() else 7 for word in text.split()]
        return {"input_ids": [self.bos_token_id] * (add_special_tokens and self.adds_bos) + ids}


def numbers(n: int) -> Text:
    return Text("numbers", (" ".join(map(str, range(n))),))


def test_windows_by_hand():
    tokens = torch.arange(10, 21)
    ids, first = cut_windows(tokens, 4)
    assert ids.tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]] and first == (1, 1)
    ids, first = cut_windows(tokens, 4, 1)
    assert ids.tolist() == [[10, 11, 12, 13]] and first == (1,)
    ids, first = cut_windows(tokens, 5, stride=2)
    assert ids.tolist() == [
        [10, 11, 12, 13, 14],
        [12, 13, 14, 15, 16],
        [14, 15, 16, 17, 18],
        [16, 17, 18, 19, 20],
    ]
    assert first == (1, 3, 3, 3)
    ids, first = cut_windows(tokens, 4, bos_id=1)
    assert ids.tolist() == [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 17, 18]] and first == (1, 1, 1)
    ids, first = cut_windows(tokens, 4, stride=1, count=2, bos_id=1)
    assert ids.tolist() == [[1, 10, 11, 12], [1, 11, 12, 13]] and first == (1, 3)
    assert ids.dtype == torch.int64


@given(st.integers(0, 60), st.integers(2, 9), st.integers(1, 9), st.booleans())
def test_no_token_is_scored_twice_and_none_in_between_is_left_out(n, length, stride, bos):
    body = length - bos
    if stride > body:
        with pytest.raises(ValueError, match="no windows"):
            cut_windows(torch.arange(n), length, stride=stride, bos_id=99 if bos else None)
        return
    if n < body:
        with pytest.raises(TextError, match="the text gives 0"):
            cut_windows(torch.arange(n), length, stride=stride, bos_id=99 if bos else None)
        return
    ids, first = cut_windows(torch.arange(n), length, stride=stride, bos_id=99 if bos else None)
    scored = [int(token) for row, start in zip(ids, first) for token in row[start:]]
    if stride < body:
        begin = 0 if bos else 1
        assert scored == list(range(begin, begin + len(scored)))
    else:
        assert len(set(scored)) == len(scored)
        assert [t for t in scored if bos or t % length] == scored
    assert n - (int(ids[-1, -1]) + 1) < stride  # no further window would have fitted
    for row, start in zip(ids[1:], first[1:]):
        assert start == max(1, length - stride)
        assert len(row) == length


@pytest.mark.parametrize("length, count, stride", [(1, None, None), (4, 0, None), (4, None, 0), (4, None, 5)])
def test_windows_that_make_no_sense(length, count, stride):
    with pytest.raises(ValueError, match="no windows of length"):
        cut_windows(torch.arange(50), length, count, stride=stride)


def test_too_short_a_text_is_an_error_not_fewer_windows():
    with pytest.raises(TextError, match="expected 3 windows of 4 tokens, the text gives 2"):
        cut_windows(torch.arange(11), 4, 3)
    with pytest.raises(TextError, match="expected 3 windows"):
        calibration_ids(numbers(11), Words(), windows=3, length=4)


def test_bos_policy():
    plain, with_bos, adds = Words(), Words(5), Words(5, adds_bos=True)
    assert [bos_of(t, "auto") for t in (plain, with_bos, adds)] == [None, None, 5]
    assert [bos_of(t, "never") for t in (plain, with_bos, adds)] == [None, None, None]
    assert [bos_of(t, "always") for t in (with_bos, adds)] == [5, 5]
    with pytest.raises(ValueError, match="no BOS token"):
        bos_of(plain, "always")
    with pytest.raises(ValueError, match="expected the BOS policy"):
        bos_of(plain, "sometimes")  # type: ignore[arg-type]


def test_make_windows_says_what_was_cut():
    windows = make_windows(numbers(20), Words(5, adds_bos=True), length=6, count=3)
    assert windows.ids.tolist() == [[5, 0, 1, 2, 3, 4], [5, 5, 6, 7, 8, 9], [5, 10, 11, 12, 13, 14]]
    assert (windows.bos, windows.stride, windows.count, windows.length) == (True, 5, 3, 6)
    assert windows.scored_tokens == 15
    assert windows.text_name == "numbers"
    assert windows.text_sha256 == hashlib.sha256(numbers(20).text.encode()).hexdigest()
    same = make_windows(numbers(20), Words(5, adds_bos=True), length=6, count=3)
    assert windows.sha256 == same.sha256
    others = [
        make_windows(numbers(20), Words(), length=6, count=3),
        make_windows(numbers(20), Words(), length=6, count=3, stride=5),
        make_windows(numbers(20), Words(), length=9, count=2),
    ]
    assert len({w.sha256 for w in [windows, *others]}) == 4


def test_calibration_in_order_and_at_random():
    ids = calibration_ids(numbers(50), Words(), windows=3, length=4)
    assert ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    one = calibration_ids(numbers(50), Words(), windows=30, length=4, seed=1)
    assert torch.equal(one, calibration_ids(numbers(50), Words(), windows=30, length=4, seed=1))
    assert not torch.equal(one, calibration_ids(numbers(50), Words(), windows=30, length=4, seed=2))
    assert one.shape == (30, 4) and (one.diff(dim=1) == 1).all()
    bos = calibration_ids(numbers(50), Words(9, adds_bos=True), windows=3, length=4, seed=1)
    assert (bos[:, 0] == 9).all() and (bos[:, 1:].diff(dim=1) == 1).all()
    last = calibration_ids(numbers(4), Words(), windows=2, length=4, seed=0)
    assert last.tolist() == [[0, 1, 2, 3]] * 2


def test_splits_by_hand():
    passages = [f"p{i}" for i in range(10)] + ["p0", "p9"]
    assert split_passages(passages, "calibration") == ("p0", "p1", "p2", "p3", "p4", "p5")
    assert split_passages(passages, "evaluation") == ("p8", "p9")


@given(st.lists(st.text(max_size=3), max_size=40))
def test_splits_share_nothing(passages):
    parts = [split_passages(passages, split) for split in SPLITS]
    assert not set(parts[0]) & set(parts[1])
    assert all(p in passages for part in parts for p in part)
    assert len(set(parts[0])) == len(parts[0])


def test_local_files(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"passage {i}" for i in range(10)) + "\n\n\n\npassage 9\n", encoding="utf-8")
    whole = load_text(str(path))
    assert whole.passages == (*(f"passage {i}" for i in range(10)), "passage 9") and whole.name == str(path)
    assert load_text(f"{path}#evaluation").passages == ("passage 8", "passage 9")
    assert len(load_text(f"{path}#calibration").passages) == 6
    assert whole.text.startswith("passage 0\n\npassage 1\n\n")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty").write_text("\n\n")
    for spec, message in [
        (str(tmp_path / "none.txt"), "neither a file nor"),
        (f"{path}#test", "expected #calibration or #evaluation"),
        (str(tmp_path / "latin"), "is not UTF-8"),
        (str(tmp_path / "empty"), "is empty"),
        ("wikitext2#evaluation", "splits of its own"),
        ("hub:only:three", "expected hub:NAME:CONFIG:SPLIT:COLUMN"),
    ]:
        with pytest.raises(TextError, match=message):
            load_text(spec)
    with pytest.raises(TextError, match="expected the role"):
        load_text(str(path), "test")  # type: ignore[arg-type]


def test_overlap_is_found():
    long, other, short = "a" * 200, "b" * 200, "See also"
    check_disjoint(Text("c", (long, short)), Text("e", (other, short)))
    with pytest.raises(TextError, match=r"1 passages stand in both c .* and e"):
        check_disjoint(Text("c", (long, short)), Text("e", (other, long)))


def test_hub_texts_come_from_the_hub_or_not_at_all(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "gone":
            raise ConnectionError("offline")
        return datasets.Dataset.from_dict({"text": ["one", "", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_text("wikitext2").text == "one\n\n\n\ntwo"
    load_text("wikitext2", "calibration")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", split) for split in ("test", "train")]
    with pytest.raises(TextError, match=r"hub:gone::test:text could not be loaded: ConnectionError: offline"):
        load_text("hub:gone::test:text")
    assert asked[-1] == ("gone", None, "test")
    with pytest.raises(TextError, match="expected a column body, got text"):
        load_text("hub:here:c:test:body")


@pytest.mark.assets
def test_boolq_is_what_the_notes_say():
    calibration, evaluation = load_text("boolq", "calibration"), load_text("boolq")
    assert (calibration.name, evaluation.name) == ("boolq#calibration", "boolq#evaluation")
    whole = tuple(dict.fromkeys(data._boolq(None)))
    assert len(whole) == 2938 and sum(len(p.encode()) for p in whole) == 1_645_448
    assert (len(calibration.passages), len(evaluation.passages)) == (1763, 588)
    assert calibration.passages == whole[:1763] and evaluation.passages == whole[-588:]
    check_disjoint(calibration, evaluation)


@pytest.mark.assets
def test_smollm2s_tokenizer_takes_the_text_apart_without_loss():
    from transformers import AutoTokenizer

    from brise.eval.assets import fetch

    tokenizer = AutoTokenizer.from_pretrained(fetch("smollm2-135m"))
    text = load_text("boolq")
    ids = tokenize(tokenizer, text.text)
    assert tokenizer.decode(ids) == text.text
    windows = make_windows(text, tokenizer, length=1024, count=16)
    assert not windows.bos and windows.ids.shape == (16, 1024)
    assert torch.equal(windows.ids.flatten(), ids[: 16 * 1024])
