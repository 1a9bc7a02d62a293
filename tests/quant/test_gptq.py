"""GPTQ against a slow twin written from the paper: every decision, over groups, blocks, orders, formats."""

import dataclasses

import numpy as np
import pytest
import torch

from brise.quant.config import QuantSpec
from brise.quant.formats import FORMATS
from brise.quant.gptq import GPTQOptions, HessianError, gptq, inverse_factor
from brise.quant.refine import objective
from brise.quant.rtn import rtn

from .gptq_twin import check, damped, run
from .twins import candidate_scales, extremes_to_scale, group_loss, random_problem, row_objective, unit_grid

GRIDS = [(name, True) for name in FORMATS] + [(name, False) for name in FORMATS if name.startswith("int")]
IDS = [name + ("" if symmetric else "-asym") for name, symmetric in GRIDS]


def make_spec(format: str, symmetric: bool = True, group_size: int | None = 16, **kw) -> QuantSpec:
    spec_fields = {"scale", "scale_dtype", "double_quant"}
    options = GPTQOptions(**{k: v for k, v in kw.items() if k not in spec_fields})
    return QuantSpec(
        format=format,
        algorithm="gptq",
        group_size=group_size,
        symmetric=symmetric,
        options=options,
        **{k: v for k, v in kw.items() if k in spec_fields},
    )


@pytest.mark.parametrize("static", [True, False], ids=["static", "moving"])
@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "in-order"])
@pytest.mark.parametrize(("format", "symmetric"), GRIDS, ids=IDS)
def test_equals_the_twin(format, symmetric, act_order, static):
    w, hessian = random_problem(6, 48, seed=GRIDS.index((format, symmetric)))
    for block_size in (5, 16, 40, 128):  # within a group, a group, over groups, the whole row
        spec = make_spec(format, symmetric, act_order=act_order, static_groups=static, block_size=block_size)
        check(w, spec, hessian, gptq(w, spec, hessian))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [2, 8, 24, 48, None])
def test_equals_the_twin_for_any_group(group_size, act_order):
    w, hessian = random_problem(6, 48, seed=3)
    for static in (True, False):
        spec = make_spec(
            "int4", False, group_size=group_size, act_order=act_order, static_groups=static, block_size=7
        )
        q = gptq(w, spec, hessian)
        assert ("g_idx" in q.tensors) == (act_order and not static and group_size not in (48, None))
        check(w, spec, hessian, q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["nf4", "int3"])
def test_equals_the_twin_for_half_precision_weights(format, dtype):
    w, hessian = random_problem(6, 64, seed=4, dtype=dtype)
    spec = make_spec(format)
    check(w, spec, hessian, gptq(w, spec, hessian))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_works_with_the_scales_that_are_stored(scale_dtype):
    w, hessian = random_problem(6, 64, seed=5)
    spec = make_spec("int4", scale_dtype=scale_dtype)
    check(w, spec, hessian, gptq(w, spec, hessian))


def test_equals_the_twin_over_many_blocks_and_groups():
    w, hessian = random_problem(4, 160, seed=6)
    for format, block_size in (("nf4", 48), ("int4", 100), ("int4", 128)):
        spec = make_spec(format, group_size=32, block_size=block_size)
        check(w, spec, hessian, gptq(w, spec, hessian))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["nf4", "int4", "int8"])
def test_double_quantized_scales_are_those_that_a_reader_sees(format, symmetric):
    functional = pytest.importorskip("bitsandbytes.functional")
    if not symmetric and not format.startswith("int"):
        return
    w, hessian = random_problem(8, 64, seed=7)
    spec = make_spec(format, symmetric, double_quant=True)
    exact = [[extremes_to_scale(g, spec) for g in row] for row in w.unflatten(1, (4, 16)).tolist()]
    scale = torch.tensor([[s for s, _ in row] for row in exact])
    zero = None if symmetric else np.array([[z for _, z in row] for row in exact])
    codes, state = functional.quantize_blockwise((scale - scale.mean()).flatten(), blocksize=256)
    seen = functional.dequantize_blockwise(codes, state).view_as(scale) + scale.mean()
    check(w, spec, hessian, gptq(w, spec, hessian), scales=(seen.double().numpy(), zero))


@pytest.mark.parametrize("rule", ["absmax_narrow", "mse", "hessian"])
@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_scale_rules(format, rule):
    if format == "nf4" and rule == "absmax_narrow":
        return
    w, hessian = random_problem(6, 48, seed=8)
    spec = make_spec(format, scale=rule, scale_dtype="float32")
    q = gptq(w, spec, hessian)
    if rule == "absmax_narrow":
        check(w, spec, hessian, q)
        return
    chosen = q.params().scale.double().numpy()
    for n, row in enumerate(w.unflatten(1, (3, 16)).tolist()):
        for g, group in enumerate(row):
            at = slice(16 * g, 16 * g + 16)
            block = hessian.double().numpy()[at, at] if rule == "hessian" else None
            candidates = candidate_scales(extremes_to_scale(group, spec)[0], spec)
            losses = [group_loss(np.array(group), s, unit_grid(spec), block) for s in candidates]
            assert chosen[n, g] in candidates
            # the library weighs candidates in float32: one may win that is worse by a rounding error
            got = group_loss(np.array(group), chosen[n, g], unit_grid(spec), block)
            assert got <= min(losses) * (1 + 1e-5)
    check(w, spec, hessian, q, scales=(chosen, None))


