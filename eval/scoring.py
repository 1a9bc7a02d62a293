"""One forward pass over the windows that gives perplexity and, against a baseline, divergence.

What is kept of the baseline is its last hidden states, fp32 or the model's own dtype, [n, length, H], and its
head. Its logits are computed again from them where they are compared: one product with the head instead of a
whole model, bit for bit what the baseline gave, and 38 MB where 16 windows of 1024 tokens over 49152 words
would take 3.2 GB as log-probabilities (or half that in 16 bits, with an error).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .data import Windows
from .divergence import Divergence, divergence, same_first_choice, token_kl
from .model_info import ModelInfo
from .perplexity import (
    NonFiniteError,
    Perplexity,
    Relative,
    perplexity,
    relative_perplexity,
    token_nll,
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
    """

    tokens: Tensor
    nll: Tensor
    kl: Tensor | None = None
    agree: Tensor | None = None
    baseline_nll: Tensor | None = None

    @property
    def perplexity(self) -> Perplexity:
        return perplexity(self.nll, self.tokens)

    @property
    def divergence(self) -> Divergence | None:
        if self.kl is None or self.agree is None:
            return None
        return divergence(self.kl, self.agree, self.tokens)

    @property
    def relative(self) -> Relative | None:
        if self.baseline_nll is None:
            return None
        return relative_perplexity(self.nll, self.baseline_nll, self.tokens)


@dataclass(frozen=True)
class Baseline:
    """A model's predictions on windows: see the module's text. ``info`` says which model's."""

    windows: Windows
    hidden: Tensor
    head: nn.Module
    scores: Scores
    info: ModelInfo | None = None


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
    baseline: Baseline | None = None,
    *,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """Score every window once.

    Args:
        model: a causal LM with a decoder and an output head (transformers' or ours).
        windows: what to score.
        baseline: of the same windows.
        batch: windows a forward pass.
        progress: called with ("score", windows done, windows in all).

    Raises:
        ValueError: the baseline is of other windows.
        NonFiniteError: some token's log-likelihood or divergence is infinite or NaN; the message counts them.
    """
    if baseline is not None and baseline.windows.sha256 != windows.sha256:
        raise ValueError(
            "the baseline was measured on other windows (text, tokenizer, length, count or stride)"
        )
    return _score(model, windows, baseline, batch, progress, "score", None)


@torch.inference_mode()
def _score(
    model: Any,
    windows: Windows,
    baseline: Baseline | None,
    batch: int,
    progress: Progress | None,
    stage: str,
    keep: list[Tensor] | None,
) -> Scores:
    model.eval()
    head = model.get_output_embeddings()
    device = next(model.parameters()).device
    n = windows.count
    sums = torch.zeros(3, n, dtype=torch.float64)  # nll, kl, agreements
    tokens = torch.tensor([windows.length - first for first in windows.first_target])
    bad = Bad()
    for start in range(0, n, batch):
        ids = windows.ids[start : start + batch].to(device)
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        if keep is not None:
            keep.append(hidden.cpu())
        for row in range(len(ids)):
            window = start + row
            for part in _parts(windows.first_target[window], windows.length, model.config.vocab_size):
                # the logits at position t - 1 predict the token at t
                before = slice(part.start - 1, part.stop - 1)
                logits = head(hidden[row, before])
                nll = token_nll(logits, ids[row, part])
                bad.count(nll, window, part)
                sums[0, window] += nll.double().sum().cpu()
                if baseline is not None:
                    theirs = _head_of(baseline, device)(baseline.hidden[window, before].to(device))
                    kl = token_kl(theirs, logits)
                    bad.count(kl, window, part)
                    sums[1, window] += kl.double().sum().cpu()
                    sums[2, window] += same_first_choice(theirs, logits).sum().cpu()
        if progress is not None:
            progress(stage, min(start + batch, n), n)
    bad.check(int(tokens.sum()))
    if baseline is None:
        return Scores(tokens, sums[0])
    return Scores(tokens, sums[0], sums[1], sums[2], baseline.scores.nll)


def _head_of(baseline: Baseline, device: torch.device) -> nn.Module:
    return baseline.head.to(device)


def _parts(first: int, length: int, vocab: int) -> Iterator[slice]:
    """Target positions first .. length - 1 in parts whose logits fit :data:`LOGITS_AT_ONCE`."""
    step = max(1, LOGITS_AT_ONCE // vocab)
    for start in range(first, length, step):
        yield slice(start, min(start + step, length))


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
