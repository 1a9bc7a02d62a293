"""Integers of 2, 3, 4 and 8 bits against a scalar twin, and int8 against bitsandbytes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brise.quant.config import QuantSpec
from brise.quant.integer import INTEGERS
from brise.quant.rtn import rtn
from brise.quant.tensor import QuantizedTensor

from .twins import bits_of, extremes_to_scale, rtn_integer

NAMES = [fmt.name for fmt in INTEGERS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_equals_twin(w: torch.Tensor, spec: QuantSpec) -> QuantizedTensor:
    q = rtn(w, spec)
    codes, scales, zeros = rtn_integer(w, spec)
    params = q.params()
    assert params.scale.tolist() == scales
    assert (params.zero is None) == spec.symmetric
    if params.zero is not None:
        assert params.zero.tolist() == zeros
    assert q.codes().tolist() == codes
    size = spec.group_size or w.shape[1]
    middle = 2 ** (bits_of(spec) - 1)
    values = []
    for n, row in enumerate(codes):
        zero_of = [middle if z is None else z for z in zeros[n]]
        values.append([(c - zero_of[k // size]) * scales[n][k // size] for k, c in enumerate(row)])
    assert torch.equal(q.dequantize(torch.float32), torch.tensor(values, dtype=torch.float64).float())
    for dtype in DTYPES:
        assert torch.equal(q.dequantize(dtype), q.dequantize(torch.float32).to(dtype))
    return q


@st.composite
def problems(draw):
    """A weight and a spec: any width of group, signs, zero and constant groups, exponents up to the edges."""
    size = draw(st.integers(2, 24))
    groups = draw(st.integers(1, 4))
    rows = draw(st.integers(1, 4))
    name = draw(st.sampled_from(NAMES))
    symmetric = draw(st.booleans())
    rule = draw(st.sampled_from(["absmax", "absmax_narrow"])) if symmetric else "absmax"
    spec = QuantSpec(
        format=name,
        group_size=draw(st.sampled_from([size, None])),
        symmetric=symmetric,
        scale=rule,
        scale_dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    w = torch.randn(rows, groups * size, generator=generator)
    kind = draw(
        st.sampled_from(["any", "positive", "negative", "far from zero", "steps", "holes", "constant"])
    )
    if kind == "positive":
        w = w.abs()
    elif kind == "negative":
        w = -w.abs()
    elif kind == "far from zero":
        w = w * 0.01 + draw(st.sampled_from([5.0, -5.0]))
    elif kind == "steps":  # multiples of a quarter: many quotients are ties
        w = (w * 8).round() / 4
    elif kind == "holes":
        w[torch.rand(w.shape, generator=generator) < 0.7] = 0
        w[:, :size] = 0
    elif kind == "constant":
        w = w[:, :1].expand(rows, groups * size).contiguous()
    w = w * 2.0 ** draw(st.sampled_from([0, 0, 0, -6, 10, -20, -140]))
    return w.to(draw(st.sampled_from(DTYPES))), spec


@given(problems())
@settings(max_examples=250)
def test_equals_the_scalar_twin(problem):
    assert_equals_twin(*problem)


@given(problems())
@settings(max_examples=100)
def test_error_is_half_a_step_inside_the_range(problem):
    w, spec = problem
    q = rtn(w, spec)
    params = q.params()
    scale, zero = params.per_channel(w.shape[1])
    scale = scale.double()
    middle = torch.tensor(2.0 ** (bits_of(spec) - 1)) if zero is None else zero.double()
    low, high = (0 - middle) * scale, (2 ** bits_of(spec) - 1 - middle) * scale
    exact, value = w.double(), q.dequantize().double()
    inside = (exact >= low) & (exact <= high)
    # one rounding of the quotient (w / s, relative 2^-24) and one of the product
    slack = 2.0**-23 * exact.abs() + 2.0**-149
    assert bool(((exact - value).abs() <= scale / 2 + slack)[inside].all())
    # outside, the nearest end
    assert bool(((value - low).abs() <= slack + 2.0**-23 * low.abs())[exact < low].all())
    assert bool(((value - high).abs() <= slack + 2.0**-23 * high.abs())[exact > high].all())


@pytest.mark.parametrize("name", NAMES)
def test_both_ends_of_the_grid_are_reached(name):
    bits = int(name[3:])
    top = 2**bits - 1
    w = torch.linspace(-1, 1, 64)[None]
    for symmetric in (True, False):
        codes = rtn(w, QuantSpec(format=name, group_size=64, symmetric=symmetric)).codes()
        assert int(codes.min()) == 0
        assert int(codes.max()) == top
        assert len(codes.unique()) == min(2**bits, 64)
    narrow = rtn(w, QuantSpec(format=name, group_size=64, scale="absmax_narrow")).codes()
    assert (int(narrow.min()), int(narrow.max())) == (1, top)


@pytest.mark.parametrize("name", NAMES)
def test_zero_points_at_both_ends(name):
    """Only negative weights: zero is the top code. Only positive ones: it is code 0. Zero is always exact."""
    top = 2 ** int(name[3:]) - 1
    spec = QuantSpec(format=name, group_size=8, symmetric=False, scale_dtype="float32")
    # float32 scales and extremes that are multiples of them, so that the far end is exact too
    w = torch.arange(1, 9).float()[None] * top / 8
    for sign, zero in ((1, 0), (-1, top)):
        q = assert_equals_twin(w * sign, spec)
        params = q.params()
        assert params.zero is not None and params.zero.tolist() == [[zero]]
        assert params.scale.tolist() == [[1.0]]
        assert q.dequantize()[0, -1] == sign * top
    with_zero = torch.cat([torch.zeros(1, 1), w[:, 1:]], dim=1)
    for sign in (1, -1):
        assert rtn(with_zero * sign, spec).dequantize()[0, 0] == 0


def test_zero_point_by_hand():
    """int4 of [-1, 2]: scale 3/15 = 0.2, zero 5; 0.5 is 2.5 steps, which rounds to 2; -0.3 is -1.5, to -2."""
    w = torch.tensor([[-1.0, 2.0, 0.5, -0.3]])
    q = rtn(w, QuantSpec(format="int4", group_size=4, symmetric=False, scale_dtype="float32"))
    assert q.tensors["zeros"].tolist() == [[5]]
    assert q.tensors["scales"].tolist() == [[pytest.approx(0.2)]]
    assert q.codes()[0, :2].tolist() == [0, 15]
    assert (
        abs(int(q.codes()[0, 2]) - 7) <= 1
    )  # 0.2 is no float32: which side of the tie is the twin's business
    assert_equals_twin(w, q.spec)


def test_symmetric_by_hand():
    """int4 of absmax 7.5: scale 1, the grid is -8 .. 7; 7.5 is cut off to 7, -7.5 is a tie, to -8."""
    w = torch.tensor([[7.5, -7.5, 0.5, 1.5, -0.5, -1.5, 2.51, 0.0]])
    q = rtn(w, QuantSpec(format="int4", group_size=8))
    assert q.tensors["scales"].tolist() == [[1.0]]
    assert q.dequantize().tolist() == [[7.0, -8.0, 0.0, 2.0, 0.0, -2.0, 3.0, 0.0]]
    # codes 15, 0, 8, 10, 8, 6, 11, 8: the even one in the low nibble
    assert q.tensors["qweight"].tolist() == [[0x0F, 0xA8, 0x68, 0x8B]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_zero_and_constant_groups(name, double_quant, symmetric):
    w = torch.zeros(4, 32)
    w[1] = 0.7
    w[2] = -0.7
    w[3, 8:] = torch.linspace(-1, 1, 24)
    spec = QuantSpec(format=name, group_size=8, symmetric=symmetric, double_quant=double_quant)
    q = rtn(w, spec)
    value = q.dequantize()
    assert bool(value.isfinite().all())
    if not double_quant:
        assert (value[0] == 0).all() and (value[3, :8] == 0).all()
        assert not bool(torch.signbit(q.tensors["scales"]).any())
        # the range always holds zero: a constant is on the end of the grid, up to the rounding of the scale
        limit = 0.7 * 2**-11  # float16 rounds the scale
        if symmetric:  # absmax is half a step beyond the end
            limit += 0.5 * 0.7 / ((2 ** bits_of(spec) - 1) / 2)
        assert (value[1:3] - w[1:3]).abs().max() <= limit * (1 + 1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_double_quantization_rounds_with_the_scale_that_is_stored(name, symmetric):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(format=name, group_size=8, symmetric=symmetric, double_quant=True)
    q = rtn(w, spec)
    exact = [[extremes_to_scale(g, spec) for g in row] for row in w.unflatten(1, (16, 8)).tolist()]
    scale = torch.tensor([[s for s, _ in row] for row in exact])
    codes, state = functional.quantize_blockwise((scale - scale.mean()).flatten(), blocksize=256)
    assert torch.equal(q.tensors["scales"].flatten(), codes)
    assert torch.equal(q.tensors["scales_absmax"], state.absmax)
    assert torch.equal(q.tensors["scales_offset"], scale.mean().reshape(1))
    seen = (functional.dequantize_blockwise(codes, state).view_as(scale) + scale.mean()).repeat_interleave(
        8, 1
    )
    zero = (
        torch.tensor(2.0 ** (bits_of(spec) - 1))
        if symmetric
        else torch.tensor([[z for _, z in row] for row in exact]).repeat_interleave(8, 1)
    )
    expected = ((w / seen).round() + zero).clamp(0, 2 ** bits_of(spec) - 1)
    assert torch.equal(q.codes().float(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_scales_beyond_their_storage_are_refused(name):
    w = torch.full((2, 16), 3e7)
    with pytest.raises(ValueError, match="does not fit float16: set scale_dtype to float32"):
        rtn(w, QuantSpec(format=name, group_size=16))
    rtn(w, QuantSpec(format=name, group_size=16, scale_dtype="float32"))


def test_a_range_beyond_float32_is_refused():
    w = torch.tensor([[3e38, -3e38]])
    with pytest.raises(ValueError, match="range overflows float32"):
        rtn(w, QuantSpec(format="int4", group_size=None, symmetric=False, scale_dtype="float32"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_equals_bitsandbytes_row_absmax(dtype):
    """LLM.int8 stores the row's absmax and multiplies by 127 / absmax, we divide by absmax / 127.

    Both round twice in float32 before they round to an integer: codes can differ where the exact quotient is
    within two roundings (relative 2^-23) of a half; nowhere else, and by one.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    w = (torch.randn(64, 1000, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    theirs, scb, _ = functional.int8_vectorwise_quant(w.clone())
    spec = QuantSpec(format="int8", scale="absmax_narrow", scale_dtype="float32")
    q = rtn(w, spec)
    assert spec.group_size is None
    assert torch.equal(q.tensors["scales"][:, 0], scb / 127)
    ours = q.codes().to(torch.int16) - 128
    exact = w.double().numpy() * 127 / scb.double().numpy()[:, None]
    distance_to_half = np.abs(exact - np.floor(exact) - 0.5)
    tie = torch.from_numpy(distance_to_half <= 2.0**-22 * np.abs(exact))
    assert torch.equal(ours[~tie], theirs.to(torch.int16)[~tie])
    assert int((ours - theirs).abs().max()) <= 1
    assert float(tie.float().mean()) < 0.02 if dtype == torch.float32 else True
    # and the top code is there in every row
    assert bool((ours.abs().amax(1) == 127).all())
