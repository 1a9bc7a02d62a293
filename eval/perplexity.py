"""Perplexity: exp of the mean negative log-likelihood of a token, with its standard error over windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import exp_of, mean_per_token


class NonFiniteError(ArithmeticError):
    """Some scored tokens have a log-likelihood that is infinite or no number."""


@dataclass(frozen=True)
class Perplexity:
    """Token perplexity (nats inside): not comparable between models with different tokenizers.

    Attributes:
        value, stderr: exp(nll) and exp(nll) * nll_stderr.
        nll, nll_stderr: mean over the scored tokens, and its standard error with the window as sampling unit.
        tokens, windows: how many were scored.
    """

    value: float
    stderr: float | None
    nll: float
    nll_stderr: float | None
    tokens: int
    windows: int


@dataclass(frozen=True)
class Relative:
    """Perplexity over the baseline's, minus one (0.2 is 20% worse), paired over the same windows.

    The windows' difficulty is common to both models and cancels in the difference of their log-likelihoods,
    so this standard error is far smaller than the perplexities' own.
    """

    value: float
    stderr: float | None


@dataclass(frozen=True)
class WordPerplexity:
    """Perplexity by the word and by the byte of documents: comparable between models with different tokenizers.

    Attributes:
        value, stderr: exp(nll of all tokens / words), with the document as sampling unit.
        byte_value: exp(nll / bytes). bits_per_byte: log2 of it.
        words, bytes, documents: how many there are.
    """

    value: float
    stderr: float | None
    byte_value: float
    bits_per_byte: float
    words: int
    bytes: int
    documents: int


def word_perplexity(nll: Tensor, documents: Tensor, words: Tensor, size: Tensor) -> WordPerplexity:
    """From the windows' sums float64 [n], the document of each int64 [n], and words and bytes of each document [d]."""
    sums = torch.zeros(len(words), dtype=torch.float64).index_add_(0, documents, nll.double())
    value = exp_of(mean_per_token(sums, words))
    by_byte = mean_per_token(sums, size).value
    return WordPerplexity(
        value.value,
        value.stderr,
        math.exp(by_byte),
        by_byte / math.log(2),
        int(words.sum()),
        int(size.sum()),
        len(words),
    )


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, fp32 [T], from logits [T, V] and int64 targets [T]."""
    logits = logits.float()
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets[:, None]).squeeze(-1)


def perplexity(nll: Tensor, tokens: Tensor) -> Perplexity:
    """From the windows' sums of negative log-likelihoods, float64 [n], and their scored tokens, int64 [n]."""
    mean = mean_per_token(nll, tokens)
    value = exp_of(mean)
    return Perplexity(value.value, value.stderr, mean.value, mean.stderr, int(tokens.sum()), len(tokens))


def relative_perplexity(nll: Tensor, baseline_nll: Tensor, tokens: Tensor) -> Relative:
    """Of a model over its baseline on the same windows: sums as in :func:`perplexity`."""
    ratio = exp_of(mean_per_token(nll.double() - baseline_nll.double(), tokens), minus=1.0)
    return Relative(ratio.value, ratio.stderr)
