"""What is asked of the generator, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral

from torch import Tensor

from .sampling import Sampling


class RequestError(ValueError):
    """A request that cannot be carried out; the message says what to change."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at least 1.
        sampling: see :class:`.Sampling`; the likeliest token each time by default.
        stop: strings that end the text; they are not part of it.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()

    def check(self, vocab: int, positions: int) -> None:
        """Raise RequestError where a model of ``vocab`` tokens and ``positions`` positions cannot do it."""
        if not len(self.prompt):
            raise RequestError(
                "the prompt has no tokens; give at least one, a beginning-of-text token for instance"
            )
        if not isinstance(self.max_new_tokens, Integral) or self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be an integer of at least 1, got {self.max_new_tokens}")
        for place, token in enumerate(self.prompt):
            if not isinstance(token, Integral):
                raise RequestError(
                    f"the prompt must be a list of token ids, got {type(token).__name__} at place {place}; of a tensor "
                    "take one row, and tolist()"
                )
            if not 0 <= token < vocab:
                raise RequestError(
                    f"token {token} at place {place} of the prompt is not in the vocabulary, 0..{vocab - 1}"
                )
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise RequestError(f"stop must be strings that are not empty, in a list, got {self.stop!r}")
        if len(self.prompt) >= positions:
            raise RequestError(
                f"the prompt has {len(self.prompt)} tokens, and the model has {positions} positions for it and what "
                "follows; shorten it"
            )


@dataclass
class Completion:
    """What came of one request.

    Attributes:
        index: of the request.
        prompt_tokens: of the prompt.
        tokens: that were written, the one that ends the text included.
        text: of them, without special tokens; None where there is no tokenizer.
        reason: ``eos``, ``stop`` (a stop string), ``length`` (max_new_tokens), ``positions`` (all of the model's are
            taken) or ``error``.
        error: what was wrong, with reason ``error``.
    """

    index: int
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    reason: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Event:
    """Something new of request ``index``: tokens, the text that has become certain, and at the end the completion."""

    index: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    completion: Completion | None = None


@dataclass
class Counts:
    """Of one generator: steps of decoding, tokens written, and drafts proposed and accepted."""

    steps: int = 0
    tokens: int = 0
    proposed: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that were right; None where there were none."""
        return self.accepted / self.proposed if self.proposed else None


def token_rows(ids: Tensor | Sequence[Sequence[int]], name: str) -> list[list[int]]:
    """A tensor [B, T], or a list of rows of any lengths, as lists; ``name`` is for the error."""
    if isinstance(ids, Tensor):
        if ids.ndim != 2:
            raise RequestError(f"{name} must be [B, T], a row for each prompt, got {list(ids.shape)}")
        return ids.tolist()
    if not all(isinstance(row, Sequence) for row in ids):
        raise RequestError(f"{name} must be a list of prompts, each a list of token ids")
    return [list(row) for row in ids]
