"""Named protocols: how a text is joined, cut and scored, so that figures mean what others mean by them.

==============  =====================================================================================================
``gptq-2048``   GPTQ's authors' (IST-DASLab/gptq): the rows joined by blank lines, tokenized once (so one BOS at the
                very front where the tokenizer puts one), windows of 2048 side by side, a rest left out; every token
                but a window's first is scored. The figures of most papers on quantization.
``stride-512``  windows of 2048 of that same text every 512 tokens, each scored on what no window before it had, the
                rest at the end included (transformers' guide "Perplexity of fixed-length models").
``llamacpp-512``  llama.cpp's ``llama-perplexity``: the raw file tokenized once with BOS, windows of 512 whose first
                token gives way to BOS, and the second half of each scored: positions 257..511.
``lmeval-word`` lm-eval's task ``wikitext``: every document by itself behind one prefix token (BOS, else EOS), windows
                of 2048 predictions, and perplexity by the word of the original text. On ``wikitext2`` its own
                detokenizer is applied, which takes lm-eval.
==============  =====================================================================================================

The text is ``wikitext2`` where none is named; a window or two of any other text are legitimate, and the row says
which text and how many. What is cut by options of one's own is ``free``. Rows under two protocols never stand in
one table, whatever else they share.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .data import FREE, Text, TextError, Windows, bos_of, load_text, tokenize

Scored = Literal["all", "new", "second-half", "documents"]
PAGES = "hub:EleutherAI/wikitext_document_level:wikitext-2-raw-v1:test:page"


@dataclass(frozen=True)
class NamedProtocol:
    """A rule of cutting and scoring.

    Attributes:
        length: tokens of a window. stride: text tokens between the starts of two.
        scored: ``all`` tokens but a window's first; what is ``new`` in it; its ``second-half``; ``documents`` one
            by one, each from its first token on.
        raw: the text is the file as it stands, not its rows joined by blank lines.
    """

    name: str
    length: int
    stride: int
    scored: Scored
    raw: bool = False


PROTOCOLS: dict[str, NamedProtocol] = {
    p.name: p
    for p in (
        NamedProtocol("gptq-2048", 2048, 2048, "all"),
        NamedProtocol("stride-512", 2048, 512, "new"),
        NamedProtocol("llamacpp-512", 512, 512, "second-half", raw=True),
        NamedProtocol("lmeval-word", 2048, 2048, "documents"),
    )
}


def protocol_of(name: str) -> NamedProtocol:
    """Raises TextError for a name that is not one of :data:`PROTOCOLS`."""
    if name not in PROTOCOLS:
        raise TextError(f"expected a protocol of {', '.join(PROTOCOLS)} (or {FREE}), got {name!r}")
    return PROTOCOLS[name]


def protocol_text(rule: NamedProtocol, text: str | None, cache_dir: str | Path | None = None) -> Text:
    """The text of a protocol; ``None`` is wikitext-2 as the protocol takes it, from the hub."""
    if rule.scored == "documents" and text in (None, "wikitext2"):
        return load_text(PAGES, "evaluation", cache_dir)
    return load_text(text or "wikitext2", "evaluation", cache_dir)


def protocol_windows(
    rule: NamedProtocol, text: Text, tokenizer: Any, count: int | None = None, positions: int | None = None
) -> Windows:
    """``text`` cut by ``rule``; the first ``count`` windows, or all.

    Raises:
        TextError: too short a text, or too few positions in the model.
    """
    if positions is not None and rule.length > positions:
        raise TextError(f"{rule.name} has windows of {rule.length} tokens, the model {positions} positions")
    cut = _CUT[rule.scored]
    return cut(rule, text, tokenizer, count)


def raw_text(text: Text) -> str:
    """The file that the text's passages were read from.

    The hub's wikitext has a row a line, with its line feed, and has put an empty row in the place of " \\n".
    """
    if text.name.startswith("hub:") and "wikitext" in text.name:
        return "".join(row or " \n" for row in text.passages)
    if Path(text.name).is_file():
        return Path(text.name).read_text(encoding="utf-8")
    return text.text


def _stream(tokenizer: Any, text: str) -> Tensor:
    """All tokens, int64 [t], with the BOS that the tokenizer puts first."""
    bos = bos_of(tokenizer, "auto")
    tokens = tokenize(tokenizer, text)
    return tokens if bos is None else torch.cat([torch.tensor([bos]), tokens])


def _enough(rule: NamedProtocol, text: Text, available: int, count: int | None) -> int:
    if available < 1 or (count or 0) > available:
        raise TextError(
            f"{rule.name}: expected {count or 'some'} windows of {rule.length} tokens, {text.name} gives {available}"
        )
    return count or available


def _side_by_side(rule: NamedProtocol, text: Text, tokenizer: Any, count: int | None) -> Windows:
    tokens = _stream(tokenizer, text.text)
    n = _enough(rule, text, len(tokens) // rule.length, count)
    ids = tokens[: n * rule.length].reshape(n, rule.length).clone()
    return Windows(ids, (1,) * n, text.name, text.sha256, False, rule.stride, rule.name)


def _second_half(rule: NamedProtocol, text: Text, tokenizer: Any, count: int | None) -> Windows:
    bos = bos_of(tokenizer, "auto")
    tokens = _stream(tokenizer, raw_text(text))
    n = _enough(rule, text, len(tokens) // rule.length, count)
    ids = tokens[: n * rule.length].reshape(n, rule.length).clone()
    if bos is not None:
        ids[:, 0] = bos
    first = (rule.length // 2 + 1,) * n
    return Windows(ids, first, text.name, text.sha256, bos is not None, rule.stride, rule.name)


def _overlapping(rule: NamedProtocol, text: Text, tokenizer: Any, count: int | None) -> Windows:
    tokens = _stream(tokenizer, text.text)
    pieces: list[tuple[Tensor, int]] = []
    done = 0
    for begin in range(0, len(tokens), rule.stride):
        end = min(begin + rule.length, len(tokens))
        pieces.append((tokens[begin:end], max(1, done - begin)))
        done = end
        if end == len(tokens):
            break
    n = _enough(rule, text, len(pieces) if len(tokens) > 1 else 0, count)
    ids, stop = _padded([piece for piece, _ in pieces[:n]], rule.length)
    # one column more: of windows of unequal lengths the model is not fed the last
    ids = torch.cat([ids, torch.zeros(n, 1, dtype=ids.dtype)], dim=1)
    first = tuple(first for _, first in pieces[:n])
    return Windows(ids, first, text.name, text.sha256, False, rule.stride, rule.name, stop)


def _documents(rule: NamedProtocol, text: Text, tokenizer: Any, count: int | None) -> Windows:
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise TextError(f"{rule.name} puts BOS or EOS before every document, and the tokenizer has neither")
    clean = _detokenizer() if text.name == PAGES else (lambda page: page)
    pieces: list[tuple[Tensor, int]] = []
    documents: list[int] = []
    pages = [page for page in text.passages if page.strip()]
    wanted = pages if count is None else pages[:count]
    _enough(rule, text, len(pages), count)
    for number, page in enumerate(wanted):
        tokens = torch.cat([torch.tensor([prefix]), tokenize(tokenizer, clean(page))])
        for done in range(0, len(tokens) - 1, rule.length):
            end = min(done + rule.length, len(tokens) - 1)
            # the last window of a document reaches back: what it predicts has as much before it as there is
            begin = 0 if done == 0 else end - rule.length
            pieces.append((tokens[begin : end + 1], done - begin + 1))
            documents.append(number)
    ids, stop = _padded([piece for piece, _ in pieces], rule.length + 1)
    return Windows(
        ids,
        tuple(first for _, first in pieces),
        text.name,
        text.sha256,
        True,
        rule.stride,
        rule.name,
        stop,
        tuple(documents),
        tuple(len(re.split(r"\s+", page)) for page in wanted),
        tuple(len(page.encode()) for page in wanted),
    )


_CUT = {
    "all": _side_by_side,
    "new": _overlapping,
    "second-half": _second_half,
    "documents": _documents,
}


def _padded(pieces: list[Tensor], length: int) -> tuple[Tensor, tuple[int, ...]]:
    ids = torch.zeros(len(pieces), length, dtype=torch.int64)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = piece
    return ids, tuple(len(piece) for piece in pieces)


def _detokenizer() -> Callable[[str], str]:
    """lm-eval's own, so that the same text is scored."""
    try:
        from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
    except ImportError as error:
        raise ImportError('lmeval-word on wikitext2 needs lm-eval: pip install "brise[tasks]"') from error

    def clean(page: str) -> str:
        text: str = wikitext_detokenizer({"page": page})
        return text

    return clean
