"""Is A really better than B on these windows: paired tests, and what they say in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bootstrap import Interval, draws

# with so many pairs or fewer, every pattern of signs is tried; else so many are drawn
_EXACT, _DRAWN = 16, 100_000
LEVEL = 0.05


@dataclass(frozen=True)
class WindowSums:
    """Each window's scored tokens, and sums over them of negative log-likelihood and KL (None without a baseline)."""

    tokens: list[int]
    nll: list[float]
    kl: list[float] | None


@dataclass(frozen=True)
class Comparison:
    """A against B on the same windows, in one quantity where less is better.

    Attributes:
        what: ``perplexity`` or ``KL``.
        a, b: means a token; difference: a - b, with its bootstrap interval over windows.
        p: two-sided, of the sign-flip test; None with one window.
        windows: the pairs.
    """

    what: str
    a: float
    b: float
    difference: Interval
    p: float | None
    windows: int

    def in_words(self, a: str = "A", b: str = "B") -> str:
        """One sentence that says which is better, or that nothing of the kind was shown."""
        if self.what == "perplexity":
            size = f"perplexity {math.exp(self.a):.4g} against {math.exp(self.b):.4g}"
        else:
            size = f"{self.what} {self.a:.4g} against {self.b:.4g}"
        if self.difference.value == 0 and (self.p is None or self.p == 1):
            return f"{a} and {b} are equal in {self.what} on these {self.windows} windows ({size})."
        better, worse = (a, b) if self.difference.value < 0 else (b, a)
        if self.p is None:
            return f"{better} has the lower {self.what} ({size}), but one window says nothing of chance."
        if self.p < LEVEL:
            return (
                f"{better} is better than {worse} in {self.what} on these {self.windows} windows: {size}; were they "
                f"equal, chance would make such a difference or a larger one with p = {self.p:.2g}."
            )
        return (
            f"No difference in {self.what} was shown on these {self.windows} windows: {size}; chance alone makes such "
            f"a difference or a larger one with p = {self.p:.2g}."
        )


def compare_sums(a: WindowSums, b: WindowSums, seed: int = 0) -> list[Comparison]:
    """A against B in perplexity, and in KL where both have it.

    Raises:
        ValueError: the windows are not the same ones.
    """
    if a.tokens != b.tokens:
        raise ValueError(
            f"expected two measurements of the same windows, got {len(a.tokens)} windows of "
            f"{sum(a.tokens)} tokens and {len(b.tokens)} of {sum(b.tokens)}"
        )
    out = [_compare("perplexity", a.nll, b.nll, a.tokens, seed)]
    if a.kl is not None and b.kl is not None:
        out.append(_compare("KL", a.kl, b.kl, a.tokens, seed))
    return out


def _compare(
    what: str, a: Sequence[float], b: Sequence[float], tokens: Sequence[int], seed: int
) -> Comparison:
    size = torch.tensor(tokens, dtype=torch.float64)
    first, second = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
    difference = first - second
    n = len(size)
    value = float(difference.sum() / size.sum())
    interval = Interval(value)
    if n > 1:
        counts = draws(n, seed=seed).double()
        spread = (counts @ difference) / (counts @ size)
        low, high = torch.quantile(spread, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        interval = Interval(value, low, high)
    return Comparison(
        what,
        float(first.sum() / size.sum()),
        float(second.sum() / size.sum()),
        interval,
        sign_flip(difference, seed) if n > 1 else None,
        n,
    )


def sign_flip(differences: Tensor, seed: int = 0) -> float:
    """Two-sided p-value of paired differences, float64 [n]: were A and B equal, either sign would be as likely.

    The share of sign patterns whose sum is at least as far from zero as the one seen: all 2^n up to 16 pairs, else
    100,000 drawn ones, the one seen counted among them (Phipson and Smyth, 2010: never zero).
    """
    n = len(differences)
    seen = float(differences.sum().abs())
    slack = 1e-12 * float(differences.abs().sum())
    if n <= _EXACT:
        patterns = torch.arange(2**n)
        signs = 1.0 - 2.0 * ((patterns[:, None] >> torch.arange(n)) & 1).double()
        return float(((signs @ differences).abs() >= seen - slack).double().mean())
    generator = torch.Generator().manual_seed(seed)
    extreme = 0
    for _ in range(10):
        signs = 1.0 - 2.0 * torch.randint(2, (_DRAWN // 10, n), generator=generator).double()
        extreme += int(((signs @ differences).abs() >= seen - slack).sum())
    return (extreme + 1) / (_DRAWN + 1)


@dataclass(frozen=True)
class McNemar:
    """Two models on the same items: how many only one of them got right, and the exact two-sided p-value.

    McNemar, "Note on the sampling error of the difference between correlated proportions", 1947; the exact test is
    the binomial one on the items where they differ.
    """

    task: str
    items: int
    both: int
    only_a: int
    only_b: int
    neither: int
    p: float

    def in_words(self, a: str = "A", b: str = "B") -> str:
        count = f"{a} alone is right on {self.only_a} of {self.items} items, {b} alone on {self.only_b}"
        if self.p < LEVEL:
            better, worse = (a, b) if self.only_a > self.only_b else (b, a)
            return f"{better} is better than {worse} in {self.task}: {count} (p = {self.p:.2g})."
        return f"No difference in {self.task} was shown: {count} (p = {self.p:.2g})."


def mcnemar(task: str, a: Mapping[Any, bool], b: Mapping[Any, bool]) -> McNemar:
    """From whether each item, by its id, was answered rightly.

    Raises:
        ValueError: the items are not the same ones.
    """
    if a.keys() != b.keys():
        raise ValueError(f"{task}: expected the same items of both, got {len(a)} and {len(b)}")
    both = sum(a[i] and b[i] for i in a)
    only_a = sum(a[i] and not b[i] for i in a)
    only_b = sum(b[i] and not a[i] for i in a)
    n, k = only_a + only_b, min(only_a, only_b)
    # whole numbers until the end: 2^n is beyond a float from 1024 on
    p = min(1.0, 2 * (sum(math.comb(n, i) for i in range(k + 1)) / 2**n)) if n else 1.0
    return McNemar(task, len(a), both, only_a, only_b, len(a) - both - n, p)
