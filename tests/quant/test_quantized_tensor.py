"""The record of a quantized weight: names, dtypes, shapes and bytes of what is stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from brise.quant import dequantize
from brise.quant.algorithms import ALGORITHMS
from brise.quant.apply import measure, quantize_weight
from brise.quant.config import ConfigError, QuantSpec
from brise.quant.formats import FORMATS
from brise.quant.presets import PRESETS
from brise.quant.tensor import QuantizedTensor, layout

from .twins import random_problem

PRESET_SPECS = list(
    dict.fromkeys(rule.spec for config in PRESETS.values() for rule in config.rules if rule.spec is not None)
)


def small(spec: QuantSpec, rows: int = 5) -> QuantizedTensor:
    w, hessian = random_problem(rows, 256, seed=0)
    return quantize_weight("w", w, spec, hessian)


@pytest.mark.parametrize("spec", PRESET_SPECS, ids=lambda s: f"{s.algorithm}-{s.format}-{s.group_size}")
def test_layout_names_what_is_stored(spec):
    q = small(spec)
    expected = layout(spec, (5, 256))
    assert {n: (t.dtype, tuple(t.shape)) for n, t in q.tensors.items()} == expected
    assert all(t.is_contiguous() for t in q.tensors.values())
    assert q.nbytes == sum(torch.empty(s, dtype=d).nbytes for d, s in expected.values())


@given(
    format=st.sampled_from(list(FORMATS)),
    algorithm=st.sampled_from(list(ALGORITHMS)),
    symmetric=st.booleans(),
    double_quant=st.booleans(),
    static=st.booleans(),
    act_order=st.booleans(),
    size=st.integers(2, 12),
    groups=st.integers(1, 4),
    whole=st.booleans(),
    rows=st.integers(1, 6),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)
@settings(max_examples=120)
def test_layout_names_what_is_stored_for_any_spec(
    format, algorithm, symmetric, double_quant, static, act_order, size, groups, whole, rows, scale_dtype
):
    options = {"static_groups": static, "act_order": act_order} if algorithm == "gptq" else {}
    try:
        spec = QuantSpec(
            format=format,
            algorithm=algorithm,
            group_size=None if whole else size,
            symmetric=symmetric,
            double_quant=double_quant,
            scale_dtype=scale_dtype,
            options=options,
        )
    except ConfigError:  # nf4 without a zero point, moving groups with double quantization
        assert not symmetric or (double_quant and not static)
        return
    w, hessian = random_problem(rows, size * groups, seed=size)
    q = quantize_weight("w", w, spec, hessian)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in q.tensors.items()} == layout(spec, (rows, size * groups))
    restored = QuantizedTensor(spec, q.shape, load(save(q.tensors)))
    assert torch.equal(restored.dequantize(), q.dequantize())
    assert bool(q.dequantize().isfinite().all())


def test_bytes_of_a_7b_layer_by_hand():
    """down_proj of Mistral-7B: 4096 x 14336 = 58,720,256 weights."""
    shape = (4096, 14336)
    half = 29_360_128  # two codes a byte

    def nbytes(spec):
        return sum(torch.empty(s, dtype=d, device="meta").nbytes for d, s in layout(spec, shape).values())

    # 917,504 blocks of 64: fp32 each, or a byte each and 3584 fp32 of 256 blocks and one offset
    assert nbytes(QuantSpec(format="nf4")) == half + 4 * 917_504
    assert nbytes(QuantSpec(format="nf4", double_quant=True)) == half + 917_504 + 4 * 3584 + 4
    # 458,752 groups of 128, fp16; with a zero point half a byte each
    assert nbytes(QuantSpec(format="int4")) == half + 2 * 458_752
    assert nbytes(QuantSpec(format="int4", symmetric=False)) == half + 2 * 458_752 + 229_376
    # a row of 14336 3-bit codes is 5376 bytes; its 112 zero points of 3 bits are 42
    three = QuantSpec(format="int3", symmetric=False)
    assert nbytes(three) == 4096 * 5376 + 2 * 458_752 + 4096 * 42
    assert nbytes(QuantSpec(format="int2")) == half // 2 + 2 * 458_752
    # per channel: one fp16 scale a row
    assert nbytes(QuantSpec(format="int8")) == 58_720_256 + 2 * 4096
    # scattered groups: an int32 a channel
    moving = QuantSpec(format="int4", algorithm="gptq", options={"static_groups": False})
    assert nbytes(moving) == half + 2 * 458_752 + 4 * 14336


def test_nf4_of_all_linears_is_what_the_floor_says():
    """6,979,321,856 weights in the 7B decoder's Linears: 32 layers of seven matrices."""
    shapes = [
        (4096, 4096),
        (1024, 4096),
        (1024, 4096),
        (4096, 4096),
        (14336, 4096),
        (14336, 4096),
        (4096, 14336),
    ]
    assert 32 * sum(n * k for n, k in shapes) == 6_979_321_856
    kept = 7_241_732_096 - 6_979_321_856
    total = {}
    for name, spec in (
        ("nf4", QuantSpec(format="nf4")),
        ("nf4-dq", QuantSpec(format="nf4", double_quant=True)),
        ("int4", QuantSpec(format="int4")),
    ):
        bytes_ = sum(
            torch.empty(s, dtype=d, device="meta").nbytes
            for shape in shapes
            for d, s in layout(spec, shape).values()
        )
        total[name] = 32 * bytes_ + 2 * kept
    assert total["nf4"] == 4_450_689_024
    assert total["int4"] == 4_123_533_312
    # that floor leaves out the offset: one fp32 for each of 224 matrices
    assert total["nf4-dq"] == 4_125_237_248 + 4 * 224


