"""Guesses at what comes next, which one step of the model then checks (Leviathan et al. 2023, arXiv:2211.17192).

A guess is kept as far as the model, asked position by position, would have chosen the same token. So the text is the
one that it would be without, sampled or not; only the number of steps changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from .decode_engine import Beginning, DecodeEngine
from .decode_step import DecodeModel
from .sampling import RESTING, Sampling


class Proposer(Protocol):
    """Drafts for the rows of a generator; rows are numbered as its engine numbers them.

    Attributes:
        drafts: the most tokens proposed for a row.
    """

    drafts: int

    def prepare(self, rows: int, length: int) -> None:
        """What follows concerns at most this many rows, of at most this many positions each."""
        ...

    def start(self, row: int, prompt: Sequence[int]) -> None: ...

    def move(self, source: int, target: int) -> None: ...

    def propose(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        """What may follow, for rows 0, 1, ...: the tokens of each so far -> up to ``drafts`` more."""
        ...

    def settle(self, accepted: Sequence[int]) -> None:
        """How many of them were right."""
        ...


class PromptLookup:
    """What followed the last time that the text had the same few tokens (Saxena 2023, prompt lookup decoding).

    Args:
        drafts: tokens proposed at most.
        longest: of the runs of tokens that are looked up; shorter ones are tried after it.
    """

    def __init__(self, drafts: int = 8, longest: int = 3) -> None:
        if drafts < 1 or longest < 1:
            raise ValueError(f"drafts and longest must be at least 1, got {drafts} and {longest}")
        self.drafts, self.longest = drafts, longest
        self._rows: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}

    def prepare(self, rows: int, length: int) -> None:
        self._rows.clear()

    def start(self, row: int, prompt: Sequence[int]) -> None:
        self._rows[row] = 0, {}

    def move(self, source: int, target: int) -> None:
        self._rows[target] = self._rows.pop(source)

    def propose(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        return [self._lookup(row, text) for row, text in enumerate(texts)]

    def settle(self, accepted: Sequence[int]) -> None:
        pass

    def _lookup(self, row: int, text: Sequence[int]) -> list[int]:
        done, places = self._rows[row]
        # every run of tokens -> where the newest one of it ended; the text's last tokens are not their own past
        for end in range(max(1, done), len(text)):
            for n in range(1, min(self.longest, end) + 1):
                places[tuple(text[end - n : end])] = end
        self._rows[row] = len(text), places
        for n in range(min(self.longest, len(text)), 0, -1):
            found = places.get(tuple(text[len(text) - n :]))
            if found is not None:
                return list(text[found : found + self.drafts])
        return []


class DraftModel:
    """A smaller model of the same vocabulary, which writes ahead; a 2-bit quantization of the model itself is one.

    Args:
        model: a MistralForCausalLM.
        drafts: tokens that it writes ahead.
        repack: see :class:`.DecodeModel`.
    """

    def __init__(self, model: nn.Module, drafts: int = 4, *, repack: bool = True) -> None:
        if drafts < 1:
            raise ValueError(f"drafts must be at least 1, got {drafts}")
        self.drafts = drafts
        self._source, self._repack = model, repack
        self._model: DecodeModel | None = None
        self._engine: DecodeEngine | None = None
        self._written: list[int] = []

    @property
    def vocab(self) -> int:
        return self._source.config.vocab_size  # type: ignore[union-attr, return-value]

    @property
    def engine(self) -> DecodeEngine:
        if self._engine is None:
            raise RuntimeError("prepare() comes before anything else")
        return self._engine

    def prepare(self, rows: int, length: int) -> None:
        if self._model is None:
            self._model = DecodeModel(self._source, rows=rows, repack=self._repack)
        if self._engine is None or (self._engine.size, self._engine.length) != (rows, length + 1):
            self._engine = DecodeEngine(self._model, rows=rows, length=length + 1, drafts=self.drafts)

    def start(self, row: int, prompt: Sequence[int]) -> None:
        self.engine.start([Beginning(row, prompt, Sampling(), 1 << 30)])

    def move(self, source: int, target: int) -> None:
        self.engine.move(source, target)

    def propose(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        engine, count = self.engine, len(texts)
        newest = torch.tensor([text[-1] for text in texts])
        with torch.inference_mode():
            engine.states.token[:count] = newest.to(engine.states.token.device)
            engine.states.active[:count] = 1
        # one step more than is used: it puts the last draft into the cache, where it must be if all are right
        found = engine.run(count, self.drafts + 1)
        self._written = [sum(token != RESTING for token in row) for row in found]
        return [[token for token in row[: self.drafts] if token >= 0] for row in found]

    def settle(self, accepted: Sequence[int]) -> None:
        back = torch.zeros(self.engine.size, dtype=torch.int32)
        for row, (written, right) in enumerate(zip(self._written, accepted)):
            back[row] = max(0, written - 1 - right)
        with torch.inference_mode():
            self.engine.cache.retract(back.to(self.engine.cache.seen.device))
