"""Paired comparisons: p-values against scipy's, and what is said of them."""

import math

import numpy as np
import pytest
import torch

from brise.eval.bootstrap import draws
from brise.eval.compare import WindowSums, compare_sums, mcnemar, sign_flip


def sums(nll, kl=None, tokens=10):
    return WindowSums([tokens] * len(nll), list(nll), kl)


def test_the_sign_flip_test_against_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    generator = torch.Generator().manual_seed(0)
    for shift in (0.0, 0.4, 1.0):
        x = shift + torch.randn(12, generator=generator, dtype=torch.float64)
        theirs = stats.permutation_test(
            (x.numpy(),), lambda a, axis: a.mean(axis), permutation_type="samples", n_resamples=math.inf
        )
        assert sign_flip(x) == pytest.approx(theirs.pvalue, abs=1e-9)
    many = 0.2 + torch.randn(80, generator=generator, dtype=torch.float64)
    assert sign_flip(many) == pytest.approx(stats.ttest_1samp(many.numpy(), 0).pvalue, abs=0.01)


def test_of_many_pairs_the_pattern_seen_is_one_of_those_drawn():
    assert sign_flip(torch.ones(60, dtype=torch.float64)) == 1 / 100_001  # never zero


def test_the_interval_of_a_difference_against_resampling_by_hand():
    tokens = [10, 30, 20, 5]
    a, b = WindowSums(tokens, [11.0, 35, 19, 9], None), WindowSums(tokens, [10.0, 31, 22, 4], None)
    (found,) = compare_sums(a, b, seed=3)
    means = []
    for row in draws(4, seed=3).long().tolist():
        windows = [i for i, times in enumerate(row) for _ in range(times)]
        difference = sum(a.nll[i] - b.nll[i] for i in windows)
        means.append(difference / sum(tokens[i] for i in windows))
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found.difference.value, found.difference.low, found.difference.high) == pytest.approx(
        (7 / 65, low, high)
    )
    assert (found.a, found.b) == pytest.approx((74 / 65, 67 / 65))


def test_under_chance_alone_a_p_below_a_twentieth_comes_once_in_twenty():
    generator = torch.Generator().manual_seed(1)
    low = sum(sign_flip(torch.randn(10, generator=generator, dtype=torch.float64)) < 0.05 for _ in range(400))
    assert 8 <= low <= 32  # 20 +- 2.7 standard deviations


def test_what_is_said():
    a, b = (
        sums([10.0, 12, 11, 13, 12, 10, 11], kl=[1.0] * 7),
        sums([11.0, 13, 12, 14, 13, 11, 12], kl=[1.0] * 7),
    )
    ppl, kl = compare_sums(a, b)
    assert ppl.p == pytest.approx(2 / 2**7) and ppl.difference.value == pytest.approx(-0.1)
    assert ppl.in_words("nf4", "int4").startswith("nf4 is better than int4 in perplexity on these 7 windows")
    assert compare_sums(b, a)[0].in_words("int4", "nf4").startswith("nf4 is better than int4")
    assert kl.in_words().startswith("A and B are equal in KL") and kl.p == 1
    noise = compare_sums(sums([10.0, 12, 11]), sums([11.0, 11, 11.5]))[0]
    assert (
        noise.in_words().startswith("No difference in perplexity was shown") and len(noise.in_words()) < 200
    )
    assert "one window says nothing" in compare_sums(sums([10.0]), sums([11.0]))[0].in_words()
    assert f"perplexity {math.exp(79 / 70):.4g} against {math.exp(86 / 70):.4g};" in ppl.in_words()
    with pytest.raises(ValueError, match="the same windows"):
        compare_sums(a, sums([1.0, 2]))
    with pytest.raises(ValueError, match="the same windows"):  # as many, of other lengths
        compare_sums(sums([1.0, 2]), sums([1.0, 2], tokens=11))
    assert len(compare_sums(sums([1.0, 2]), sums([2.0, 2], kl=[1.0, 1]))) == 1


def test_mcnemar_against_scipys_binomial():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    a = {i: i < 60 for i in range(100)}
    b = {i: 8 <= i < 62 for i in range(100)}
    got = mcnemar("arc_easy", a, b)
    assert (got.both, got.only_a, got.only_b, got.neither) == (52, 8, 2, 38)
    assert got.p == pytest.approx(stats.binomtest(2, 10).pvalue)
    assert got.in_words("x", "y").startswith(
        "No difference in arc_easy was shown: x alone is right on 8 of 100"
    )
    many = mcnemar("t", {i: i < 1500 for i in range(3000)}, {i: i >= 1600 for i in range(3000)})
    assert many.p == pytest.approx(stats.binomtest(1400, 2900).pvalue, rel=1e-6)
    assert mcnemar("t", a, a).p == 1
    clear = mcnemar("t", dict.fromkeys(range(9), True), dict.fromkeys(range(9), False))
    assert clear.in_words("x", "y").startswith("x is better than y in t")
    for others in ({1: True}, {i + 1: True for i in range(100)}):
        with pytest.raises(ValueError, match="the same items"):
            mcnemar("t", a, others)
