"""Hessians gathered in chunks, and the weight matched to the full model's activations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brise.quant.calibrate import HessianAccumulator, matched_products, matched_weight

from .twins import U32


@given(
    width=st.integers(1, 20),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_hessian_is_the_sum_over_all_tokens(width, chunks, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(2, n, width, generator=generator).to(dtype) for n in chunks]
    fulls = [(x.float() + 0.1 * torch.randn(x.shape, generator=generator)).to(dtype) for x in xs]
    plain, crossed = HessianAccumulator(width), HessianAccumulator(width, cross=True)
    for x, full in zip(xs, fulls, strict=True):
        plain.add(x)
        crossed.add(x, full)
    every = torch.cat([x.reshape(-1, width) for x in xs]).double()
    full = torch.cat([x.reshape(-1, width) for x in fulls]).double()
    assert plain.tokens == crossed.tokens == len(every) == 2 * sum(chunks)
    assert plain.cross is None and crossed.cross is not None
    for got, expected, size in (
        (plain.hessian, every.T @ every, every.abs().T @ every.abs()),
        (crossed.hessian, every.T @ every, every.abs().T @ every.abs()),
        (crossed.cross, full.T @ every, full.abs().T @ every.abs()),
    ):
        assert got.dtype == torch.float32
        assert bool(((got.double() - expected).abs() <= (len(every) + 4) * U32 * size).all())
    for accumulator in (plain, crossed):
        assert torch.equal(accumulator.hessian, accumulator.hessian.t())


def test_hessian_errors():
    accumulator = HessianAccumulator(8)
    with pytest.raises(ValueError, match=r"expected inputs \[\.\.\., 8\], got \[3, 7\]"):
        accumulator.add(torch.randn(3, 7))
    with pytest.raises(ValueError, match="if and only if"):
        accumulator.add(torch.randn(3, 8), torch.randn(3, 8))
    with pytest.raises(ValueError, match="if and only if"):
        HessianAccumulator(8, cross=True).add(torch.randn(3, 8))
    with pytest.raises(ValueError, match="expected inputs"):
        HessianAccumulator(8, cross=True).add(torch.randn(3, 8), torch.randn(4, 8))
    assert accumulator.tokens == 0


def test_matched_weight_is_the_least_squares_solution():
    """||W X_full^T - V X^T||^2 + a ||V - W||^2 by numpy: the ridge as K more rows."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 12, generator=generator)
    x = torch.randn(100, 12, generator=generator)
    full = x + 0.2 * torch.randn(100, 12, generator=generator)
    accumulator = HessianAccumulator(12, cross=True)
    accumulator.add(x, full)
    hessian, cross = accumulator.hessian, accumulator.cross
    assert cross is not None
    before = hessian.clone()
    got = matched_weight(matched_products(w, hessian, cross, damp=0.01), hessian, damp=0.01)
    assert torch.equal(hessian, before)
    ridge = 0.01 * float((x.double() ** 2).sum(0).mean())
    rows = np.vstack([x.double().numpy(), np.sqrt(ridge) * np.eye(12)])
    goal = np.vstack([full.double().numpy() @ w.double().numpy().T, np.sqrt(ridge) * w.double().numpy().T])
    expected, *_ = np.linalg.lstsq(rows, goal, rcond=None)
    np.testing.assert_allclose(got.numpy(), expected.T, atol=2e-5)  # X^T X is a float32 sum of 100 products
    assert (got - w).abs().max() > 0.01  # it does something
    same = HessianAccumulator(12, cross=True)
    same.add(x, x)
    assert same.cross is not None
    again = matched_weight(matched_products(w, same.hessian, same.cross, 0.01), same.hessian, 0.01)
    torch.testing.assert_close(again, w, rtol=0, atol=2e-5)
