"""Texts, their splits, and windows of tokens.

A text is named by a short string:

==========================  ==================================================================================
``boolq``                   the BoolQ validation passages (Wikipedia prose) of the asset ``texts``
``path/to/file.txt``        a UTF-8 file; its passages are its paragraphs, cut at blank lines
``wikitext2``               ``Salesforce/wikitext``, ``wikitext-2-raw-v1``, from the hub: train or test split
``hub:NAME:CONFIG:SPLIT:COLUMN``  any hub dataset, all five parts given (CONFIG may be empty)
==========================  ==================================================================================

``#calibration`` and ``#evaluation`` behind ``boolq`` or a file take the first 60% and the last 20% of its
distinct passages, in order; what lies between is nobody's. Without that, ``boolq`` takes the split its user
stands for and a file is taken whole. Nothing is downloaded from a hub unless a hub text is named, and no text
ever stands in for another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .assets import fetch

Role = Literal["calibration", "evaluation"]
Bos = Literal["auto", "always", "never"]
SEPARATOR = "\n\n"
FREE = "free"
# share of the passages, in order: calibration takes those before the first, evaluation those after the second
SPLITS = {"calibration": (0.0, 0.6), "evaluation": (0.8, 1.0)}
# a passage shorter than this (a heading, "See also") may stand in two texts without being the same text
_LONG = 200


class TextError(ValueError):
    """A text that is not there, or too short for what is asked of it."""


@dataclass(frozen=True)
class Text:
    """Passages in order, and the name that says which."""

    name: str
    passages: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        """All passages, joined by a blank line."""
        return SEPARATOR.join(self.passages)

    @cached_property
    def sha256(self) -> str:
        """Of :attr:`text` in UTF-8, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_text(spec: str, role: Role = "evaluation", cache_dir: str | Path | None = None) -> Text:
    """The text that ``spec`` names (see the module's table).

    Args:
        spec: the name.
        role: what it is for; decides the split where the name does not.
        cache_dir: of the assets, see :func:`brise.kernels.cache_folder.cache_root`.

    Raises:
        TextError: an unknown name, split or file, an empty text, or a hub dataset that cannot be loaded.
        AssetError: ``boolq`` is not in the cache and cannot be fetched.
    """
    if role not in SPLITS:
        raise TextError(f"expected the role calibration or evaluation, got {role!r}")
    base, _, split = spec.partition("#")
    if split and split not in SPLITS:
        raise TextError(f"expected #calibration or #evaluation behind {base}, got #{split}")
    if base == "wikitext2" or base.startswith("hub:"):
        if split:
            raise TextError(f"{base} has splits of its own; name one as hub:NAME:CONFIG:SPLIT:COLUMN")
        return _from_hub(base, role)
    if base == "boolq":
        split = split or role
        passages = _boolq(cache_dir)
    elif Path(base).is_file():
        passages = _paragraphs(Path(base))
    else:
        raise TextError(
            f"{base!r} is neither a file nor one of boolq, wikitext2, hub:NAME:CONFIG:SPLIT:COLUMN"
        )
    if split:
        passages = split_passages(passages, split)
    name = f"{base}#{split}" if split else base
    if not passages:
        raise TextError(f"the text {name} is empty")
    return Text(name, passages)


def split_passages(passages: Sequence[str], split: str) -> tuple[str, ...]:
    """The passages of ``split``, duplicates dropped and in order: see :data:`SPLITS`."""
    distinct = tuple(dict.fromkeys(passages))
    start, stop = (round(len(distinct) * part) for part in SPLITS[split])
    return distinct[start:stop]


def check_disjoint(calibration: Text, evaluation: Text) -> None:
    """Raise TextError where a passage of 200 characters or more stands in both texts."""
    shared = {p for p in calibration.passages if len(p) >= _LONG} & set(evaluation.passages)
    if shared:
        raise TextError(
            f"{len(shared)} passages stand in both {calibration.name} (calibration) and {evaluation.name} "
            f"(evaluation), so the figures would flatter; of one file take FILE#calibration, FILE#evaluation"
        )