def test_moving_groups_can_search_their_scale():
    w, hessian = random_problem(6, 48, seed=9)
    spec = make_spec("int4", scale="mse", static_groups=False, act_order=False, scale_dtype="float32")
    q = gptq(w, spec, hessian)
    codes = q.codes().numpy().astype(np.int64)
    chosen = q.params().scale.double().numpy()
    from .gptq_twin import weights_after

    values = q.dequantize().double().numpy()
    for g in range(3):
        at = slice(16 * g, 16 * g + 16)
        now = weights_after(w, spec, hessian, list(range(16 * g)), values)[:, at]
        for n in range(6):
            candidates = candidate_scales(extremes_to_scale(now[n].tolist(), spec)[0], spec)
            best = min(group_loss(now[n], s, unit_grid(spec), None) for s in candidates)
            assert group_loss(now[n], chosen[n, g], unit_grid(spec), None) <= best * (1 + 1e-4)
    guided = run(w, spec, hessian, scales=(chosen, None), follow=codes)
    best_code = run(w, spec, hessian, scales=(chosen, None))
    assert (best_code.codes[best_code.margin > 1] == codes[best_code.margin > 1]).all()
    assert np.abs(guided.values - values).max() < 1e-6


@pytest.mark.parametrize("format", list(FORMATS))
def test_block_size_changes_nothing(format):
    w, hessian = random_problem(16, 96, seed=10)
    for static in (True, False):
        results = [
            gptq(w, make_spec(format, group_size=32, block_size=size, static_groups=static), hessian)
            for size in (1, 7, 32, 33, 96, 1000)
        ]
        sure = run(w, results[0].spec, hessian).margin > 1
        assert sure.sum() >= 12
        for other in results[1:]:
            assert torch.equal(other.codes()[sure], results[0].codes()[sure])


@pytest.mark.parametrize("act_order", [True, False])
def test_hessian_may_come_with_any_positive_factor(act_order):
    w, hessian = random_problem(8, 48, seed=11)
    spec = make_spec("int4", act_order=act_order)
    for factor in (2.0**-20, 2.0**30):
        scaled = gptq(w, spec, hessian * factor)
        assert torch.equal(scaled.codes(), gptq(w, spec, hessian).codes())


def test_without_correlation_it_is_plain_rounding():
    w, _ = random_problem(8, 64, seed=12)
    diagonal = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.1)
    for format in FORMATS:
        spec = make_spec(format)
        plain = rtn(w, QuantSpec(format=format, group_size=16))
        assert torch.equal(gptq(w, spec, diagonal).dequantize(), plain.dequantize())


@pytest.mark.parametrize("static", [True, False])
def test_dead_channels_are_rounded_plainly_and_disturb_nobody(static):
    w, hessian = random_problem(6, 48, seed=13)
    dead = [0, 17, 47]
    hessian[dead] = 0
    hessian[:, dead] = 0
    for act_order in (True, False):
        spec = make_spec("int4", act_order=act_order, static_groups=static)
        q = gptq(w, spec, hessian)
        check(w, spec, hessian, q)
        if static:
            plain = rtn(w, QuantSpec(format="int4", group_size=16))
            assert torch.equal(q.dequantize()[:, dead], plain.dequantize()[:, dead])


def test_all_channels_dead():
    w, _ = random_problem(4, 32, seed=14)
    spec = make_spec("nf4")
    q = gptq(w, spec, torch.zeros(32, 32))
    assert torch.equal(q.codes(), rtn(w, QuantSpec(format="nf4", group_size=16)).codes())


def not_positive_definite(lowest: float) -> torch.Tensor:
    """Unit mean diagonal, a smallest eigenvalue of ``lowest`` < 0."""
    generator = torch.Generator().manual_seed(15)
    basis, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))
    values = torch.linspace(0.5, 1.5, 32, dtype=torch.float64)
    values[0] = lowest
    values *= 32 / values.sum()
    return ((basis * values) @ basis.T).float()


def test_damping_rises_tenfold_until_the_hessian_can_be_factorized():
    w, _ = random_problem(6, 32, seed=16)
    hessian = not_positive_definite(-0.05)
    spec = make_spec("int4", damp=0.01, damp_max=1.0)
    check(w, spec, hessian, gptq(w, spec, hessian), damp=0.1)
    with pytest.raises(AssertionError):  # and no further than needed
        check(w, spec, hessian, gptq(w, spec, hessian), damp=1.0)


