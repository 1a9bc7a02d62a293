"""How far a model's predictions are from its baseline's: KL in mean and tail, agreement, the true token's share.

Perplexity looks at one probability a token and lets better and worse ones cancel; the divergence looks at the
whole distribution and is zero only where nothing changed. Its tail says what the mean hides: a model that is
right on 999 tokens and lost on one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .bootstrap import RESAMPLES, Interval, draws, mean_interval, quantile_intervals
from .statistics import mean_per_token

LEVELS = (0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class Details:
    """Over the scored tokens, each with a bootstrap interval over windows (:mod:`.bootstrap`).

    Attributes:
        mean, median, p90, p99, p999: of KL(baseline || model) in nats.
        top1: share of tokens where both find the same one likeliest.
        top5: share of the baseline's five likeliest tokens that are among the model's five.
        true_token: mean of p_model - p_baseline of the token that is really there.
        true_token_rms: root of the mean of its square: the changes that cancel in the mean.
        resamples: of the bootstrap.
    """

    mean: Interval
    median: Interval
    p90: Interval
    p99: Interval
    p999: Interval
    top1: Interval
    top5: Interval
    true_token: Interval
    true_token_rms: Interval
    resamples: int


@dataclass(frozen=True)
class Divergence:
    """Over the scored tokens, standard errors with the window as sampling unit.

    Attributes:
        kl, kl_stderr: mean of KL(baseline || model), in nats a token.
        top1, top1_stderr: share of tokens where both find the same one likeliest.
        details: the distribution; None in rows of before it was measured.
    """

    kl: float
    kl_stderr: float | None
    top1: float
    top1_stderr: float | None
    details: Details | None = None


@dataclass(frozen=True)
class TokenFigures:
    """Of every scored token, in order: the window it is of, int64 [T]; the rest fp32 [T], see :class:`Details`."""

    window: Tensor
    kl: Tensor
    same: Tensor
    top5: Tensor
    change: Tensor


def token_kl(baseline_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(baseline || model) at each position, fp32 [T], from logits [T, V]: sum_v p_v (log p_v - log q_v)."""
    log_p = F.log_softmax(baseline_logits.float(), dim=-1)
    log_q = F.log_softmax(logits.float(), dim=-1)
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q)


def same_first_choice(baseline_logits: Tensor, logits: Tensor) -> Tensor:
    """Whether the likeliest token is the same, bool [T], from logits [T, V]; of equals the lowest id."""
    return baseline_logits.argmax(dim=-1) == logits.argmax(dim=-1)


def shared_of_five(baseline_logits: Tensor, logits: Tensor) -> Tensor:
    """Share of the baseline's five likeliest tokens among the model's five, fp32 [T], from logits [T, V]."""
    k = min(5, logits.shape[-1])
    theirs, ours = baseline_logits.topk(k, dim=-1).indices, logits.topk(k, dim=-1).indices
    return (theirs[:, :, None] == ours[:, None, :]).any(-1).float().mean(-1)


def divergence(
    kl: Tensor, agree: Tensor, tokens: Tensor, figures: TokenFigures | None = None, seed: int = 0
) -> Divergence:
    """From the windows' sums of KL and of agreements, float64 [n], and their scored tokens, int64 [n]."""
    mean_kl, mean_agree = mean_per_token(kl, tokens), mean_per_token(agree, tokens)
    details = None if figures is None else describe(figures, len(tokens), seed)
    return Divergence(mean_kl.value, mean_kl.stderr, mean_agree.value, mean_agree.stderr, details)


def describe(figures: TokenFigures, windows: int, seed: int = 0, resamples: int = RESAMPLES) -> Details:
    """The distribution over the tokens of ``windows`` windows."""
    counts = draws(windows, resamples, seed)
    where = figures.window
    square = mean_interval(figures.change.double() ** 2, where, counts)
    rms = Interval(*(None if v is None else v**0.5 for v in (square.value, square.low, square.high)))  # type: ignore[arg-type]
    median, p90, p99, p999 = quantile_intervals(figures.kl, where, counts, LEVELS)
    return Details(
        mean=mean_interval(figures.kl, where, counts),
        median=median,
        p90=p90,
        p99=p99,
        p999=p999,
        top1=mean_interval(figures.same, where, counts),
        top5=mean_interval(figures.top5, where, counts),
        true_token=mean_interval(figures.change, where, counts),
        true_token_rms=rms,
        resamples=resamples,
    )
