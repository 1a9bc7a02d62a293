"""Single weights of other libraries: against layouts written out bit by bit, and back to the same tensors."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brise.quant.config import QuantSpec
from brise.quant.formats import FORMATS
from brise.quant.gptq import GPTQOptions
from brise.quant.interop.awq import AWQWeight
from brise.quant.interop.bitsandbytes import STATE, Bits4Weight, Int8Weight, decode4, read_state
from brise.quant.interop.compressed_tensors import PackedWeight
from brise.quant.interop.ggml import BLOCKS
from brise.quant.interop.gptq import GPTQWeight
from brise.quant.interop.restate import Unfit, check_restate, restate
from brise.quant.tensor import Params, QuantizedTensor, groups_per_row

from . import interop_twins as twins


def made(spec: QuantSpec, rows: int, width: int, seed: int = 0, low_zero: int = 1) -> QuantizedTensor:
    """Random codes of all values, random scales of both signs, zero points from ``low_zero``."""
    rng = torch.Generator().manual_seed(seed)
    top = 1 << FORMATS[spec.format].bits
    groups = groups_per_row(spec, (rows, width))
    codes = torch.randint(0, top, (rows, width), generator=rng, dtype=torch.uint8)
    scale = torch.randn(rows, groups, generator=rng)
    if not spec.format.startswith("int"):
        scale = scale.abs() + 0.1
    scale = scale.to(getattr(torch, spec.scale_dtype)).float()
    zero = None
    if not spec.symmetric:
        zero = torch.randint(low_zero, top, (rows, groups), generator=rng, dtype=torch.uint8)
    g_idx = None
    if getattr(spec.options, "permutes_groups", False) and groups > 1:
        g_idx = torch.randperm(width, generator=rng).to(torch.int32) // (width // groups)
    return QuantizedTensor.assemble(spec, codes, Params(scale, zero, g_idx))


def zeros_of(q: QuantizedTensor) -> list[list[int]]:
    zero = q.params().zero
    if zero is None:
        middle = 1 << (FORMATS[q.spec.format].bits - 1)
        return [[middle] * groups_per_row(q.spec, q.shape)] * q.shape[0]
    return zero.tolist()


ACT_ORDER = GPTQOptions(act_order=True, static_groups=False)
INTEGERS = [
    QuantSpec(format=f"int{bits}", group_size=32, symmetric=symmetric, algorithm=algorithm, options=options)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for algorithm, options in (("rtn", None), ("gptq", ACT_ORDER))
]


def name(spec: QuantSpec) -> str:
    return f"{spec.format}{'' if spec.symmetric else '-asym'}{'-order' if spec.algorithm == 'gptq' else ''}"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("spec", INTEGERS, ids=name)
def test_gptq_is_what_the_layout_says(spec, version):
    q = made(spec, 32, 96)
    stored = GPTQWeight(version).write(q)
    qweight, qzeros = twins.gptq(q.codes().tolist(), zeros_of(q), FORMATS[spec.format].bits, version)
    assert torch.equal(stored["qweight"], qweight) and torch.equal(stored["qzeros"], qzeros)
    assert torch.equal(stored["scales"], q.tensors["scales"].t())
    g_idx = q.tensors.get("g_idx", torch.arange(96, dtype=torch.int32) // 32)
    assert torch.equal(stored["g_idx"], g_idx) and stored["g_idx"].dtype == torch.int32
    assert {t.dtype for n, t in stored.items() if n != "scales"} == {torch.int32}
    back = GPTQWeight(version).read(stored, spec, q.shape)
    assert all(torch.equal(back.tensors[n], t) for n, t in q.tensors.items())


def test_gptq_zero_points_of_the_two_versions():
    q = made(QuantSpec(format="int4", group_size=32), 32, 32)
    assert set(GPTQWeight(1).write(q)["qzeros"].flatten().tolist()) == {0x77777777}
    assert set(GPTQWeight(2).write(q)["qzeros"].flatten().tolist()) == {0x88888888 - (1 << 32)}


def test_gptq_labels_that_the_zero_points_contradict_are_refused():
    sym, asym = (QuantSpec(format="int4", group_size=32, symmetric=s) for s in (True, False))
    q = made(sym, 32, 64)
    for wrote, reads in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match=f"as in version {wrote}: the label is wrong"):
            GPTQWeight(reads).read(GPTQWeight(wrote).write(q), sym, q.shape)
    mixed = made(asym, 32, 64)
    with pytest.raises(ValueError, match="must be 8; found 1 to 15"):
        GPTQWeight(2).read(GPTQWeight(2).write(mixed), sym, q.shape)
    with pytest.raises(ValueError, match="a stored zero point is 15"):
        GPTQWeight(1).read(GPTQWeight(2).write(mixed), asym, q.shape)
    with pytest.raises(Unfit, match="zero points of 0"):
        GPTQWeight(1).write(made(asym, 32, 64, low_zero=0))


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_is_what_the_layout_says(symmetric):
    q = made(QuantSpec(format="int4", group_size=32, symmetric=symmetric), 24, 64, low_zero=0)
    target = AWQWeight().target(q.spec, q.shape)
    stored = AWQWeight().write(restate(q, target))
    qweight, qzeros = twins.awq(q.codes().tolist(), zeros_of(q))
    assert torch.equal(stored["qweight"], qweight) and torch.equal(stored["qzeros"], qzeros)
    back = AWQWeight().read(stored, target, q.shape)
    assert torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize("spec", [s for s in INTEGERS if s.format in ("int4", "int8")], ids=name)
def test_compressed_tensors_is_what_the_layout_says(spec):
    q = made(spec, 5, 96, low_zero=0)
    stored = PackedWeight("float16").write(q)
    packed, points = twins.compressed_tensors(q.codes().tolist(), zeros_of(q), FORMATS[spec.format].bits)
    assert torch.equal(stored["weight_packed"], packed)
    assert spec.symmetric or torch.equal(stored["weight_zero_point"], points)
    assert ("weight_zero_point" in stored) == (not spec.symmetric)
    assert stored["weight_shape"].tolist() == [5, 96]
    back = PackedWeight().read(stored, spec, q.shape)
    assert all(torch.equal(back.tensors[n], t) for n, t in q.tensors.items())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4_bits_is_what_bitsandbytes_makes(kind, double_quant):
    bnb = pytest.importorskip("bitsandbytes")
    w = torch.randn(6, 128)
    packed, state = bnb.functional.quantize_4bit(
        w, blocksize=64, compress_statistics=double_quant, quant_type=kind
    )
    theirs = {"weight": packed, **{f"weight.{n}": t for n, t in state.as_dict(packed=True).items()}}
    spec = QuantSpec(format=kind, double_quant=double_quant)
    q = Bits4Weight().read(theirs, spec, (6, 128))
    assert torch.equal(q.dequantize(), bnb.functional.dequantize_4bit(packed, state))
    ours = Bits4Weight().write(q)
    assert set(ours) == set(theirs)
    for leaf, tensor in theirs.items():
        if leaf.startswith(STATE):
            assert json.loads(bytes(ours[leaf].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert torch.equal(ours[leaf], tensor) and ours[leaf].dtype == tensor.dtype, leaf


def test_bitsandbytes_blocks_that_reach_over_rows_are_decoded():
    bnb = pytest.importorskip("bitsandbytes")
    w = torch.randn(5, 47)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = {"weight": packed, **{f"weight.{n}": t for n, t in state.as_dict(packed=True).items()}}
    assert torch.equal(decode4(theirs), bnb.functional.dequantize_4bit(packed, state))


def test_bitsandbytes_int8_is_what_bitsandbytes_makes():
    bnb = pytest.importorskip("bitsandbytes")
    w = torch.randn(16, 64)
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(w.half())
    spec = QuantSpec(format="int8", group_size=None, scale_dtype="float32")
    q = Int8Weight().read({"weight": codes, "SCB": absmax}, spec, (16, 64))
    ours = Int8Weight().write(q)
    assert torch.equal(ours["weight"], codes) and torch.equal(ours["SCB"] / 127, absmax / 127)
    assert ours["weight_format"].dtype == torch.uint8 and ours["weight_format"].shape == ()
    theirs = bnb.functional.int8_vectorwise_dequant(codes, absmax)
    assert torch.allclose(q.dequantize(), theirs, rtol=3 * 2**-23, atol=0)


@given(st.integers(0, 2**20))
@settings(max_examples=30)
def test_an_absmax_gives_a_half_precision_scale_back(seed):
    scale = torch.randn(64, 1, generator=torch.Generator().manual_seed(seed)).half().float()
    assert Int8Weight().admit(Params(scale)) == 0.0
    q = made(QuantSpec(format="int8", group_size=None, scale_dtype="float32"), 64, 32, seed)
    stored = Int8Weight().write(q)["SCB"] / 127
    assert torch.allclose(stored, q.tensors["scales"].flatten(), rtol=2**-23, atol=0)


STATE_OF_4 = '"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 64]'


@pytest.mark.parametrize(
    "text, says",
    [
        ("[" * 5000, "no JSON"),
        ("{}", "must have"),
        ('{"quant_type": "nf4", "blocksize": 63, "dtype": "float32", "shape": [4, 64]}', "not read"),
        ('{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, -64]}', "not read"),
        ('{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 1e9]}', "not read"),
        (" " * 20000, "few bytes"),
        (
            f'{{{STATE_OF_4}, "nested_blocksize": 128, "nested_dtype": "float32", "nested_offset": 0.1}}',
            "not read",
        ),
        (
            f'{{{STATE_OF_4}, "nested_blocksize": 256, "nested_dtype": "float16", "nested_offset": 0.1}}',
            "not read",
        ),
        (f'{{{STATE_OF_4}, "nested_offset": 0.1}}', "must have"),
    ],
)
def test_a_quant_state_that_makes_no_sense_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        read_state(torch.tensor(list(text.encode()), dtype=torch.uint8))


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    to=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.tuples(st.booleans(), st.booleans()),
    group=st.sampled_from([None, 64, 32]),
    smaller=st.sampled_from([None, 64, 32, 16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_what_is_said_anew_has_the_same_value(bits, to, symmetric, group, smaller, seed):
    q = made(QuantSpec(format=f"int{bits}", group_size=group, symmetric=symmetric[0]), 4, 64, seed)
    target = QuantSpec(format=f"int{to}", group_size=smaller, symmetric=symmetric[1])
    coarser = groups_per_row(target, q.shape) < groups_per_row(q.spec, q.shape)
    try:
        other = restate(q, target)
    except Unfit:
        assert to < bits or coarser or (symmetric == (False, True) and to < 2 * bits)
        return
    assert other.spec == target and torch.equal(other.dequantize(), q.dequantize())
    assert check_restate(q, target).rounding == 0.0


def test_rounded_scales_are_measured():
    exact = QuantSpec(format="int4", group_size=32, scale_dtype="float32")
    q = made(exact, 8, 64)
    rounded = dataclasses.replace(exact, scale_dtype="bfloat16")
    how = check_restate(q, rounded)
    scales, stored = q.tensors["scales"], restate(q, rounded).tensors["scales"].float()
    assert how.rounding == float(((stored - scales) / scales).abs().max()) > 0
    assert how.rounding <= 2**-8
    huge = QuantizedTensor(exact, q.shape, {**q.tensors, "scales": scales * 1e30})
    with pytest.raises(Unfit, match="does not fit float16"):
        check_restate(huge, dataclasses.replace(exact, scale_dtype="float16"))


PLAIN = QuantSpec(format="int4", group_size=32)
ORDERED = {"algorithm": "gptq", "options": ACT_ORDER}


def spec(**changes) -> QuantSpec:
    return dataclasses.replace(PLAIN, **changes)


@pytest.mark.parametrize(
    "writer, asked, shape, why",
    [
        (GPTQWeight(2), spec(), (12, 64), "12 output channels of 4 bits"),
        (GPTQWeight(1), spec(format="int3"), (32, 96 + 16), "112 input channels of 3 bits"),
        (GPTQWeight(2), spec(format="nf4"), (32, 64), "not nf4"),
        (AWQWeight(), spec(), (12, 64), "12 output channels do not fill words of 8"),
        (AWQWeight(), spec(format="int8"), (8, 64), "4 bits, not int8"),
        (AWQWeight(), spec(**ORDERED), (8, 64), "no neighbouring channels"),
        (Bits4Weight(), spec(format="nf4", group_size=16), (4, 64), "4096, not 16"),
        (Bits4Weight(), spec(format="nf4", group_size=None), (4, 96), "4096, not 96"),
        (Bits4Weight(), spec(format="fp4", **ORDERED), (4, 64), "no neighbouring channels"),
        (Bits4Weight(), spec(), (4, 64), "nf4 and fp4, not int4"),
        (Int8Weight(), spec(format="nf4"), (4, 64), "holds integers"),
        (Int8Weight(), spec(format="int8"), (4, 64), "one scale a row"),
        (PackedWeight(), spec(format="nf4"), (4, 64), "holds integers"),
        (PackedWeight(), spec(**ORDERED), (4, 64), "no longer reads a g_idx"),
        (BLOCKS["Q4_0"], spec(format="int8"), (4, 64), "more values than Q4_0"),
        (BLOCKS["Q8_0"], spec(format="nf4"), (4, 64), "holds integers"),
        (BLOCKS["Q8_0"], spec(group_size=None), (4, 48), "no multiple of Q8_0's block of 32"),
        (BLOCKS["Q4_0"], spec(**ORDERED), (4, 64), "no neighbouring channels"),
    ],
)
def test_what_a_format_cannot_hold_is_said(writer, asked, shape, why):
    with pytest.raises(Unfit, match=why):
        writer.target(asked, shape)


@pytest.mark.parametrize(
    "writer, asked, stored",
    [
        (GPTQWeight(1), spec(format="int3", double_quant=True), {"format": "int3", "scale_dtype": "float16"}),
        (GPTQWeight(2), spec(scale_dtype="float32", **ORDERED), {"scale_dtype": "float16", **ORDERED}),
        (AWQWeight(), spec(format="int3", double_quant=True), {"symmetric": False}),
        (AWQWeight(), spec(scale="absmax_narrow"), {"symmetric": False, "scale": "absmax"}),
        (PackedWeight("bfloat16"), spec(format="int3"), {"scale_dtype": "bfloat16"}),
        (PackedWeight("float32"), spec(format="int2", double_quant=True), {"scale_dtype": "float32"}),
        (PackedWeight("float32"), spec(format="int8"), {"format": "int8", "scale_dtype": "float32"}),
        (Bits4Weight(), spec(format="nf4", double_quant=True), {"format": "nf4", "double_quant": True,
                                                               "scale_dtype": "float32"}),
        (Int8Weight(), spec(group_size=64), {"format": "int8", "group_size": None, "scale_dtype": "float32"}),
        (BLOCKS["Q4_0"], spec(format="int2", double_quant=True), {}),
        (BLOCKS["Q8_0"], spec(), {"format": "int8"}),
        (BLOCKS["Q4_1"], spec(symmetric=False), {"format": "int4_min", "symmetric": False}),
    ],
)  # fmt: skip
def test_what_a_weight_becomes(writer, asked, stored):
    assert writer.target(asked, (32, 64)) == spec(**stored)


def test_int8_of_another_layout_is_refused():
    stored = Int8Weight().write(made(spec(format="int8", group_size=None, scale_dtype="float32"), 4, 32))
    asked = Int8Weight().target(spec(format="int8", group_size=None), (4, 32))
    for layout in (1, 2):
        with pytest.raises(ValueError, match=f"weight_format is {layout}"):
            Int8Weight().read(
                {**stored, "weight_format": torch.tensor(layout, dtype=torch.uint8)}, asked, (4, 32)
            )


def test_an_order_of_channels_cannot_be_dropped():
    q = made(INTEGERS[9], 32, 64)
    assert q.spec.algorithm == "gptq" and "g_idx" in q.tensors
    with pytest.raises(Unfit, match="no neighbouring channels"):
        restate(q, dataclasses.replace(q.spec, algorithm="rtn", options=None))
    with pytest.raises(Unfit, match="no neighbouring channels"):
        AWQWeight().target(q.spec, q.shape)
