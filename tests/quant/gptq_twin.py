"""GPTQ as its derivation reads (arXiv:2210.17323, section 3, equations 2 and 3), in float64.

One column after another: the inverse of the damped Hessian is formed outright, and after each column that
column is eliminated from it by the rank-one formula. No Cholesky factor, no blocks, no permuted matrices: an
order is a list of columns.

The twin can be run free, or follow given codes: then it works out, for every column, the value that ought to
be rounded after the codes chosen before it. So each decision is judged alone, and one tie that float32 takes
the other way does not hide or excuse what comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from brise.quant.config import QuantSpec
from brise.quant.tensor import QuantizedTensor

from .twins import U32, extremes_to_scale, row_objective, stored, unit_grid


@dataclass
class Trace:
    """What one run of the twin decided. All in the original order of the columns, float64.

    ``slack`` [N, K]: how far float32 may be from ``target``, and a little for the rounding itself.
    ``margin`` [N]: the least distance of a value of the row to the border of another code, over its slack.
    """

    codes: np.ndarray
    target: np.ndarray
    values: np.ndarray
    slack: np.ndarray
    margin: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    group_of: np.ndarray


def damped(hessian: np.ndarray, damp: float) -> np.ndarray:
    """Dead columns get the mean of the live diagonal; then every column gets ``damp`` times that mean."""
    h = hessian.copy()
    live = np.diag(h) > 0
    mean = np.diag(h)[live].mean() if live.any() else 1.0
    for k in range(len(h)):
        if not live[k]:
            h[k, k] = mean
        h[k, k] += damp * mean
    return h


def grid_of(spec: QuantSpec, scale: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    """The values that a weight of every row can take, float64 [N, 2^b]."""
    if spec.symmetric or zero is None:
        return scale[:, None] * unit_grid(spec)
    return scale[:, None] * (unit_grid(spec, 0) - zero[:, None])


def run(
    w: Tensor,
    spec: QuantSpec,
    hessian: Tensor,
    damp: float | None = None,
    scales: tuple[np.ndarray, np.ndarray | None] | None = None,
    follow: np.ndarray | None = None,
) -> Trace:
    """Quantize [N, K]. ``scales`` (scale [N, G], zero [N, G] or None) replaces the choice of scales;
    ``follow`` [N, K] replaces the choice of codes. ``damp`` replaces the option of that name."""
    options = spec.options
    weight = w.to(torch.float32).double().numpy()
    rows, width = weight.shape
    size = spec.group_size or width
    diagonal = hessian.diagonal().tolist()
    order = list(range(width))
    if options.act_order:
        order.sort(key=lambda k: -diagonal[k])  # stable: equal columns stay in their order
    inverse = np.linalg.inv(damped(hessian.double().numpy(), options.damp if damp is None else damp))

    static = options.static_groups or size == width
    group_of = np.array([(k if static else order.index(k)) // size for k in range(width)])
    scale = np.full((rows, width // size), np.nan)
    zero = np.zeros((rows, width // size), dtype=np.int64)
    if scales is not None:
        scale = scales[0].astype(np.float64)
        zero = zero if scales[1] is None else scales[1].astype(np.int64)

    work = weight.copy()
    codes = np.zeros((rows, width), dtype=np.int64)
    values, target = np.zeros_like(weight), np.zeros_like(weight)
    magnitude = np.abs(weight)  # |w| + all that was ever added to a column, for the error bound
    spread = np.zeros((width, width))  # how much of a column's error goes to which later one
    gap = np.zeros_like(weight)  # distance of the second nearest value less that of the nearest
    reach = np.zeros_like(weight)
    todo = order.copy()
    while todo:
        k = todo.pop(0)
        g = group_of[k]
        if scales is None and np.isnan(scale[0, g]):
            members = [j for j in order if group_of[j] == g]
            source = weight if static else work
            for n in range(rows):
                exact, z = extremes_to_scale([float(np.float32(x)) for x in source[n, members]], spec)
                scale[n, g] = stored(exact, spec)
                zero[n, g] = 0 if z is None else z
        target[:, k] = work[:, k]
        grid = grid_of(spec, scale[:, g], zero[:, g])
        distance = np.abs(work[:, k, None] - grid)
        nearest = distance.argmin(axis=1)
        codes[:, k] = nearest if follow is None else follow[:, k]
        values[:, k] = grid[np.arange(rows), codes[:, k]]
        # codes of one value (a scale of zero, the two zeros of fp4) are no rivals
        same = grid == grid[np.arange(rows), nearest][:, None]
        gap[:, k] = np.where(same, np.inf, distance).min(axis=1) - distance.min(axis=1)
        reach[:, k] = np.abs(grid).max(axis=1)
        error = (work[:, k] - values[:, k]) / inverse[k, k]
        taken_up = np.outer(error, inverse[k, todo])
        work[:, todo] -= taken_up
        magnitude[:, todo] += np.abs(taken_up)
        spread[k, todo] = inverse[k, todo] / inverse[k, k]
        inverse = inverse - np.outer(inverse[:, k], inverse[k, :]) / inverse[k, k]

    slack = float32_slack(order, spread, magnitude, np.abs(target), reach)
    margin = (gap / (2 * slack)).min(axis=1)
    return Trace(codes, target, values, slack, margin, scale, None if spec.symmetric else zero, group_of)


def float32_slack(
    order: list[int], spread: np.ndarray, magnitude: np.ndarray, target: np.ndarray, reach: np.ndarray
) -> np.ndarray:
    """How far the float32 algorithm may be from the exact target of each column, given the codes before it.

    The value of the i-th column in order is a sum of i + 1 terms, each with a factor and an error that are
    float32 numbers: at most i + 6 roundings, each of at most U32 times ``magnitude`` (the running sum of the
    magnitudes). What is wrong in one column goes on to the later ones with the weights of ``spread``:
    d_j = r_j - sum_i spread_ij d_i, so |d| <= |(I + spread^T)^-1| r. Then the value is compared with the
    grid, which takes a reciprocal or a quotient, a product, and a grid value: 4 roundings.
    """
    p = np.array(order)
    local = (np.arange(len(p)) + 6) * U32 * magnitude[:, p]
    through = np.abs(np.linalg.inv(np.eye(len(p)) + spread[np.ix_(p, p)].T))
    total = np.empty_like(magnitude)
    total[:, p] = local @ through.T
    return total + 4 * U32 * np.maximum(target, reach)


def check(w: Tensor, spec: QuantSpec, hessian: Tensor, q: QuantizedTensor, **options) -> Trace:
    """Assert that ``q`` is what GPTQ gives: scales, every single decision, all codes of rows without ties.

    ``options`` go to :func:`run`. Returns the trace of the free run.
    """
    codes = q.codes().numpy().astype(np.int64)
    params = q.params()
    scale = params.scale.double().numpy()
    zero = None if params.zero is None else params.zero.numpy().astype(np.int64)
    static = spec.options.static_groups or scale.shape[1] == 1
    free = run(w, spec, hessian, **options)

    if params.g_idx is not None:
        np.testing.assert_array_equal(params.g_idx.numpy(), free.group_of, err_msg="groups of the channels")
    if static:
        np.testing.assert_array_equal(scale, free.scale, err_msg="scales")
        if zero is not None:
            np.testing.assert_array_equal(zero, free.zero, err_msg="zero points")
    else:
        check_moving_scales(w, spec, hessian, codes, scale, zero, **options)

    guided = run(w, spec, hessian, **{**options, "scales": (scale, zero), "follow": codes})
    best = np.empty_like(guided.target)
    for k, g in enumerate(guided.group_of):
        grid = grid_of(spec, scale[:, g], None if zero is None else zero[:, g])
        best[:, k] = np.abs(guided.target[:, k, None] - grid).min(axis=1)
    excess = np.abs(guided.target - guided.values) - best
    wrong = excess > 2 * guided.slack
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} codes are not the nearest to what GPTQ rounds there"
    )

    # a row none of whose values came near a border has no choice: equal to the last code
    sure = free.margin > 1
    if static:
        assert sure.mean() >= 0.75, (
            f"only {sure.sum()} of {len(sure)} rows are free of ties: choose another seed"
        )
        same_value = free.values[sure] == guided.values[sure]
        assert same_value.all(), f"{(~same_value).sum()} codes differ in rows without ties"
        h = hessian.double().numpy()
        error = w.double().numpy() - free.values
        got = row_objective(w.double().numpy() - q.dequantize(torch.float32).double().numpy(), h)
        # dequantization rounds each value q once, by at most U32 |q|: first order of the quadratic form
        allowed = 2.01 * U32 * ((np.abs(error) @ np.abs(h)) * np.abs(free.values)).sum(axis=1)
        difference = np.abs(got - row_objective(error, h))[sure]
        assert (difference <= allowed[sure]).all(), f"the objective is off by {difference.max():g}"
    return free


def check_moving_scales(
    w: Tensor,
    spec: QuantSpec,
    hessian: Tensor,
    codes: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    **options,
) -> None:
    """Each group's scale is that of the weights as they are when its first channel is reached."""
    given = {**options, "scales": (scale, zero), "follow": codes}
    guided = run(w, spec, hessian, **given)
    order = list(range(codes.shape[1]))
    if spec.options.act_order:
        diagonal = hessian.diagonal().tolist()
        order.sort(key=lambda k: -diagonal[k])
    size = spec.group_size
    assert size is not None
    for g in range(scale.shape[1]):
        members = [k for k in order if guided.group_of[k] == g]
        before = order[: order.index(members[0])]
        at_start = weights_after(w, spec, hessian, before, guided.values, **options)[:, members]
        slack = guided.slack[:, members].max(axis=1)
        for n in range(codes.shape[0]):
            exact, z = extremes_to_scale([float(np.float32(x)) for x in at_start[n]], spec)
            # a scale is the difference of two weights, or one, over at least one step; a storage step on top
            allowed = 2 * slack[n] + abs(stored_step(exact, spec))
            assert abs(scale[n, g] - exact) <= allowed, f"scale {scale[n, g]} of group {g}, expected {exact}"
            if zero is not None and z is not None:
                # the zero point is a rounded quotient: it may fall on either side of a tie
                assert abs(int(zero[n, g]) - z) <= (1 if near_tie(at_start[n], exact, slack[n]) else 0)


