"""Confidence intervals by resampling windows, for figures that have no formula: quantiles, and means beside them.

A resample draws as many windows as there are, with replacement (Efron, "Bootstrap methods: another look at the
jackknife", 1979; the window is the unit because the tokens of one share a passage), and the interval is that of
the percentiles 2.5 and 97.5 over the resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 1000
# weights of tokens held at once: 2^24 of float32, 64 MB
_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% confidence interval; the ends are None where there is one window only."""

    value: float
    low: float | None = None
    high: float | None = None


def draws(windows: int, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """How often each window is drawn in each resample, fp32 [resamples, windows]; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(windows, (resamples, windows), generator=generator)
    return torch.zeros(resamples, windows).scatter_add_(1, chosen, torch.ones(resamples, windows))


def mean_interval(values: Tensor, window: Tensor, counts: Tensor) -> Interval:
    """Of the mean of ``values`` [T], token t being of window ``window[t]``, under ``counts`` of :func:`draws`."""
    n = counts.shape[1]
    sums = torch.zeros(n, dtype=torch.float64).index_add_(0, window, values.double())
    sizes = torch.bincount(window, minlength=n).double()
    return _interval(float(sums.sum() / sizes.sum()), (counts.double() @ sums) / (counts.double() @ sizes), n)


def quantile_intervals(
    values: Tensor, window: Tensor, counts: Tensor, levels: tuple[float, ...]
) -> list[Interval]:
    """Of quantiles of ``values`` [T]: at level q the smallest value that at least the share q does not exceed."""
    n = counts.shape[1]
    ordered, order = values.double().sort()
    where = window[order]
    shares = torch.tensor(levels, dtype=torch.float64)
    own = _quantiles(ordered, torch.ones(1, len(ordered)), shares)[0]
    found = []
    step = max(1, _AT_ONCE // max(1, len(ordered)))
    for start in range(0, len(counts), step):
        found.append(_quantiles(ordered, counts[start : start + step][:, where], shares))
    resampled = torch.cat(found)
    return [_interval(float(own[i]), resampled[:, i], n) for i in range(len(levels))]


def _quantiles(ordered: Tensor, weights: Tensor, shares: Tensor) -> Tensor:
    """[B, Q] from sorted values [T] with whole-number weights [B, T]."""
    # in float64: whole numbers stay exact, so that ties at a share fall alike in every resample
    total = weights.double().cumsum(1)
    wanted = (shares[None] * total[:, -1:] - 1e-9).clamp(min=0.5)
    return ordered[torch.searchsorted(total, wanted).clamp(max=len(ordered) - 1)]


def _interval(value: float, resampled: Tensor, windows: int) -> Interval:
    if windows < 2:
        return Interval(value)
    low, high = torch.quantile(resampled.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high)
