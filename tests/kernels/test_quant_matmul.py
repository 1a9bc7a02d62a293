"""The quantized products on the CPU: oracles, gradients, layouts, and everything that must be refused."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from brise.kernels import checks, cpu, layout, native, ops, reference
from brise.kernels.budget import check_budget
from brise.quant.config import QuantSpec
from brise.quant.double_quant import dynamic_map
from brise.quant.nf4 import FP4_VALUES, NF4_VALUES
from brise.quant.packing import pack_codes
from brise.quant.rtn import rtn


@pytest.fixture(params=["compiled", "torch"])
def way(request):
    """The products of the CPU as they come, and as they are where nothing can be compiled."""
    if request.param == "torch":
        with native.without():
            yield request.param
    elif native.active() is None:
        pytest.skip("there is no C compiler here")
    else:
        yield request.param


MAP = dynamic_map(torch.device("cpu"))
FORMATS = sorted(reference.BITS)


def stored(fmt, n, k, group, symmetric=True, double=False, **options):
    """A random weight through the real quantizer -> (portable tensors, what they stand for in float64)."""
    spec = QuantSpec(format=fmt, group_size=group, symmetric=symmetric, double_quant=double, **options)
    q = rtn(torch.randn(n, k), spec)
    scale, zero = q.params().per_channel(k)
    codes = q.codes().double()
    if fmt in reference.CODEBOOKS:
        table = torch.tensor(NF4_VALUES if fmt == "nf4" else FP4_VALUES)
        return dict(q.tensors), table[q.codes().long()].double() * scale.double()
    return dict(q.tensors), (
        codes - (2 ** (reference.BITS[fmt] - 1) if zero is None else zero)
    ) * scale.double()


def packed(fmt, n, k, group, dtype=torch.float32, layout_name="portable", **how):
    tensors, dense = stored(fmt, n, k, group, **how)
    w = ops.pack_weight(tensors, fmt, (n, k), dtype, scales_map=MAP, layout_name=layout_name)
    return w, dense


CASES = [
    (fmt, symmetric, double)
    for fmt in FORMATS
    for symmetric in ((True, False) if fmt.startswith("int") else (True,))
    for double in (False, True)
]


@pytest.mark.parametrize("fmt,symmetric,double", CASES)
@pytest.mark.parametrize("group,k", [(32, 96), (None, 75), (24, 72)])
def test_every_path_of_the_cpu_keeps_the_budget(way, fmt, symmetric, double, group, k):
    torch.manual_seed(1)
    w, dense = packed(fmt, 37, k, group, symmetric=symmetric, double=double)
    for m, dtype in ((1, torch.float32), (3, torch.float16), (40, torch.bfloat16)):
        x = torch.randn(2, m, k).to(dtype)
        bias = torch.randn(37).to(dtype)
        exact = x.double() @ dense.T + bias.double()
        eager = ops.quant_matmul(x, w, bias, impl="reference")
        check_budget(eager, x @ dense.to(dtype).T + bias, exact, "reference")
        out = ops.quant_matmul(x, w, bias)
        assert out.shape == (2, m, 37) and out.dtype == dtype
        check_budget(out, eager, exact, f"{fmt} m {m} {dtype}")
        one_by_one = ops.quant_matmul(x, w, bias, batch_invariant=True)
        check_budget(one_by_one, eager, exact, "batch invariant")
        assert torch.equal(ops.quant_matmul(x[:, :1], w, bias, batch_invariant=True), one_by_one[:, :1])
    x = torch.randn(2, k, dtype=torch.float64)
    for impl in ("auto", "reference"):
        torch.testing.assert_close(ops.quant_matmul(x, w, impl=impl), x @ dense.T, rtol=1e-12, atol=1e-12)


def test_a_weight_larger_than_a_block_is_decoded_piece_by_piece(way, monkeypatch):
    monkeypatch.setattr(cpu, "_BLOCK", 1 << 10)
    for fmt in FORMATS:
        w, dense = packed(fmt, 130, 96, 32)
        x = torch.randn(5, 96)
        check_budget(ops.quant_matmul(x, w), x @ dense.float().T, x.double() @ dense.T, fmt)
        grad = torch.randn(5, 130)
        got = torch.ops.brise.__getattr__(f"{fmt}_matmul_backward")(
            grad, *(w.tensors.get(name) for name in checks.TENSORS), 96, "portable"
        )
        check_budget(got, grad @ dense.float(), grad.double() @ dense, fmt)


@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("fmt", ["int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_weights_keep_the_budget(way, fmt, m, dtype):
    """int4 is two products of half the channels, int8 under bf16 torch's own."""
    torch.manual_seed(4)
    w, dense = packed(fmt, 128, 512, 32 if fmt == "int4" else None)
    x, bias = torch.randn(m, 512).to(dtype), torch.randn(128)
    exact = x.double() @ dense.T + bias.double()
    eager = ops.quant_matmul(x, w, bias, impl="reference")
    check_budget(ops.quant_matmul(x, w, bias), eager, exact, f"{fmt} {m} {dtype}")
    alone = ops.quant_matmul(x, w, bias, batch_invariant=True)
    check_budget(alone, eager, exact)
    assert torch.equal(ops.quant_matmul(x[-1:], w, bias, batch_invariant=True), alone[-1:])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_torch_packed_int4_keeps_the_budget_of_bfloat16(symmetric, group):
    torch.manual_seed(2)
    with native.without():
        w, dense = packed("int4", 192, 256, group, torch.bfloat16, "auto", symmetric=symmetric)
    assert w.layout == "cpu_int4" and ("zeros" in w.tensors) != symmetric
    for m in (0, 1, 7):
        # a mean in x makes the rounding of the zero points add up, not average out
        x = (torch.randn(m, 256) + 1).to(torch.bfloat16)
        bias = torch.randn(192)
        out = ops.quant_matmul(x, w, bias)
        exact = x.double() @ dense.T + bias.double()
        eager = torch.nn.functional.linear(x, dense.to(torch.bfloat16), bias.to(torch.bfloat16))
        check_budget(out, eager, exact, f"int4pack m {m}")
        alone = ops.quant_matmul(x, w, bias, batch_invariant=True)
        for i in range(m):
            assert torch.equal(
                ops.quant_matmul(x[i : i + 1], w, bias, batch_invariant=True), alone[i : i + 1]
            )


