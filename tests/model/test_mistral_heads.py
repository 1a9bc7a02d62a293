"""The task heads against transformers', with padding on either side."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, MistralConfig

from brise.model import mistral
from brise.model.heads import last_token


def tiny(**changes: Any) -> MistralConfig:
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "sliding_window": 5,
        "pad_token_id": 0,
        "num_labels": 3,
        "initializer_range": 0.3,
    }
    return MistralConfig(**(settings | changes))


def pair(head: str, **changes: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = getattr(transformers, f"MistralFor{head}")(tiny(**changes)).eval()
    ours = getattr(mistral, f"MistralFor{head}")(copy.deepcopy(theirs.config)).eval()
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def texts(side: str) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 61, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(3):
        columns = slice(0, 2 * row) if side == "left" else slice(9 - 2 * row, 9)
        ids[row, columns], mask[row, columns] = 0, 0
    return ids, mask


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def same(got: Any, expected: Any, ours: Any, theirs: Any) -> None:
    assert list(got) == list(expected)
    for a, b in zip(got.to_tuple(), expected.to_tuple()):
        if isinstance(a, Tensor):
            close(a, b)
    got.loss.backward()
    expected.loss.backward()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        close(a.grad, b.grad)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        (None, torch.tensor([2, 0, 1])),
        ("single_label_classification", torch.tensor([2, 0, 1])),
        ("multi_label_classification", torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])),
        ("regression", torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.2, 0.3], [3.0, 2.0, 1.0]])),
    ],
    ids=str,
)
def test_sequence_classification(problem: str | None, labels: Tensor, side: str) -> None:
    theirs, ours = pair("SequenceClassification", problem_type=problem)
    ids, mask = texts(side)
    arguments = {"attention_mask": mask, "labels": labels}
    same(ours(ids, **arguments), theirs(ids, **arguments), ours, theirs)
    assert ours(ids, attention_mask=mask).logits.shape == (3, 3)


def test_the_token_that_is_read() -> None:
    ids = torch.tensor([[5, 6, 0, 0], [0, 0, 7, 8], [5, 0, 6, 0], [9, 9, 9, 9]])
    assert last_token(ids, 0, 4, ids.device).tolist() == [1, 3, 2, 3]
    assert last_token(ids, None, 4, ids.device).tolist() == [-1] * 4
    assert last_token(None, 0, 2, ids.device).tolist() == [-1] * 2


def test_sequence_classification_without_padding_token() -> None:
    theirs, ours = pair("SequenceClassification", pad_token_id=None)
    ids = texts("left")[0][:1]
    close(ours(ids).logits, theirs(ids).logits)
    with pytest.raises(ValueError, match=r"Cannot handle batch sizes > 1 .* got 2 texts"):
        ours(ids.repeat(2, 1))


def test_sequence_classification_from_embeddings() -> None:
    theirs, ours = pair("SequenceClassification")
    embeddings = ours.get_input_embeddings()(texts("left")[0]).detach()
    close(ours(inputs_embeds=embeddings).logits, theirs(inputs_embeds=embeddings).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_classification(side: str) -> None:
    theirs, ours = pair("TokenClassification")
    ids, mask = texts(side)
    labels = (ids % 3).masked_fill(mask == 0, -100)
    arguments = {"attention_mask": mask, "labels": labels}
    same(ours(ids, **arguments), theirs(ids, **arguments), ours, theirs)
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(2)
        model.logits = model(ids, **arguments).logits
    close(ours.logits, theirs.logits)


def test_token_classification_dropout_rate_and_bias() -> None:
    assert pair("TokenClassification")[1].dropout.p == 0.1
    assert pair("TokenClassification", hidden_dropout=0.3)[1].dropout.p == 0.3
    both = pair("TokenClassification", hidden_dropout=0.3, classifier_dropout=0.0)[1]
    assert both.dropout.p == 0.0
    assert pair("TokenClassification", token_classification_bias=False)[1].score.bias is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_question_answering(side: str) -> None:
    theirs, ours = pair("QuestionAnswering")
    ids, mask = texts(side)
    starts, ends = torch.tensor([1, 4, 4]), torch.tensor([2, 5, 99])
    arguments = {"attention_mask": mask, "start_positions": starts, "end_positions": ends}
    same(ours(ids, **arguments), theirs(ids, **arguments), ours, theirs)
    assert ours(ids, start_positions=starts).loss is None


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_documented_outputs(head: str) -> None:
    theirs, ours = pair(head)
    ids, mask = texts("left")
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True, return_dict=False)
    got = ours(ids, attention_mask=mask, output_hidden_states=True, return_dict=False)
    assert isinstance(got, tuple) and len(got) == len(expected)
    for a, b in zip(got[-1], expected[-1], strict=True):
        close(a, b)
    ours.config.return_dict = False
    assert isinstance(ours(ids), tuple)
    assert ours.base_model is ours.model


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_text_goes_on_behind_what_a_cache_holds(head: str) -> None:
    ids, mask = texts("left")
    found = []
    for model in pair(head):
        cache = DynamicCache(config=model.config)
        parts = [
            model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True)
            for a, b in ((0, 6), (6, 7), (7, 9))
        ]
        assert cache.get_seq_length() == 9
        found.append([t for part in parts for t in part.to_tuple() if isinstance(t, Tensor)])
    for a, b in zip(*found, strict=True):
        close(b, a)


def test_labels_unknown() -> None:
    config = tiny()
    config.id2label = None
    with pytest.raises(ValueError, match="number of labels is unknown"):
        mistral.MistralForSequenceClassification(config)