def _boolq(cache_dir: str | Path | None) -> tuple[str, ...]:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ImportError(
            'reading the text boolq needs the datasets package: pip install "brise[demo]"'
        ) from error
    return tuple(load_from_disk(str(fetch("texts", cache_dir) / "boolq"))["passage"])


def _paragraphs(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text ({error})") from error
    return tuple(part.strip("\n") for part in text.split(SEPARATOR) if part.strip())


def _from_hub(spec: str, role: Role) -> Text:
    if spec == "wikitext2":
        split = "train" if role == "calibration" else "test"
        spec = f"hub:Salesforce/wikitext:wikitext-2-raw-v1:{split}:text"
    parts = spec.split(":")
    if len(parts) != 5 or not (parts[1] and parts[3] and parts[4]):
        raise TextError(f"expected hub:NAME:CONFIG:SPLIT:COLUMN, got {spec}")
    _, name, config, split, column = parts
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError('hub texts need the datasets package: pip install "brise[demo]"') from error
    try:
        rows = load_dataset(name, config or None, split=split)
    except Exception as error:  # datasets raises many unrelated types; every one of them means: not loaded
        raise TextError(f"{spec} could not be loaded: {type(error).__name__}: {error}") from error
    if column not in rows.column_names:
        raise TextError(f"{spec}: expected a column {column}, got {', '.join(rows.column_names)}")
    # empty rows stay: perplexities of wikitext are published over exactly this joined text
    return Text(spec, tuple(rows[column]))


@dataclass(frozen=True)
class Windows:
    """Windows of tokens to score.

    Attributes:
        ids: int64 [n, length].
        first_target: the position of the first token that is scored, 1 <= first_target[i] < length; those
            before it are context. A window's token 0 is never scored.
        text_name, text_sha256: name and sha256 of the text they were cut from.
        bos: whether every window begins with the BOS token (counted in ``length``).
        stride: text tokens between the starts of two windows.
        protocol: the name of the rule that cut them (:mod:`.protocols`), or ``free``.
        stop: where windows are of unequal lengths, the end of each; what stands behind it is padding. None: all
            end at ``length``.
        documents: the document that each window is of, where documents are scored one by one.
        words, bytes: of each document, where perplexity is asked by the word.
    """

    ids: Tensor
    first_target: tuple[int, ...]
    text_name: str
    text_sha256: str
    bos: bool
    stride: int
    protocol: str = FREE
    stop: tuple[int, ...] | None = None
    documents: tuple[int, ...] | None = None
    words: tuple[int, ...] | None = None
    bytes: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def ends(self) -> tuple[int, ...]:
        """The end of each window."""
        return (self.length,) * self.count if self.stop is None else self.stop

    @property
    def scored(self) -> Tensor:
        """Scored tokens of each window, int64 [n]."""
        return torch.tensor([end - first for first, end in zip(self.first_target, self.ends)])

    @property
    def scored_tokens(self) -> int:
        return int(self.scored.sum())

    @cached_property
    def sha256(self) -> str:
        """Of the ids (little-endian int64) and first targets: equal where the same tokens are scored."""
        data = self.ids.numpy().astype("<i8").tobytes()
        what = (tuple(self.ids.shape), self.first_target, *(() if self.stop is None else (self.stop,)))
        return hashlib.sha256(data + repr(what).encode()).hexdigest()


def cut_windows(
    tokens: Tensor,
    length: int,
    count: int | None = None,
    *,
    stride: int | None = None,
    bos_id: int | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """Cut a text's tokens, int64 [t], into windows, int64 [n, length], and say from where each is scored.

    Without ``stride`` the windows stand side by side and every token but a window's first is scored. With
    ``stride < length`` a window begins ``stride`` tokens after the one before it and only its last ``stride``
    tokens are scored, so that each has at least ``length - stride`` tokens of context and none counts twice.
    A rest shorter than a window is left out.

    Args:
        tokens: int64 [t], without special tokens.
        length: tokens a window, BOS included.
        count: windows wanted, the first ones; None takes all there are.
        stride: see above; None is ``length`` (less one for BOS).
        bos_id: put before every window where given.

    Raises:
        TextError: the text is too short for ``count`` windows.
        ValueError: a length below 2, a count below 1, or a stride outside 1..length.
    """
    body = length - (bos_id is not None)
    step = body if stride is None else stride
    if length < 2 or body < 1 or (count is not None and count < 1) or not 1 <= step <= body:
        raise ValueError(
            f"no windows of length {length}, count {count}, stride {stride} (BOS: {bos_id is not None})"
        )
    available = 0 if len(tokens) < body else (len(tokens) - body) // step + 1
    wanted = available if count is None else count
    if wanted < 1 or wanted > available:
        raise TextError(f"expected {count or 'some'} windows of {length} tokens, the text gives {available}")
    ids = tokens.unfold(0, body, step)[:wanted].contiguous()
    if bos_id is not None:
        ids = torch.cat([torch.full((wanted, 1), bos_id, dtype=ids.dtype), ids], dim=1)
    return ids, (1,) + (max(1, length - step),) * (wanted - 1)


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """The whole text as tokens, int64 [t], without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def bos_of(tokenizer: Any, policy: Bos) -> int | None:
    """The BOS id to put before every window, or None.

    ``auto`` does what the tokenizer does to any text: Mistral's puts BOS first, SmolLM2's does not. Without
    it a model trained with BOS is measured in a state that it never meets in use.

    Raises:
        ValueError: ``always`` with a tokenizer that has no BOS, or an unknown policy.
    """
    if policy not in ("auto", "always", "never"):
        raise ValueError(f"expected the BOS policy auto, always or never, got {policy!r}")
    bos = tokenizer.bos_token_id
    if policy == "always":
        if bos is None:
            raise ValueError("the tokenizer has no BOS token; use the BOS policy auto or never")
        return int(bos)
    if policy == "auto" and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        return int(bos)
    return None


def make_windows(
    text: Text,
    tokenizer: Any,
    *,
    length: int = 1024,
    count: int | None = None,
    stride: int | None = None,
    bos: Bos = "auto",
) -> Windows:
    """Tokenize ``text`` as one string and cut it: see :func:`cut_windows` and :func:`bos_of`."""
    bos_id = bos_of(tokenizer, bos)
    ids, first = cut_windows(tokenize(tokenizer, text.text), length, count, stride=stride, bos_id=bos_id)
    step = stride if stride is not None else length - (bos_id is not None)
    return Windows(ids, first, text.name, text.sha256, bos_id is not None, step)


def calibration_ids(
    text: Text,
    tokenizer: Any,
    *,
    windows: int = 64,
    length: int = 1024,
    seed: int | None = None,
    bos: Bos = "auto",
) -> Tensor:
    """Calibration windows, int64 [windows, length].

    Without a seed they are the first ones of the text, side by side. With one, each begins at a random token
    (windows may overlap), the sampling that GPTQ's authors use (IST-DASLab/gptq, ``datautils.py``).

    Raises:
        TextError: the text is too short.
    """
    bos_id = bos_of(tokenizer, bos)
    tokens = tokenize(tokenizer, text.text)
    if seed is None:
        return cut_windows(tokens, length, windows, bos_id=bos_id)[0]
    body = length - (bos_id is not None)
    if len(tokens) < body:
        raise TextError(
            f"expected at least {body} tokens for a calibration window, {text.name} gives {len(tokens)}"
        )
    starts = torch.randint(len(tokens) - body + 1, (windows,), generator=torch.Generator().manual_seed(seed))
    rows = [tokens[start : start + body] for start in starts.tolist()]
    ids = torch.stack(rows)
    if bos_id is not None:
        ids = torch.cat([torch.full((windows, 1), bos_id), ids], dim=1)
    return ids
