"""Means over tokens with standard errors over windows.

The tokens of a window are not independent: they share a passage. So the window is the sampling unit, and
every standard error here is that of a ratio of sums over windows, the Taylor-linearised ("cluster") variance
(Cochran, Sampling Techniques, 3rd ed., section 2.11 and chapter 6): with S_i the sum and T_i the number of
tokens of window i, and m = sum S / sum T,

    se(m)^2 = n / (n - 1) * sum_i (S_i - m T_i)^2 / (sum_i T_i)^2.

With equal T_i this is the plain standard error of the windows' means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error; the error is None where there is one window only."""

    value: float
    stderr: float | None


def mean_per_token(sums: Tensor, tokens: Tensor) -> Estimate:
    """Mean over tokens from the windows' sums, float64 [n], and numbers of tokens, int64 [n]."""
    sums, counts = sums.double(), tokens.double()
    n = len(sums)
    mean = float(sums.sum() / counts.sum())
    if n < 2:
        return Estimate(mean, None)
    residual = sums - mean * counts
    variance = n / (n - 1) * float((residual**2).sum()) / float(counts.sum()) ** 2
    return Estimate(mean, math.sqrt(variance))


def exp_of(estimate: Estimate, minus: float = 0.0) -> Estimate:
    """exp(x) - ``minus``; its standard error is exp(x) se(x), the delta method's first order."""
    try:
        value = math.exp(estimate.value)
    except OverflowError:
        value = math.inf
    return Estimate(value - minus, None if estimate.stderr is None else value * estimate.stderr)
