"""NF4 and FP4 against bitsandbytes on the CPU, bit for bit: codes, scales (doubly quantized too), weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from brise.quant.config import QuantSpec
from brise.quant.formats import FORMATS
from brise.quant.nf4 import FP4_VALUES, NF4_VALUES
from brise.quant.rtn import rtn

from . import twins

functional = pytest.importorskip("bitsandbytes.functional")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [32, 64, 128, 256]
WIDTH = 512


def raw(t: Tensor) -> Tensor:
    """The bits of a tensor: -0.0 is not 0.0."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()]
    return t.contiguous().view(kind)


def assert_equals_bitsandbytes(w: Tensor, format: str, block: int, double_quant: bool = False) -> None:
    """Codes, stored scales and dequantized weights of ``w`` [N, K] are theirs to the bit."""
    q = rtn(w, QuantSpec(format=format, group_size=block, double_quant=double_quant))
    packed, state = functional.quantize_4bit(
        w.contiguous(), blocksize=block, quant_type=format, compress_statistics=double_quant
    )
    pairs = packed.flatten()
    theirs = torch.stack([pairs >> 4, pairs & 15], dim=1).view(
        w.shape
    )  # the even index is in the high nibble
    assert torch.equal(q.codes(), theirs)
    assert torch.equal(raw(q.tensors["scales"].flatten()), raw(state.absmax))
    if double_quant:
        assert torch.equal(raw(q.tensors["scales_absmax"]), raw(state.state2.absmax))
        assert torch.equal(raw(q.tensors["scales_offset"]), raw(state.offset.reshape(1)))
    for dtype in DTYPES:
        state.dtype = dtype
        expected = functional.dequantize_4bit(packed, state)
        ours = q.dequantize(dtype)
        if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
            # where the processor rounds to bf16 itself, bitsandbytes lets it, and it takes the subnormal for zero
            small = (q.dequantize(torch.float32).abs() < torch.finfo(dtype).tiny) & (expected == 0)
            ours = torch.where(small, ours * 0, ours)
        assert torch.equal(raw(ours), raw(expected)), f"dequantized to {dtype}"


def midpoints(format: str) -> Tensor:
    values = torch.tensor(sorted(set(FORMATS[format].values))).float()  # type: ignore[attr-defined]
    return (values[:-1] + values[1:]) / 2


def beside(x: Tensor, steps: int = 3) -> Tensor:
    """Every fp32 number from ``steps`` below to ``steps`` above each of x."""
    out, up, down = [x], x, x
    for _ in range(steps):
        up = torch.nextafter(up, torch.full_like(up, torch.inf))
        down = torch.nextafter(down, torch.full_like(down, -torch.inf))
        out += [up, down]
    return torch.cat(out)