def stored_step(scale: float, spec: QuantSpec) -> float:
    """Distance from a scale to the next one that its storage type can hold, a half rounding each way."""
    dtype = getattr(torch, spec.scale_dtype)
    value = torch.tensor(scale, dtype=dtype)
    return float(torch.nextafter(value, torch.tensor(torch.inf, dtype=dtype)).double() - value.double())


def near_tie(group: np.ndarray, scale: float, slack: float) -> bool:
    quotient = -min(group.min(), 0.0) / scale
    return abs(quotient - np.floor(quotient) - 0.5) <= 4 * slack / scale * (1 + quotient)


def weights_after(
    w: Tensor,
    spec: QuantSpec,
    hessian: Tensor,
    before: list[int],
    values: np.ndarray,
    damp: float | None = None,
) -> np.ndarray:
    """The weights once ``before`` are fixed at ``values`` and the rest took up their error, float64 [N, K].

    In closed form: the rest minimise the objective, so with F fixed and R the rest,
    w_R + H_RR^-1 H_RF (w_F - q_F).
    """
    h = damped(hessian.double().numpy(), spec.options.damp if damp is None else damp)
    weight = w.to(torch.float32).double().numpy().copy()
    rest = [k for k in range(weight.shape[1]) if k not in set(before)]
    if before and rest:
        error = weight[:, before] - values[:, before]
        weight[:, rest] += np.linalg.solve(h[np.ix_(rest, rest)], h[np.ix_(rest, before)] @ error.T).T
    return weight
