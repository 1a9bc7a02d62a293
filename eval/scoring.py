"""One forward pass over the windows that gives perplexity and, against a baseline, divergence.

What is kept of the baseline is its last hidden states, fp32 or the model's own dtype, [n, length, H], and its
head. Its logits are computed again from them where they are compared: one product with the head instead of a
whole model, bit for bit what the baseline gave, and 38 MB where 16 windows of 1024 tokens over 49152 words
would take 3.2 GB as log-probabilities (or half that in 16 bits, with an error).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .compare import WindowSums
from .data import Windows
from .divergence import (
    Divergence,
    TokenFigures,
    divergence,
    same_first_choice,
    shared_of_five,
    token_kl,
)
from .model_info import ModelInfo
from .perplexity import (
    NonFiniteError,
    Perplexity,
    Relative,
    WordPerplexity,
    perplexity,
    relative_perplexity,
    token_nll,
    word_perplexity,
)

Progress = Callable[[str, int, int], None]
# logits held at once: 2^25 elements, 128 MB in fp32
LOGITS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Scores:
    """Sums over the scored tokens of each window.

    Attributes:
        tokens: int64 [n].
        nll: float64 [n], negative log-likelihoods.
        kl, agree: float64 [n], or None without a baseline.
        baseline_nll: float64 [n], or None.
        figures: of every token, or None without a baseline.
        windows: what was scored.
    """

    tokens: Tensor
    nll: Tensor
    kl: Tensor | None = None
    agree: Tensor | None = None
    baseline_nll: Tensor | None = None
    figures: TokenFigures | None = None
    windows: Windows | None = None

    @property
    def perplexity(self) -> Perplexity:
        return perplexity(self.nll, self.tokens)

    @property
    def divergence(self) -> Divergence | None:
        if self.kl is None or self.agree is None:
            return None
        return divergence(self.kl, self.agree, self.tokens, self.figures)

    @property
    def words(self) -> WordPerplexity | None:
        w = self.windows
        if w is None or w.documents is None or w.words is None or w.bytes is None:
            return None
        return word_perplexity(self.nll, *(torch.tensor(part) for part in (w.documents, w.words, w.bytes)))

    @property
    def sums(self) -> WindowSums:
        kl = None if self.kl is None else self.kl.tolist()
        return WindowSums(self.tokens.tolist(), self.nll.tolist(), kl)

    @property
    def relative(self) -> Relative | None:
        if self.baseline_nll is None:
            return None
        return relative_perplexity(self.nll, self.baseline_nll, self.tokens)


class Predictions(Protocol):
    """A baseline's predictions on windows, exact (:class:`Baseline`) or read from a file (:mod:`.logprobs`).

    Attributes:
        windows_sha256: of the windows. nll: sums over each, float64 [n].
        info: which model's. precision: as a row's protocol has it.
    """

    @property
    def windows_sha256(self) -> str: ...
    @property
    def nll(self) -> Tensor: ...
    @property
    def info(self) -> ModelInfo | None: ...
    @property
    def precision(self) -> str: ...

    def logits(self, window: int, before: slice, device: torch.device) -> Tensor:
        """Logits, up to a constant a row, at the positions ``before``: [T, V]."""
        ...


@dataclass(frozen=True)
class Baseline:
    """A model's predictions on windows: see the module's text. ``info`` says which model's."""

    windows: Windows
    hidden: Tensor
    head: nn.Module
    scores: Scores
    info: ModelInfo | None = None
    precision: str = field(default="exact", init=False)

    @property
    def windows_sha256(self) -> str:
        return self.windows.sha256

    @property
    def nll(self) -> Tensor:
        return self.scores.nll

    def logits(self, window: int, before: slice, device: torch.device) -> Tensor:
        logits: Tensor = self.head.to(device)(self.hidden[window, before].to(device))
        return logits


def measure_baseline(
    model: Any,
    windows: Windows,
    *,
    batch: int = 1,
    info: ModelInfo | None = None,
    progress: Progress | None = None,
) -> Baseline:
    """Run ``model`` over the windows and keep its hidden states, on the CPU, with its head.

    Raises:
        NonFiniteError: see :func:`score`.
    """
    kept: list[Tensor] = []
    scores = _score(model, windows, None, batch, progress, "baseline", kept)
    return Baseline(windows, torch.cat(kept), model.get_output_embeddings(), scores, info)


