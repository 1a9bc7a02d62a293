"""Double-quantized scales on their own, against bitsandbytes' blockwise 8-bit quantization."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from brise.quant.double_quant import dequantize_scales, dynamic_map, quantize_scales

functional = pytest.importorskip("bitsandbytes.functional")


def raw(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32)


def assert_equals_bitsandbytes(scale: Tensor) -> None:
    codes, absmax, offset = quantize_scales(scale)
    flat = scale.contiguous().flatten()
    mean = flat.mean()
    theirs, state = functional.quantize_blockwise(flat - mean, blocksize=256)
    assert torch.equal(raw(offset), raw(mean.reshape(1)))
    assert torch.equal(raw(absmax), raw(state.absmax))
    assert torch.equal(codes.flatten(), theirs)
    assert codes.shape == scale.shape
    expected = functional.dequantize_blockwise(theirs, state)
    expected += mean
    assert torch.equal(raw(dequantize_scales(codes, absmax, offset).flatten()), raw(expected))


def test_the_dynamic_map():
    ours = dynamic_map(torch.device("cpu"))
    assert torch.equal(raw(ours), raw(functional.create_dynamic_map(signed=True)))
    # by hand: the largest decade has 64 even steps over [0.1, 1], so its last middle is 1 - 0.9/128
    assert float(ours[0]) == pytest.approx(-(1 - 0.9 / 128), rel=1e-6)
    assert float(ours[-1]) == 1.0
    assert float(ours[127]) == 0.0
    # the smallest: one value at the middle of [0.1, 1] in the decade 10^-6
    assert float(ours[128]) == pytest.approx(0.55e-6, rel=1e-6)
    assert bool((ours.diff() > 0).all())


def test_every_bin_and_its_borders():
    """In a block of zero mean and absmax 1 a scale is its own ratio: 13 of them around each of 65535 borders.

    float32 finds the bin of a ratio to within 2^-8 of a bin, 1.2e-7: the true borders lie within these 3e-7.
    """
    border = (torch.arange(65535, dtype=torch.float64) + 0.5) / 32767.5 - 1
    near = (
        (border[:, None] + torch.linspace(-3e-7, 3e-7, 13, dtype=torch.float64))
        .float()
        .clamp_(-1, 1)
        .flatten()
    )
    values = torch.nn.functional.pad(near, (0, -near.numel() % 254)).view(-1, 254)
    block = torch.cat([values, torch.tensor([1.0, -1.0]).expand(len(values), 2)], dim=1)
    block = torch.cat([block, -block])
    assert abs(float(block.mean())) < 1e-8
    assert_equals_bitsandbytes(block)


@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 40),
    exponent=st.integers(-130, 90),  # beyond that the mean of 1600 scales leaves float32, which is refused
    spread=st.sampled_from([1e-7, 1e-3, 1.0, 1e6]),
    signs=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150)
def test_equals_bitsandbytes_on_anything(rows, groups, exponent, spread, signs, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = 1 + spread * torch.randn(rows, groups, generator=generator).abs()
    if signs:  # searched and fitted scales may be negative
        scale *= torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1
    assert_equals_bitsandbytes(scale * 2.0**exponent)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3.7, 1e-45, 1e-38, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 16), (17, 16)])
def test_equal_scales(value, shape):
    scale = torch.full(shape, value)
    assert_equals_bitsandbytes(scale)
    back = dequantize_scales(*quantize_scales(scale))
    assert bool(((back - scale).abs() <= 2e-6 * abs(value)).all())  # the mean of n equal numbers may round


def test_blocks_without_spread_beside_blocks_with():
    scale = torch.ones(4, 256)
    scale[0] = torch.linspace(0, 2, 256)
    scale[3] = 1.0
    assert_equals_bitsandbytes(scale)


@pytest.mark.parametrize("step", [1e-45, 1e-39, 2.9e-39, 2.95e-39, 3e-39, 1.1e-38, 1.2e-38])
def test_subnormal_spread(step):
    """The reciprocal of the block's absmax is infinite below 2.94e-39."""
    scale = torch.zeros(2, 64)
    scale[0, 3], scale[1, 7], scale[0, 9] = step, 2 * step, step / 2
    assert_equals_bitsandbytes(scale)


def test_error_is_bounded_by_the_map():
    """At most half the widest gap of the map, and half a bin of the look-up, of the block's absmax."""
    scale = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    codes, absmax, offset = quantize_scales(scale)
    error = (dequantize_scales(codes, absmax, offset) - scale).abs().view(-1, 256)
    gap = float(dynamic_map(torch.device("cpu")).diff().max())
    assert bool((error <= absmax[:, None] * (gap / 2 + 1 / 65535 + 1e-6)).all())


@pytest.mark.parametrize("bad", [3e38, float("inf"), float("nan")])
def test_scales_whose_mean_overflows_are_refused(bad):
    with pytest.raises(ValueError, match="set double_quant to false"):
        quantize_scales(torch.full((4, 4), bad))