def test_wrong_tensors_are_refused():
    q = small(QuantSpec(format="int4", group_size=32, symmetric=False))
    good = q.tensors
    QuantizedTensor(q.spec, q.shape, dict(good))

    def refuse(message, **change):
        with pytest.raises(ValueError, match=message):
            QuantizedTensor(q.spec, q.shape, {**good, **change})

    with pytest.raises(ValueError, match=r"expected the tensors \['qweight', 'scales', 'zeros'\], got"):
        QuantizedTensor(q.spec, q.shape, {"qweight": good["qweight"], "scales": good["scales"]})
    refuse("got .*'bias'", bias=torch.zeros(5))
    refuse(
        r"qweight of a int4 weight \[5, 256\] must be torch.uint8 \[5, 128\]", qweight=good["qweight"].int()
    )
    refuse(r"must be torch.uint8 \[5, 128\], got torch.uint8 \[5, 127\]", qweight=good["qweight"][:, :127])
    refuse(r"got torch.uint8 \[128, 5\]", qweight=good["qweight"].t())
    refuse(r"scales .* must be torch.float16 \[5, 8\], got torch.float32", scales=good["scales"].float())
    refuse(r"scales .* \[5, 8\], got torch.float16 \[40\]", scales=good["scales"].flatten())
    refuse(r"zeros .* \[5, 4\], got torch.uint8 \[5, 5\]", zeros=torch.zeros(5, 5, dtype=torch.uint8))
    with pytest.raises(ValueError):
        QuantizedTensor(q.spec, (5, 128), good)
    with pytest.raises(ValueError):
        QuantizedTensor(q.spec, (4, 256), good)


def test_width_that_is_no_multiple_of_the_group():
    spec = QuantSpec(format="int4")
    with pytest.raises(
        ConfigError, match="width 576 is no multiple of group_size 128; group_size 16 or 32 or 64 or 96"
    ):
        layout(spec, (4, 576))
    with pytest.raises(ConfigError, match=r"width 17 .* 128; null \(per channel\) always fits"):
        layout(spec, (4, 17))
    with pytest.raises(ConfigError, match="width 64 is no multiple of group_size 128"):
        layout(spec, (4, 64))
    with pytest.raises(ConfigError, match="no multiple"):
        quantize_weight("w", torch.randn(4, 64), spec)


@pytest.mark.parametrize("spec", PRESET_SPECS[::5], ids=lambda s: f"{s.algorithm}-{s.format}-{s.group_size}")
def test_safetensors_round_trip(spec, tmp_path):
    q = small(spec)
    back = QuantizedTensor(q.spec, q.shape, load(save(q.tensors)))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(back.dequantize(dtype), q.dequantize(dtype))
    assert torch.equal(back.codes(), q.codes())


