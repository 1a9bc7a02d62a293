"""Refinement: scales against numpy's least squares, codes against all others, and never a worse row."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brise.quant.config import QuantSpec
from brise.quant.formats import FORMATS
from brise.quant.gptq import GPTQOptions, gptq
from brise.quant.refine import descend, fit_scales, refine
from brise.quant.rtn import rtn
from brise.quant.scales import stored_params
from brise.quant.tensor import Params

from .gptq_twin import damped, grid_of
from .twins import U32, random_problem, row_objective, unit_grid

GRIDS = [(name, True) for name in FORMATS] + [(name, False) for name in FORMATS if name.startswith("int")]
IDS = [name + ("" if symmetric else "-asym") for name, symmetric in GRIDS]


def start(format: str, symmetric: bool = True, seed: int = 0, rows: int = 6, width: int = 48, **kw):
    """A rounded weight with its exact parameters, and a damped Hessian: float32 both."""
    w, hessian = random_problem(rows, width, seed)
    spec = QuantSpec(format=format, group_size=16, symmetric=symmetric, **{"scale_dtype": "float32", **kw})
    q = rtn(w, spec)
    h = torch.from_numpy(damped(hessian.double().numpy(), 0.01)).float()
    return w, spec, q.codes(), q.params(), h


def values_of(spec: QuantSpec, codes: torch.Tensor, params: Params, group_of: np.ndarray) -> np.ndarray:
    """Decoded weights, float64 [N, K], by the twin's grid."""
    out = np.zeros(tuple(codes.shape))
    for k, g in enumerate(group_of):
        zero = None if params.zero is None else params.zero[:, g].numpy()
        grid = grid_of(spec, params.scale[:, g].double().numpy(), zero)
        out[:, k] = grid[np.arange(len(out)), codes[:, k].numpy()]
    return out


def unit_values(spec: QuantSpec, codes: torch.Tensor, params: Params, group_of: np.ndarray) -> np.ndarray:
    """[N, G, K]: the unscaled value of a channel in the row of its own group, zero in the others."""
    rows, width = codes.shape
    out = np.zeros((rows, params.scale.shape[1], width))
    for n in range(rows):
        for k, g in enumerate(group_of):
            zero = None if params.zero is None else int(params.zero[n, g])
            out[n, g, k] = unit_grid(spec, zero)[int(codes[n, k])]
    return out


def float32_noise(w: np.ndarray, q: np.ndarray, h: np.ndarray) -> np.ndarray:
    """How far float32 can be from the objective of a row: [N].

    The error e = w - q carries a rounding of q and one of its own; e^T H e is twice a sum of K products.
    """
    error, magnitude = np.abs(w - q), np.abs(w) + 2 * np.abs(q)
    weighed = error @ np.abs(h)
    return 2 * U32 * ((weighed * magnitude).sum(axis=1) + (w.shape[1] + 1) * (weighed * error).sum(axis=1))


@pytest.mark.parametrize("scattered", [False, True], ids=["neighbours", "g_idx"])
@pytest.mark.parametrize(("format", "symmetric"), GRIDS, ids=IDS)
def test_scales_are_the_least_squares_solution(format, symmetric, scattered):
    w, spec, codes, params, h = start(format, symmetric, seed=1)
    group_of = np.arange(48) // 16
    if scattered:
        group_of = np.random.default_rng(0).permutation(group_of)
        params = dataclasses.replace(params, g_idx=torch.from_numpy(group_of.astype(np.int32)))
    fitted = fit_scales(w, spec, codes, params, h).double().numpy()
    c = unit_values(spec, codes, params, group_of)
    root = np.linalg.cholesky(h.double().numpy()).T  # h = root^T root
    exact_h = root.T @ root
    for n in range(len(w)):
        a, b = root @ c[n].T, root @ w[n].double().numpy()
        best, *_ = np.linalg.lstsq(a, b, rcond=None)
        # the library adds a ridge of 1e-6 of the mean diagonal towards the present scale: more rows
        ridge = 1e-6 * (a.T @ a).diagonal().mean()
        a_ridge = np.vstack([a, np.sqrt(ridge) * np.eye(3)])
        expected, *_ = np.linalg.lstsq(
            a_ridge, np.concatenate([b, np.sqrt(ridge) * params.scale[n].double().numpy()]), rcond=None
        )
        # the normal equations are summed in float32 over K * K products before they are solved in float64
        normal = a_ridge.T @ a_ridge
        off = 2 * 48 * U32 * np.abs(c[n]) @ np.abs(exact_h) @ (np.abs(c[n].T) @ np.abs(expected))
        off += 2 * 48 * U32 * np.abs(c[n]) @ np.abs(exact_h) @ np.abs(w[n].double().numpy())
        allowed = np.abs(np.linalg.inv(normal)) @ off + U32 * np.abs(expected)
        assert (np.abs(fitted[n] - expected) <= 2 * allowed).all()
        assert np.abs(fitted[n] - expected).max() < 1e-3 * np.abs(expected).max()  # the bound says something

        def loss(scale, n=n):
            error = w[n].double().numpy() - scale @ c[n]
            return error @ exact_h @ error

        assert loss(fitted[n]) <= loss(best) * (1 + 1e-4)
        assert loss(fitted[n]) <= loss(params.scale[n].double().numpy())