def blocks_of(content: Tensor, absmax: Tensor) -> Tensor:
    """Rows of WIDTH: each block of 32 starts with its absmax, the rest is ``content`` times absmax."""
    room = 31
    content = torch.nn.functional.pad(content, (0, -content.numel() % room)).view(-1, room)
    blocks = torch.cat(
        [torch.cat([a.sign() * torch.ones(len(content), 1), content], dim=1) * a for a in absmax]
    )
    blocks = torch.nn.functional.pad(blocks, (0, 0, 0, -len(blocks) % (WIDTH // 32)))
    return blocks.view(-1, WIDTH)


def hard_weights(format: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(24, WIDTH, generator=generator)
    middles = midpoints(format)
    one = torch.ones(1)
    holes = normal.clone()
    holes[3] = 0
    holes[5, :256] = 0
    holes[6, ::2] = -0.0
    holes[7] = -0.0
    single = torch.zeros(24, WIDTH)
    single[torch.arange(24), torch.arange(24) * 21] = normal[:, 0]
    tiny = torch.tensor([1.0, 2.0, 3.0, -1.0, 0.0, 100.0]) * 2.0**-149
    return {
        "normal": normal,
        "ties": blocks_of(beside(middles), torch.cat([one, -one, one / 4, one * 2**40, one * 2.0**-100])),
        "near ties under any absmax": blocks_of(beside(middles, 1), torch.rand(8, generator=generator) + 0.5),
        "the codebook itself": blocks_of(
            torch.tensor(FORMATS[format].values),  # type: ignore[attr-defined]
            torch.rand(8, generator=generator) * 3,
        ),
        "zero rows and blocks": holes,
        "one weight a row": single,
        "positive": normal.abs(),
        "negative": -normal.abs(),
        "constant": normal[:, :1].expand(24, WIDTH).contiguous(),
        "large": normal * 1e4,
        "huge": normal.clamp(-3, 3) * 1e38,
        "near the smallest normal": normal * 1.2e-38,
        "at the clamp of the reciprocal": normal.sign() * 1e-38 * (1 + normal.abs() * 1e-3),
        "subnormal": normal * 1e-40,
        "a few smallest subnormals": tiny[torch.randint(0, 6, (24, WIDTH), generator=generator)],
        "wide range": normal * torch.exp2(torch.randint(-60, 60, (24, WIDTH), generator=generator).float()),
    }


def representable(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast; what fp16 cannot hold is scaled down by the power of two that lets it."""
    largest = float(weights.abs().max())
    if largest > torch.finfo(dtype).max:
        weights = weights * 2.0 ** (math.floor(math.log2(torch.finfo(dtype).max / largest)))
    return weights.to(dtype)


NAMES = list(hard_weights("nf4"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_equals_bitsandbytes(format, name):
    weights = hard_weights(format)[name]
    for dtype in DTYPES:
        for block in BLOCKS:
            assert_equals_bitsandbytes(representable(weights, dtype), format, block)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "huge"])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_double_quantization_equals_bitsandbytes(format, name):
    weights = hard_weights(format)[name]
    for dtype in DTYPES:
        for block in (32, 64):
            assert_equals_bitsandbytes(representable(weights, dtype), format, block, double_quant=True)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64])
def test_double_quantization_in_blocks_of_256_scales(rows):
    """32 scales a row: less than a block, almost one, exactly one, one and a bit, several."""
    w = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(rows))
    assert_equals_bitsandbytes(w, "nf4", 32, double_quant=True)


@given(
    format=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from(BLOCKS),
    double_quant=st.booleans(),
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    exponent=st.integers(-20, 15),
    zeros=st.sampled_from([0.0, 0.5, 0.99]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=120)
def test_equals_bitsandbytes_on_anything(
    format, dtype, block, double_quant, rows, groups, exponent, zeros, seed
):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, groups * block, generator=generator) * 2.0**exponent
    w[torch.rand(w.shape, generator=generator) < zeros] = 0
    assert_equals_bitsandbytes(representable(w, dtype), format, block, double_quant)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_every_fp32_ratio_around_every_border(format):
    """Absmax 1, so that the weight is the ratio: each midpoint with its 1000 neighbours on either side."""
    centre = midpoints(format).view(torch.int32)
    near = (centre[:, None] + torch.arange(-1000, 1001, dtype=torch.int32)).view(torch.float32).flatten()
    content = torch.nn.functional.pad(near, (0, -near.numel() % 63)).view(-1, 63)
    w = torch.cat([torch.ones(len(content), 1), content], dim=1)
    assert_equals_bitsandbytes(w, format, 64)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_all_of_the_range_on_a_fine_grid(format):
    grid = torch.linspace(-1, 1, 63 * 4096).view(-1, 63)
    w = torch.cat([torch.ones(len(grid), 1), grid], dim=1)
    assert_equals_bitsandbytes(w, format, 64)


def test_rows_of_any_memory_layout():
    w = torch.randn(512, 300, generator=torch.Generator().manual_seed(1)).t()
    assert_equals_bitsandbytes(w, "nf4", 64, double_quant=True)


def test_one_scale_a_row():
    w = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    whole = rtn(w, QuantSpec(format="nf4", group_size=None))
    assert torch.equal(whole.codes(), rtn(w, QuantSpec(format="nf4", group_size=256)).codes())
    assert torch.equal(whole.tensors["scales"], w.abs().amax(1, keepdim=True))


def test_tables():
    """The values, once more: as bitsandbytes has them, and as they are written down in the tests."""
    theirs = functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(raw(torch.tensor(NF4_VALUES)), raw(theirs))
    assert list(NF4_VALUES) == twins.NF4
    theirs = functional.get_4bit_type("fp4", device="cpu")
    assert torch.equal(torch.tensor(FP4_VALUES), theirs)
    assert list(FP4_VALUES) == twins.FP4


def test_nf4_by_hand():
    """absmax 2; 0.5 is below the midpoint of 0.4407 and 0.5626; 0.04 is above 0.03979, 0.03975 below."""
    w = torch.tensor([[2.0, -2.0, 0.0, 1.0, -0.1, 0.08, 0.0795, 1.99]])
    q = rtn(w, QuantSpec(format="nf4", group_size=8))
    assert q.codes().tolist() == [[15, 0, 7, 12, 6, 8, 7, 15]]
    assert q.tensors["scales"].tolist() == [[2.0]]
    assert q.tensors["qweight"].tolist() == [[0x0F, 0xC7, 0x86, 0xF7]]
    assert q.dequantize()[0, 3] == 0.44070982933044434 * 2


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_infinities_and_nan_are_refused(format, bad, double_quant):
    for dtype in DTYPES:
        for where in ((0, 0), (3, 511), (2, 100)):
            for scale in ("absmax", "mse"):
                w = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3))
                w[where] = bad
                spec = QuantSpec(format=format, double_quant=double_quant, scale=scale)
                with pytest.raises(ValueError, match=r"\[4, 512\] holds 1 NaN or infinite values"):
                    rtn(w.to(dtype), spec)


def test_double_quantization_of_scales_beyond_float32_is_refused():
    """bitsandbytes writes an infinite offset here, and all weights are lost."""
    w = torch.full((8, 64), 3e38)
    for format in ("nf4", "int4"):
        with pytest.raises(ValueError, match="mean beyond float32: set double_quant to false"):
            rtn(w, QuantSpec(format=format, group_size=32, double_quant=True))


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_negative_scales_turn_the_codebook_round(format):
    """A double-quantized scale near zero can come out negative; codes must still be the nearest."""
    fmt = FORMATS[format]
    w = torch.linspace(-1, 1, 401)[None]
    for scale in (-1.0, -0.3, -1e-30):
        s = torch.tensor([[scale]])
        value = fmt.decode(fmt.encode(w * abs(scale), s), s)
        grid = torch.tensor(fmt.values) * scale  # type: ignore[attr-defined]
        nearest = (w.T * abs(scale) - grid).abs().amin(1)
        # up to rounding of the product, of which both have one
        assert bool(((w * abs(scale) - value).abs()[0] <= nearest * (1 + 1e-6) + 1e-7 * abs(scale)).all())


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_double_quantized_rows_stay_near_plain_ones(format):
    """An end-to-end sanity of size: the scales lose at most one part in 100 of their spread."""
    w = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(4))
    plain = rtn(w, QuantSpec(format=format))
    double = rtn(w, QuantSpec(format=format, double_quant=True))
    assert torch.equal(plain.codes(), double.codes())
    spread = (plain.params().scale - plain.params().scale.mean()).abs().max()
    assert (plain.params().scale - double.params().scale).abs().max() < 0.02 * spread
    assert double.nbytes < plain.nbytes - 64 * 8 * 3 + 64