def test_damping_stops_at_its_greatest():
    hessian = not_positive_definite(-0.05)
    w, _ = random_problem(6, 32, seed=16)
    with pytest.raises(HessianError, match=r"not positive definite with damping 0\.01.*damp_max above 0\.05"):
        gptq(w, make_spec("int4", damp=0.01, damp_max=0.05), hessian)
    # the greatest damping itself is tried: 0.001, 0.01, 0.1
    gptq(w, make_spec("int4", damp=0.001, damp_max=0.1), hessian)
    with pytest.raises(HessianError, match="more calibration text"):
        gptq(w, make_spec("int4", damp_max=1.0), not_positive_definite(-3.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_hessian_that_is_not_finite_is_refused(bad):
    w, hessian = random_problem(4, 32, seed=17)
    hessian[3, 5] = bad
    with pytest.raises(HessianError, match="NaN or infinity"):
        gptq(w, make_spec("nf4"), hessian)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("static", [True, False])
def test_weight_that_is_not_finite_is_refused(bad, static):
    w, hessian = random_problem(4, 32, seed=17)
    w[2, 20] = bad
    for format in FORMATS:
        with pytest.raises(ValueError, match="NaN or infinite"):
            gptq(w, make_spec(format, static_groups=static), hessian)


def test_missing_or_wrong_hessian_is_refused():
    w, hessian = random_problem(4, 32, seed=18)
    with pytest.raises(ValueError, match="needs the Hessian"):
        gptq(w, make_spec("nf4"), None)
    for wrong in (hessian[:16, :16], hessian[:16], hessian[0], torch.ones(4, 4)):
        with pytest.raises(ValueError, match=r"must be \[32, 32\]"):
            gptq(w, make_spec("nf4"), wrong)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("format", "symmetric"), GRIDS, ids=IDS)
def test_lowers_the_objective_of_plain_rounding(format, symmetric, act_order):
    w, hessian = random_problem(32, 64, seed=19)
    spec = make_spec(format, symmetric, act_order=act_order)
    plain = rtn(w, QuantSpec(format=format, group_size=16, symmetric=symmetric))
    ours, theirs = (
        float(objective(w, q.dequantize(), hessian).sum()) for q in (gptq(w, spec, hessian), plain)
    )
    assert ours < 0.75 * theirs


def test_no_input_is_changed():
    w, hessian = random_problem(4, 32, seed=20)
    hessian[3] = hessian[:, 3] = 0
    before = w.clone(), hessian.clone()
    for static in (True, False):
        gptq(w, make_spec("int4", static_groups=static, refits=1), hessian)
    assert torch.equal(w, before[0]) and torch.equal(hessian, before[1])


def test_memory_layout_of_the_weight_does_not_matter():
    w, hessian = random_problem(8, 32, seed=21)
    for static in (True, False):
        spec = make_spec("nf4", static_groups=static)
        a, b = gptq(w, spec, hessian), gptq(w.t().contiguous().t(), spec, hessian)
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def test_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse():
    _, hessian = random_problem(2, 40, seed=22)
    h = damped(hessian.double().numpy(), 0.01)
    factor = inverse_factor(torch.from_numpy(h.copy()))  # it works in place
    assert factor is not None
    upper = factor.numpy()
    expected = np.linalg.cholesky(np.linalg.inv(h)).T
    np.testing.assert_allclose(upper, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    assert (np.tril(upper, -1) == 0).all()


def test_objective_is_the_quadratic_form_of_every_row():
    w, hessian = random_problem(5, 24, seed=23)
    q = w.round(decimals=1)
    expected = row_objective((w - q).double().numpy(), hessian.double().numpy())
    np.testing.assert_allclose(objective(w, q, hessian).numpy(), expected, rtol=1e-4)


def test_twin_agrees_with_the_closed_form():
    """The twin itself, once: after any number of columns the open weights are the constrained minimum."""
    from .gptq_twin import weights_after

    w, hessian = random_problem(3, 24, seed=24)
    spec = make_spec("int4", group_size=8)
    trace = run(w, spec, hessian)
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable").tolist()
    for done in (1, 7, 23):
        expected = weights_after(w, spec, hessian, order[:done], trace.values)[:, order[done]]
        np.testing.assert_allclose(trace.target[:, order[done]], expected, rtol=1e-9)


def test_options_say_what_is_wrong():
    from brise.quant.config import ConfigError

    base = dataclasses.asdict(GPTQOptions())
    for change, message in (
        ({"act_order": 1}, "act_order must be true or false"),
        ({"static_groups": "yes"}, "static_groups must be true or false"),
        ({"damp": 0}, "damp must be above 0"),
        ({"damp": -1.0}, "damp must be above 0"),
        ({"damp": 2.0}, "at most damp_max = 1.0"),
        ({"damp": "much"}, "damp must be a number"),
        ({"damp": float("nan")}, "damp must be above 0"),
        ({"block_size": 0}, "block_size must be an integer of at least 1"),
        ({"block_size": 2.5}, "block_size must be an integer"),
        ({"refits": -1}, "refits must be an integer of at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            QuantSpec(format="int4", algorithm="gptq", options={**base, **change})
    for spec_change in ({"double_quant": True}, {"scale": "hessian"}):
        with pytest.raises(ConfigError, match="set static_groups to true"):
            QuantSpec(format="int4", algorithm="gptq", options={"static_groups": False}, **spec_change)