def score(
    model: Any,
    windows: Windows,
    baseline: Predictions | None = None,
    *,
    batch: int = 1,
    cache: Callable[[], Any] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score every window once.

    Args:
        model: a causal LM with a decoder and an output head (transformers' or ours).
        windows: what to score.
        baseline: of the same windows.
        batch: windows a forward pass.
        cache: makes the cache that a forward pass reads keys and values through; None runs without one.
        progress: called with ("score", windows done, windows in all).

    Raises:
        ValueError: the baseline is of other windows.
        NonFiniteError: some token's log-likelihood or divergence is infinite or NaN; the message counts them.
    """
    if baseline is not None and baseline.windows_sha256 != windows.sha256:
        raise ValueError(
            "the baseline was measured on other windows (text, tokenizer, length, count or stride)"
        )
    return _score(model, windows, baseline, batch, progress, "score", None, cache=cache)


# called with a window and the logits at its scored positions, part by part
Listener = Callable[[int, Tensor], None]


@torch.inference_mode()
def _score(
    model: Any,
    windows: Windows,
    baseline: Predictions | None,
    batch: int,
    progress: Progress | None,
    stage: str,
    keep: list[Tensor] | None,
    listen: Listener | None = None,
    cache: Callable[[], Any] | None = None,
) -> Scores:
    model.eval()
    head = model.get_output_embeddings()
    device = next(model.parameters()).device
    n = windows.count
    sums = torch.zeros(3, n, dtype=torch.float64)  # nll, kl, agreements
    figures: list[TokenFigures] = []
    tokens, ends = windows.scored, windows.ends
    bad = Bad()
    for start in range(0, n, batch):
        ids = windows.ids[start : start + batch].to(device)
        # windows of unequal lengths are one token longer than what a model is fed: the last is only predicted
        fed = ids if windows.stop is None else ids[:, :-1]
        held = {} if cache is None else {"past_key_values": cache()}
        hidden = model.get_decoder()(input_ids=fed, use_cache=bool(held), **held).last_hidden_state
        if keep is not None:
            keep.append(hidden.cpu())
        for row in range(len(ids)):
            window = start + row
            for part in _parts(windows.first_target[window], ends[window], model.config.vocab_size):
                # the logits at position t - 1 predict the token at t
                before = slice(part.start - 1, part.stop - 1)
                logits = head(hidden[row, before])
                nll = token_nll(logits, ids[row, part])
                bad.count(nll, window, part)
                sums[0, window] += nll.double().sum().cpu()
                if listen is not None:
                    listen(window, logits)
                if baseline is not None:
                    theirs = baseline.logits(window, before, device)
                    found = _figures(theirs, logits, ids[row, part], nll, window)
                    bad.count(found.kl, window, part)
                    sums[1, window] += found.kl.double().sum()
                    sums[2, window] += found.same.double().sum()
                    figures.append(found)
        if progress is not None:
            progress(stage, min(start + batch, n), n)
    bad.check(int(tokens.sum()))
    if baseline is None:
        return Scores(tokens, sums[0], windows=windows)
    return Scores(tokens, sums[0], sums[1], sums[2], baseline.nll, _join(figures), windows)


def _figures(theirs: Tensor, logits: Tensor, targets: Tensor, nll: Tensor, window: int) -> TokenFigures:
    change = (-nll).exp() - (-token_nll(theirs, targets)).exp()
    values = (
        token_kl(theirs, logits),
        same_first_choice(theirs, logits).float(),
        shared_of_five(theirs, logits),
        change,
    )
    return TokenFigures(torch.full((len(nll),), window), *(value.cpu() for value in values))


def _join(figures: list[TokenFigures]) -> TokenFigures:
    names = ("window", "kl", "same", "top5", "change")
    return TokenFigures(*(torch.cat([getattr(part, name) for part in figures]) for name in names))


def _parts(first: int, end: int, vocab: int) -> Iterator[slice]:
    """Target positions first .. end - 1 in parts whose logits fit :data:`LOGITS_AT_ONCE`."""
    step = max(1, LOGITS_AT_ONCE // vocab)
    for start in range(first, end, step):
        yield slice(start, min(start + step, end))


class Bad:
    """Counts tokens whose figure is not finite, and remembers the first."""

    def __init__(self) -> None:
        self.tokens = 0
        self.first: tuple[int, int] | None = None

    def count(self, values: Tensor, window: int, part: slice) -> None:
        wrong = ~torch.isfinite(values)
        number = int(wrong.sum())
        if number and self.first is None:
            self.first = (window, part.start + int(wrong.int().argmax()))
        self.tokens += number

    def check(self, scored: int) -> None:
        if self.first is not None:
            window, position = self.first
            raise NonFiniteError(
                f"{self.tokens} figures over {scored} scored tokens are infinite or NaN, the first in window "
                f"{window} at token {position}: do its logits overflow? Try float32, look at its scales"
            )
