"""How scales are chosen: every rule against a search that tries all candidates, one group at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brise.quant import scales
from brise.quant.config import QuantSpec
from brise.quant.formats import FORMATS
from brise.quant.rtn import rtn
from brise.quant.scales import choose_params, stored_params

from .twins import candidate_scales, extremes_to_scale, group_loss, is_integer, random_problem, unit_grid

GRIDS = [(name, True) for name in FORMATS] + [(name, False) for name in FORMATS if name.startswith("int")]
# a loss is a sum of 16 squares (or 256 products) of float32 numbers; a candidate may win by that little
RTOL = 300 * 2.0**-24


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rule", ["mse", "hessian"])
@pytest.mark.parametrize(("format", "symmetric"), GRIDS)
def test_search_finds_the_best_candidate(format, symmetric, rule, double_quant):
    w, hessian = random_problem(5, 48, seed=1)
    spec = QuantSpec(format=format, group_size=16, symmetric=symmetric, scale=rule, double_quant=double_quant)
    chosen = choose_params(w, spec, hessian if rule == "hessian" else None)
    plain = QuantSpec(format=format, group_size=16, symmetric=symmetric)
    better = 0
    for n in range(5):
        for g in range(3):
            at = slice(16 * g, 16 * g + 16)
            group, block = w[n, at].double().numpy(), hessian.double().numpy()[at, at]
            base, zero = extremes_to_scale(w[n, at].tolist(), plain)
            assert (chosen.zero is None) == symmetric
            if chosen.zero is not None:
                assert int(chosen.zero[n, g]) == zero
            unit = unit_grid(spec, zero)
            h = block if rule == "hessian" else None
            candidates = candidate_scales(base, spec)
            losses = [group_loss(group, scale, unit, h) for scale in candidates]
            scale = float(chosen.scale[n, g])
            assert scale in candidates
            assert group_loss(group, scale, unit, h) <= min(losses) * (1 + RTOL)
            better += scale != candidates[0]
    assert better >= 3  # else the search was not put to a test


def test_ties_go_to_the_plain_scale():
    """Weights that lie on the grid already: every other candidate is worse or as good."""
    values = torch.tensor(FORMATS["nf4"].values)[None] * 0.5  # type: ignore[attr-defined]
    spec = QuantSpec(format="nf4", group_size=16, scale="mse")
    assert choose_params(values, spec).scale.item() == 0.5
    zeros = torch.zeros(3, 32)
    for format in FORMATS:
        searched = rtn(zeros, QuantSpec(format=format, group_size=16, scale="mse"))
        assert (searched.dequantize() == 0).all()
        assert not bool(torch.signbit(searched.tensors["scales"]).any())


def test_hessian_rule_needs_a_hessian():
    w, _ = random_problem(2, 32, seed=2)
    with pytest.raises(ValueError, match="scale 'hessian' needs calibration"):
        rtn(w, QuantSpec(format="int4", group_size=16, scale="hessian"))


def test_hessian_rule_sees_only_its_own_block():
    w, hessian = random_problem(4, 48, seed=3)
    spec = QuantSpec(format="int4", group_size=16, scale="hessian")
    block_diagonal = torch.block_diag(*(hessian[i : i + 16, i : i + 16] for i in (0, 16, 32)))
    assert torch.equal(choose_params(w, spec, hessian).scale, choose_params(w, spec, block_diagonal).scale)
    identity = choose_params(w, spec, torch.eye(48)).scale
    mse = choose_params(w, QuantSpec(format="int4", group_size=16, scale="mse")).scale
    assert torch.equal(identity, mse)


@given(
    grid=st.sampled_from(GRIDS),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    groups=st.integers(1, 3),
    size=st.integers(2, 20),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_search_never_does_worse_than_absmax(grid, scale_dtype, groups, size, seed):
    format, symmetric = grid
    w = torch.randn(3, groups * size, generator=torch.Generator().manual_seed(seed))
    kw = {"format": format, "group_size": size, "symmetric": symmetric, "scale_dtype": scale_dtype}
    plain, searched = rtn(w, QuantSpec(**kw)), rtn(w, QuantSpec(**kw, scale="mse"))

    def loss(q):
        return (w.double() - q.dequantize().double()).unflatten(1, (groups, size)).square().sum(2)

    # an integer's code is found with the stored scale; a codebook's plain one with the exact scale, which
    # float16 then spoils, for better or worse
    if is_integer(plain.spec) or scale_dtype == "float32":
        assert bool((loss(searched) <= loss(plain) * (1 + RTOL)).all())


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_stored_params_are_what_a_reader_finds(scale_dtype):
    w, _ = random_problem(40, 64, seed=4)
    for double_quant in (False, True):
        for rule in ("absmax", "mse"):
            spec = QuantSpec(
                format="int4", group_size=8, scale=rule, double_quant=double_quant, scale_dtype=scale_dtype
            )
            exact = choose_params(w, spec)
            assert torch.equal(stored_params(exact, spec).scale, rtn(w, spec).params().scale)


def test_asymmetric_range_always_holds_zero():
    w = torch.tensor([[3.0, 4.0, 5.0, 6.0]])
    params = choose_params(w, QuantSpec(format="int4", group_size=4, symmetric=False))
    assert params.scale.item() == np.float32(6 / 15)
    assert params.zero is not None and params.zero.item() == 0


def test_groups_searched_by_several_threads_have_the_scales_of_one(monkeypatch):
    w, hessian = random_problem(9, 96, seed=5)
    spec = QuantSpec(format="int4", group_size=16, algorithm="gptq", scale="hessian")
    alone = choose_params(w, spec, hessian)
    monkeypatch.setattr(scales, "_MANY", 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(choose_params(w, spec, hessian).scale, alone.scale)
    finally:
        torch.set_num_threads(threads)