def test_g_idx_orders_the_groups_freely():
    tensors, _ = stored("int4", 20, 64, 32, symmetric=False)
    g_idx = torch.randint(0, 2, (64,), dtype=torch.int32)
    w = ops.pack_weight({**tensors, "g_idx": g_idx}, "int4", (20, 64), torch.float32)
    codes = reference.unpack_codes(tensors["qweight"], 4, 64).double()
    zero = reference.unpack_codes(tensors["zeros"], 4, 2).double()
    dense = torch.stack(
        [(codes[:, i] - zero[:, g_idx[i]]) * tensors["scales"].double()[:, g_idx[i]] for i in range(64)],
        dim=1,
    )
    x = torch.randn(3, 64)
    check_budget(ops.quant_matmul(x, w), x @ dense.float().T, x.double() @ dense.T)
    with pytest.raises(ValueError, match="g_idx"):
        ops.pack_weight({**tensors, "g_idx": g_idx}, "int4", (20, 64), torch.float32, layout_name="tiles")


@pytest.mark.parametrize("fmt,symmetric,double", CASES)
def test_tiles_are_undone_to_the_bit(fmt, symmetric, double):
    for n, k, group in ((70, 192, 64), (16, 64, 32), (33, 50, None), (1030, 64, 64)):
        tensors, _ = stored(fmt, n, k, group, symmetric, double)
        w = ops.pack_weight(tensors, fmt, (n, k), torch.float16, scales_map=MAP, layout_name="tiles")
        back = ops.unpack_weight(w)
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_tile_is_the_operand_of_the_matrix_instruction():
    """One tile, worked out from the layout of mma.m16n8k16's A operand in the PTX manual: lane 4g + c, 16
    bytes."""
    codes = torch.arange(16 * 64, dtype=torch.int64).reshape(16, 64) * 7 % 16
    tiles = layout.to_tiles(pack_codes(codes.to(torch.uint8), 4), "int4", 16, 64)
    for g in range(8):
        for c in range(4):
            lane = tiles[(4 * g + c) * 16 : (4 * g + c + 1) * 16].view(torch.int32)
            for step in range(4):
                for i in range(4):
                    row, k = g + 8 * (i % 2), 16 * step + 2 * c + 8 * (i // 2)
                    word = int(lane[step]) & 0xFFFFFFFF
                    assert (word >> (4 * i)) & 15 == codes[row, k]
                    assert (word >> (4 * i + 16)) & 15 == codes[row, k + 1]


@pytest.mark.parametrize("fmt", FORMATS)
def test_gradients_reach_x_and_bias(fmt):
    w, dense = packed(fmt, 24, 64, 32)
    x = torch.randn(2, 5, 64, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    up = torch.randn(2, 5, 24)
    ops.quant_matmul(x, w, bias).backward(up)
    torch.testing.assert_close(x.grad, (up.double() @ dense).float())
    torch.testing.assert_close(bias.grad, up.sum((0, 1)))


def test_the_gradient_through_torch_packed_int4_is_that_of_the_weight_it_holds():
    w, dense = packed("int4", 64, 1056, 32, torch.bfloat16, "cpu_int4", symmetric=False)
    x = torch.randn(3, 1056).bfloat16().requires_grad_()
    up = torch.randn(3, 64).bfloat16()
    ops.quant_matmul(x, w).backward(up)
    exact = up.double() @ dense
    check_budget(x.grad, up @ dense.bfloat16(), exact)


@pytest.mark.parametrize("fmt", FORMATS)
def test_opcheck(fmt):
    w, _ = packed(fmt, 24, 64, 32)
    t = [w.tensors.get(name) for name in checks.TENSORS]
    x = torch.randn(3, 64, requires_grad=True)
    op = getattr(torch.ops.brise, f"{fmt}_matmul")
    torch.library.opcheck(op.default, (x, *t, torch.randn(24), 24, "portable", "auto", False))


def test_opcheck_int8_dynamic():
    w, _ = packed("int8", 24, 64, None)
    arguments = (torch.randn(3, 64), w.tensors["qweight"], w.tensors["scales"], None, 6.0, "auto")
    torch.library.opcheck(torch.ops.brise.int8_dynamic_matmul.default, arguments)


def test_compiles_into_one_graph():
    w, _ = packed("nf4", 24, 64, 64, double=True)
    f = torch.compile(lambda x: ops.quant_matmul(x, w).relu(), fullgraph=True, backend="aot_eager")
    for m in (3, 4, 5):
        x = torch.randn(m, 64)
        assert torch.equal(f(x), ops.quant_matmul(x, w).relu())


@pytest.mark.parametrize(
    "how", [{}, {"double": True}, {"symmetric": False}], ids=["plain", "double", "zeros"]
)
def test_one_graph_serves_any_number_of_tokens_forwards_and_backwards(how):
    w, _ = packed("int4", 24, 64, 32, **how)
    counted = CompileCounterWithBackend("aot_eager")
    f = torch.compile(lambda x: ops.quant_matmul(x, w).relu(), fullgraph=True, dynamic=True, backend=counted)
    # none of them a size of the weight's, which a compiler would take for the same
    for m in (5, 3, 17, 65, 400):
        ours, plain = (torch.ones(m, 64).div(m).requires_grad_() for _ in "ab")
        out, want = f(ours), ops.quant_matmul(plain, w).relu()
        assert torch.equal(out, want)
        out.sum().backward()
        want.sum().backward()
        assert torch.equal(ours.grad, plain.grad)
    assert counted.frame_count == 1


def test_a_gradient_that_would_never_come_is_refused():
    for how, name in (({}, "scales"), ({"double": True}, "scales_absmax")):
        w, _ = packed("int4", 20, 64, 32, **how)
        w.tensors[name] = w.tensors[name].clone().requires_grad_()
        for x in (torch.randn(3, 64), torch.randn(3, 64, requires_grad=True)):
            with pytest.raises(ValueError, match=f"none to {name} of the weight: detach"):
                ops.quant_matmul(x, w)
        with torch.no_grad():
            assert not ops.quant_matmul(x, w).requires_grad


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_int8_dynamic_rounds_tokens_and_spares_outliers(impl):
    torch.manual_seed(3)
    w, dense = packed("int8", 30, 64, None)
    x = torch.randn(5, 64)
    x[2, 7] = 40.0
    plain = ops.int8_dynamic_matmul(x, w, impl=impl)
    spared = ops.int8_dynamic_matmul(x, w, threshold=6.0, impl=impl)
    exact = x.double() @ dense.T
    # by hand: one scale a token, the outlier column in floating point
    rest = x.clone()
    rest[:, 7] = 0
    scale = rest.abs().amax(1, keepdim=True) / 127
    want = (rest / scale).round().double() * scale.double() @ dense.T + x[:, 7:8].double() @ dense.T[7:8]
    torch.testing.assert_close(spared.double(), want, rtol=1e-5, atol=1e-5)
    assert (spared[2] - exact[2]).norm() < (plain[2] - exact[2]).norm() / 3
    zero = torch.zeros(2, 64)
    assert not ops.int8_dynamic_matmul(zero, w, impl=impl).any()
    assert ops.int8_dynamic_matmul(zero[:0], w, impl=impl).shape == (0, 30)
    # whose reciprocal times 127 is no number, and what is none itself
    odd = torch.randn(4, 64)
    odd[0] *= 1e-39
    odd[1, 3], odd[2, 5] = float("nan"), float("inf")
    out = ops.int8_dynamic_matmul(odd, w, impl=impl)
    assert not out[0].any() and not out[1:3].isfinite().any() and out[3].isfinite().all()


def refuse(match, error=ValueError, **changes):
    """Change one thing of a good call; the error must match and carry the value."""
    w, _ = packed("int4", 20, 64, 32, symmetric=False)
    given = {"x": torch.randn(3, 64), "bias": None, "impl": "auto", **w.tensors} | changes
    w = ops.PackedWeight("int4", (20, 64), given.pop("layout", "portable"), {k: given[k] for k in w.tensors})
    with pytest.raises(error, match=match):
        ops.quant_matmul(given["x"], w, given["bias"], impl=given["impl"])


def test_bad_input_is_refused_with_its_values():
    refuse(r"qweight .*\[20, 31\].*\[20, 32\]", x=torch.randn(3, 62))
    refuse(r"float.*int64", TypeError, x=torch.ones(3, 64, dtype=torch.int64))
    refuse(r"bias must be \[20\], got \[19\]", bias=torch.zeros(19))
    refuse(r"uint8, got torch.int32", TypeError, qweight=torch.zeros(20, 32, dtype=torch.int32))
    refuse(r"contiguous.*strides \[1, 20\]", qweight=torch.zeros(32, 20, dtype=torch.uint8).T)
    refuse(r"3 groups do not divide K = 64", scales=torch.ones(20, 3))
    refuse(r"\[20, groups\], got \[19, 2\]", scales=torch.ones(19, 2))
    refuse(r"scales must be floating point.*int32", TypeError, scales=torch.ones(20, 2, dtype=torch.int32))
    refuse(r"needs scales_absmax", scales=torch.ones(20, 2, dtype=torch.uint8))
    refuse(r"zeros .*\[20, 1\], got \[20, 2\]", zeros=torch.zeros(20, 2, dtype=torch.uint8))
    refuse(r"impl must be", impl="fast")
    refuse(r"layout must be one of", layout="tile")
    refuse(r"contiguous bytes of int4", layout="tiles")
    refuse(
        r"contiguous \[groups, 20\], got \[20\]",
        layout="tiles",
        qweight=torch.zeros(1024, dtype=torch.uint8),
        scales=torch.ones(20),
    )
    refuse(r"impl='triton' reads layout tiles", impl="triton")
    refuse(r"x is on cpu, qweight on meta", qweight=torch.zeros(20, 32, dtype=torch.uint8, device="meta"))


def test_what_belongs_to_tiled_codes_is_looked_at_as_well():
    x = torch.randn(3, 64)

    def refuse(says, error=ValueError, fmt="int4", layout_name="tiles", x=x, **changes):
        group, how = (64, {}) if fmt == "nf4" else (32, {"symmetric": False})
        w, _ = packed(fmt, 64, 64, group, torch.bfloat16, layout_name, **how, **changes.pop("how", {}))
        w.tensors.update({name: t(w) if callable(t) else t for name, t in changes.items()})
        with pytest.raises(error, match=says):
            ops.quant_matmul(x, w)

    codes = torch.zeros(2, 64, dtype=torch.uint8)
    refuse(r"zeros .*\[2, 64\], got \[64, 2\]", zeros=codes.T.contiguous())
    refuse(r"zeros .* must be torch.uint8, got torch.float32", TypeError, zeros=codes.float())
    refuse(r"zeros must be contiguous", zeros=codes.T.contiguous().T)
    refuse(r"nf4 has no zero points", fmt="nf4", zeros=codes[:1])
    refuse(r"scales must be floating point.*int32", TypeError, scales=codes.int())
    refuse(r"needs scales_absmax", scales=codes)
    refuse(r"scales_absmax .*\[1\], got \[2\]", how={"double": True}, scales_absmax=torch.ones(2))
    refuse(r"scales_map .*\[256\], got \[255\]", how={"double": True}, scales_map=torch.ones(255))
    refuse(r"scales_absmax are for scales in uint8", scales_absmax=torch.ones(1))
    refuse(r"layout tiles has no g_idx", g_idx=torch.zeros(64, dtype=torch.int32))
    half = {"layout_name": "cpu_int4", "x": x.bfloat16()}
    refuse(r"zeros .* must be torch.float32, got torch.uint8", TypeError, zeros=codes, **half)
    refuse(r"zeros .*\[2, 64\], got \[1, 64\]", zeros=codes[:1].float(), **half)
    w, _ = packed("int4", 20, 64, 32)
    extra = ops.PackedWeight("int4", (20, 64), "portable", w.tensors | {"scales_map": torch.ones(256)})
    with pytest.raises(ValueError, match="scales_map are for scales in uint8"):
        ops.quant_matmul(x, extra)


def test_layouts_refuse_what_they_cannot_hold():
    tensors, _ = stored("nf4", 20, 96, 48)
    with pytest.raises(ValueError, match="in groups of 48"):
        ops.pack_weight(tensors, "nf4", (20, 96), torch.float16, layout_name="tiles")
    with pytest.raises(ValueError, match=r"cpu_int4 takes int4.*got nf4 \[20, 96\]"):
        ops.pack_weight(tensors, "nf4", (20, 96), torch.bfloat16, layout_name="cpu_int4")
    with pytest.raises(ValueError, match="nf4 has no zero points"):
        ops.pack_weight(
            {**tensors, "zeros": torch.zeros(20, 1, dtype=torch.uint8)}, "nf4", (20, 96), torch.float32
        )
    with pytest.raises(ValueError, match="unknown tensors"):
        ops.pack_weight({**tensors, "scale": tensors["scales"]}, "nf4", (20, 96), torch.float32)
    with pytest.raises(ValueError, match=r"format must be one of.*'int5'"):
        ops.pack_weight(tensors, "int5", (20, 96), torch.float32)
    w, _ = packed("int4", 64, 64, 32, torch.bfloat16, "cpu_int4")
    with pytest.raises(TypeError, match=r"bfloat16 activations, got torch\.float32"):
        ops.quant_matmul(torch.randn(1, 64), w)
    with pytest.raises(ValueError, match="cannot be undone"):
        ops.unpack_weight(w)
    tiles, _ = packed("int4", 64, 64, 32, torch.float16, "tiles")
    with pytest.raises(ValueError, match="needs a GPU tensor"):
        ops.quant_matmul(torch.randn(1, 64), tiles, impl="triton")


def test_an_empty_batch_and_a_tiled_weight_on_the_cpu():
    w, dense = packed("int4", 20, 64, 32, torch.float32, "tiles")
    assert ops.quant_matmul(torch.randn(0, 64), w).shape == (0, 20)
    x = torch.randn(2, 64)
    check_budget(ops.quant_matmul(x, w), x @ dense.float().T, x.double() @ dense.T)


def test_import_needs_no_triton_and_does_nothing():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import os; before = dict(os.environ)\n"
        "import torch; torch.cuda.is_available = lambda: 1 / 0\n"
        "import brise.kernels.ops\n"
        "assert dict(os.environ) == before and not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