@pytest.mark.parametrize("format", list(FORMATS))
def test_dequantize_in_many_chunks_equals_the_plain_decoding(format):
    """Rows enough for several chunks, widths odd and even, against code by code."""
    for width, size in ((1030, None), (1029, 3), (1024, 64)):
        for symmetric in (True, False):
            if not symmetric and not format.startswith("int"):
                continue
            w = torch.randn(300, width, generator=torch.Generator().manual_seed(0))
            spec = QuantSpec(format=format, group_size=size, symmetric=symmetric)
            q = quantize_weight("w", w, spec)
            params = q.params()
            scale, zero = params.per_channel(width)
            expected = FORMATS[format].decode(q.codes(), scale, zero)
            assert torch.equal(q.dequantize(), expected)
            assert torch.equal(q.dequantize(torch.bfloat16), expected.to(torch.bfloat16))


def test_params_of_a_range_of_rows():
    for double_quant in (False, True):
        spec = QuantSpec(format="int3", group_size=32, symmetric=False, double_quant=double_quant)
        q = small(spec, rows=70)
        whole, part = q.params(), q.params(33, 61)
        assert torch.equal(part.scale, whole.scale[33:61])
        assert part.zero is not None and whole.zero is not None
        assert torch.equal(part.zero, whole.zero[33:61])


def test_measure():
    w = torch.tensor([[1.0, -1.0, 0.26, 0.0]])
    q = quantize_weight("w", w, QuantSpec(format="int2", group_size=4))
    # scale 1 / 1.5; 1 is cut off to one step, -1 goes to -2 steps, 0.26 to 0: errors 1/3, 1/3, 0.26
    hessian = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    outcome = measure("w", w, q, "because", hessian)
    error = torch.tensor([1 / 3, -1 / 3, 0.26, 0.0])
    assert outcome.relative_error == pytest.approx(float((error**2).sum() / (2 + 0.26**2)), rel=1e-3)
    weighed = float((error**2 * hessian.diagonal()).sum()) / (1 + 2 + 3 * 0.26**2)
    assert outcome.output_error == pytest.approx(weighed, rel=1e-3)
    assert (outcome.path, outcome.shape, outcome.reason) == ("w", (1, 4), "because")
    assert outcome.nbytes == q.nbytes == 1 + 2
    zero = torch.zeros(1, 4)
    assert measure("w", zero, quantize_weight("w", zero, q.spec), "").relative_error == 0.0


def test_errors_name_the_module():
    with pytest.raises(ValueError, match=r"^model\.layers\.3\.mlp: the weight .* holds 1 NaN"):
        quantize_weight("model.layers.3.mlp", torch.tensor([[1.0, float("nan")]]), QuantSpec(format="int8"))
    from brise.quant.gptq import HessianError

    spec = QuantSpec(format="int8", algorithm="gptq")
    with pytest.raises(HessianError, match=r"^q_proj: the Hessian holds NaN"):
        quantize_weight("q_proj", torch.randn(2, 2), spec, torch.full((2, 2), torch.nan))


@pytest.mark.parametrize("spec", PRESET_SPECS, ids=lambda s: f"{s.algorithm}-{s.format}-{s.group_size}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_decoded_by_several_threads_are_those_decoded_one_by_one(spec, dtype, monkeypatch):
    monkeypatch.setattr(dequantize, "_MANY", 1)
    monkeypatch.setattr(dequantize, "_CHUNK", 512)
    threads = torch.get_num_threads()
    q = small(spec, rows=21)
    one_by_one = torch.cat([decode_packed_row(q, row, dtype) for row in range(21)])
    try:
        torch.set_num_threads(3)
        assert torch.equal(q.dequantize(dtype), one_by_one)
        assert torch.equal(q.dequantize(dtype, 4, 17), one_by_one[4:17])
        with torch.inference_mode():  # a mode of the thread
            assert torch.equal(q.dequantize(dtype), one_by_one)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def decode_packed_row(q: QuantizedTensor, row: int, dtype: torch.dtype) -> torch.Tensor:
    scale, zero = q.params().rows(slice(row, row + 1)).per_channel(q.shape[1])
    return FORMATS[q.spec.format].decode(q.codes()[row : row + 1], scale, zero).to(dtype)