def test_a_group_of_zero_codes_keeps_its_scale():
    w, spec, codes, params, h = start("int4", seed=2)
    codes = codes.clone()
    codes[:, 16:32] = 8
    fitted = fit_scales(w, spec, codes, params, h)
    torch.testing.assert_close(fitted[:, 1], params.scale[:, 1], rtol=1e-5, atol=0)
    assert not torch.allclose(fitted[:, 0], params.scale[:, 0], rtol=1e-3, atol=0)
    everything = fit_scales(w, spec, torch.full_like(codes, 8), params, h)
    torch.testing.assert_close(everything, params.scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("width", [16, 48, 80])
@pytest.mark.parametrize(("format", "symmetric"), GRIDS, ids=IDS)
def test_descent_takes_the_best_of_all_codes(format, symmetric, width):
    w, spec, codes, params, h = start(format, symmetric, seed=3, width=width)
    assert_best_codes(w, spec, codes, params, h, descend(w, spec, codes, params, h))


def assert_best_codes(w, spec, codes, params, h, got) -> None:
    """One channel after another: with all others held, no code gives a lower objective than the chosen one.

    As in the GPTQ twin, each decision is judged after the library's own earlier ones. The channel's objective
    is H_kk (v - t)^2 + const: a code may win by as much as float32 can be wrong about t = q_k + r_k / H_kk.
    """
    group_of = np.arange(w.shape[1]) // 16
    exact_w, exact_h = w.double().numpy(), h.double().numpy()
    q = values_of(spec, codes, params, group_of)
    goal = values_of(spec, got, params, group_of)
    changed = 0
    for k in range(w.shape[1]):
        g = group_of[k]
        grid = grid_of(
            spec,
            params.scale[:, g].double().numpy(),
            None if params.zero is None else params.zero[:, g].numpy(),
        )
        candidates = np.repeat(q[:, None], grid.shape[1], axis=1)  # [N, 2^b, K]
        candidates[:, :, k] = grid
        losses = row_objective(exact_w[:, None] - candidates, exact_h)
        target = q[:, k] + (exact_w - q) @ exact_h[k] / exact_h[k, k]
        best = grid[np.arange(len(q)), losses.argmin(axis=1)]
        assert (np.abs(best - target) <= np.abs(grid - target[:, None]).min(axis=1) + 1e-12).all()
        # r_k is a sum over K channels, brought up to date up to K times, of terms of this size in all
        size = (np.abs(exact_w) + np.abs(q) + np.abs(goal)) @ np.abs(exact_h[k]) / exact_h[k, k]
        slack = (2 * w.shape[1] + 8) * U32 * (size + np.abs(q[:, k]) + np.abs(grid).max(axis=1))
        excess = np.abs(goal[:, k] - target) - np.abs(best - target)
        assert (excess <= 2 * slack).all(), f"channel {k} has a better code"
        changed += int((goal[:, k] != q[:, k]).sum())
        q[:, k] = goal[:, k]
    assert changed >= 3  # else nothing was put to a test


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize(("format", "symmetric"), GRIDS, ids=IDS)
def test_no_row_ever_gets_worse(format, symmetric, scale_dtype, double_quant):
    w, spec, codes, params, h = start(
        format, symmetric, seed=4, rows=24, scale_dtype=scale_dtype, double_quant=double_quant
    )
    group_of = np.arange(48) // 16
    exact_w, exact_h = w.double().numpy(), h.double().numpy()
    before_values = values_of(spec, codes, stored_params(params, spec), group_of)
    before = row_objective(exact_w - before_values, exact_h)
    improved = 0
    for rounds in (1, 2, 4):
        new_codes, exact = refine(w, spec, codes, params, h, rounds)
        after_values = values_of(spec, new_codes, stored_params(exact, spec), group_of)
        after = row_objective(exact_w - after_values, exact_h)
        noise = float32_noise(exact_w, before_values, exact_h) + float32_noise(exact_w, after_values, exact_h)
        if double_quant:  # rows share blocks of scales: the sum is what never gets worse
            assert after.sum() <= before.sum() + noise.sum()
        else:
            assert (after <= before + noise).all()
        improved += int((after < before * 0.99).sum())
    assert improved >= 24


@given(seed=st.integers(0, 2**32 - 1), grid=st.sampled_from(GRIDS), zeros=st.booleans())
@settings(max_examples=25)
def test_no_row_ever_gets_worse_whatever_the_weight(seed, grid, zeros):
    w, spec, codes, params, h = start(grid[0], grid[1], seed=seed, rows=4, scale_dtype="float16")
    if zeros:
        w[0] = 0
        w[1, 16:32] = 0
        q = rtn(w, spec)
        codes, params = q.codes(), q.params()
    group_of = np.arange(48) // 16
    exact_w, exact_h = w.double().numpy(), h.double().numpy()
    old = values_of(spec, codes, params, group_of)
    new_codes, exact = refine(w, spec, codes, params, h, 2)
    values = values_of(spec, new_codes, stored_params(exact, spec), group_of)
    noise = float32_noise(exact_w, old, exact_h) + float32_noise(exact_w, values, exact_h)
    before, after = (row_objective(exact_w - v, exact_h) for v in (old, values))
    assert (after <= before + noise).all()
    assert bool(torch.isfinite(exact.scale).all())
    if zeros:
        assert (values[0] == 0).all()


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_gptq_with_refits_is_never_worse_than_without(format, static):
    w, hessian = random_problem(16, 48, seed=5)
    h = damped(hessian.double().numpy(), 0.01)
    losses, noises = [], []
    for refits in (0, 1, 3):
        options = GPTQOptions(refits=refits, static_groups=static)
        spec = QuantSpec(format=format, algorithm="gptq", group_size=16, options=options)
        q = gptq(w, spec, hessian)
        values = q.dequantize().double().numpy()
        losses.append(row_objective(w.double().numpy() - values, h))
        noises.append(float32_noise(w.double().numpy(), values, h))
    for i in (0, 1):
        assert (losses[i + 1] <= losses[i] + noises[i] + noises[i + 1]).all()
    assert losses[1].sum() < 0.97 * losses[0].sum()
