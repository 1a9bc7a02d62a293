"""The products with epilogues: against float64 and the ops that they stand for, checked, compiled; on a GPU as well."""

import dataclasses

import pytest
import torch

from brise.kernels import epilogue_reference, fused_reference, ops, tuning
from brise.kernels.budget import check_budget
from brise.quant.config import QuantSpec
from brise.quant.double_quant import dynamic_map
from brise.quant.rtn import rtn

EPS = 1e-5
SPECS = [
    QuantSpec(format="int4", group_size=64),
    QuantSpec(format="int4", group_size=32, symmetric=False),
    QuantSpec(format="nf4"),
    QuantSpec(format="nf4", double_quant=True),
    QuantSpec(format="int8", group_size=None),
    QuantSpec(format="int3", group_size=64),
    QuantSpec(format="int2", group_size=64, symmetric=False),
]
IDS = [f"{s.format}{'' if s.symmetric else '-asym'}{'-dq' * s.double_quant}" for s in SPECS]


def packed(spec, n, k, dtype, device="cpu"):
    """A weight in tiles, and in float64."""
    generator = torch.Generator().manual_seed(n + k)
    q = rtn((torch.randn(n, k, generator=generator) * 0.05).to(device), spec)
    scales_map = dynamic_map(torch.device(device)) if spec.double_quant else None
    w = ops.pack_weight(q.tensors, spec.format, (n, k), dtype, scales_map=scales_map, layout_name="tiles")
    return w, q.dequantize(torch.float64)


def half_normed(m, k, dtype, device="cpu"):
    """A stream on its way through a norm, the norm in its own precision, and in float64."""
    h = (torch.randn(m, k, device=device) * (1 + torch.rand(m, 1, device=device))).to(dtype)
    norm = (torch.rand(k, device=device) + 0.5).to(dtype)
    half = ops.HalfNormed(h * norm, epilogue_reference.square_sums(h))
    return (
        half,
        fused_reference.rms_norm(h, norm, EPS),
        fused_reference.rms_norm(h.double(), norm.double(), EPS),
    )


def rotary(batch, tokens, width, dtype, device="cpu"):
    angle = torch.rand(batch, tokens, width, dtype=torch.float64, device=device) * 6
    return angle.cos().to(dtype), angle.sin().to(dtype)


def check_all(spec, m, dtype, sizes, device="cpu", **how):
    """All three, of half-normed and of plain inputs: twice the error of separate eager operators at the most."""
    (n, k, inner), (heads, groups, width, slots) = sizes
    linear = torch.nn.functional.linear
    w, dense = packed(spec, n, k, dtype, device)
    x = torch.randn(m, k, device=device).to(dtype)
    stream = torch.randn(m, n, device=device).to(dtype) * 3
    norm = (torch.rand(n, device=device) + 0.5).to(dtype)
    h, half = ops.matmul_residual(x, w, stream, norm, **how)
    eager, exact = stream + linear(x, dense.to(dtype)), stream.double() + x.double() @ dense.T
    check_budget(h, eager, exact, "residual")
    check_budget(half.values, eager * norm, exact * norm.double(), "residual and norm")
    squares = h.double().square().sum(-1)
    torch.testing.assert_close(half.sums.double().sum(0), squares, rtol=1e-5, atol=0)
    alone, none = ops.matmul_residual(x, w, stream, **how)
    assert torch.equal(alone, h) and none is None

    w, dense = packed(spec, 2 * inner, k, dtype, device)
    half, plain, right = half_normed(m, k, dtype, device)
    for given, eager, exact in ((half, plain, right), (plain, plain, plain.double())):
        out = ops.matmul_swiglu(given, w, EPS, **how)
        eager = fused_reference.swiglu(*linear(eager, dense.to(dtype)).chunk(2, dim=-1))
        exact = fused_reference.swiglu(*(exact @ dense.T).chunk(2, dim=-1))
        check_budget(out, eager, exact, "swiglu")
        assert torch.equal(out, ops.matmul_swiglu(given, w, EPS, **how))

    w, dense = packed(spec, (heads + 2 * groups) * width, k, dtype, device)
    cos, sin = rotary(m, 1, width, dtype, device)
    positions = torch.arange(m, dtype=torch.int32, device=device) * 3 - 1
    rings = [torch.full((m, groups, slots, width), 7.0, dtype=dtype, device=device) for _ in "kv"]
    q = ops.matmul_rope_cache_write(half, w, cos, sin, positions, *rings, EPS, **how)
    for kind, angles in ((dtype, (cos, sin)), (torch.float64, (cos.double(), sin.double()))):
        y = linear(plain if kind == dtype else right, dense.to(kind)).view(m, 1, -1, width)
        parts = list(y.split([heads, groups, groups], dim=2))
        made = [torch.full((m, groups, slots, width), 7.0, dtype=kind, device=device) for _ in "kv"]
        parts[:2] = (fused_reference.rotate(part, *angles) for part in parts[:2])
        fused_reference.cache_write(*parts[1:], positions, *made, None, None)
        if kind == dtype:
            eager = [parts[0], *made]
        else:
            exact = [parts[0], *made]
    for out, a, b in zip((q, *rings), eager, exact):
        check_budget(out, a, b, "rope")
    assert q.shape == (m, 1, heads, width) and bool((rings[0][0] == 7).all()), "a resting row was written"


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_keeps_the_budget(spec, dtype):
    check_all(spec, 5, dtype, ((72, 128, 48), (3, 1, 32, 6)))
    check_all(spec, 5, dtype, ((72, 128, 48), (3, 1, 32, 6)), batch_invariant=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_every_number_of_tokens_keeps_the_budget_on_a_gpu(spec, dtype):
    for m in (1, 3, 16, 17, 33, tuning.STEP_ROWS):
        for sizes in (((1000, 1024, 1040), (5, 2, 96, 9)), ((4096, 4096, 2048), (32, 8, 128, 64))):
            for how in ({}, {"batch_invariant": True}):
                check_all(spec, m, dtype, sizes, "cuda", impl="triton", **how)


def arguments(dtype=torch.float32, m=2):
    w, _ = packed(SPECS[0], 128, 64, dtype)
    half, _, _ = half_normed(m, 64, dtype)
    rings = [torch.zeros(m, 1, 5, 32, dtype=dtype) for _ in "kv"]
    return w, half, (*rotary(m, 1, 32, dtype), torch.arange(m)), rings


def test_opcheck():
    w, half, turn, rings = arguments()
    t = [w.tensors.get(name) for name in ops_tensors()]
    stream, norm, brise = torch.randn(2, 128), torch.rand(128), torch.ops.brise
    for given in (norm, None):
        torch.library.opcheck(
            brise.matmul_residual.default, (half.values, *t, stream, given, "int4", "auto", False)
        )
    for sums in (half.sums, None):
        torch.library.opcheck(
            brise.matmul_swiglu.default, (half.values, *t, sums, EPS, 128, "int4", "auto", False)
        )
        torch.library.opcheck(
            brise.matmul_rope_cache_write.default,
            (half.values, *t, sums, EPS, *turn, *rings, 128, "int4", "auto", False),
        )


def ops_tensors():
    from brise.kernels.checks import TENSORS

    return TENSORS[:6]


def test_compiles_into_one_graph():
    """The write is not lost, and what reads the ring afterwards sees it."""
    w, half, (cos, sin, at), mine = arguments()
    theirs = [ring.clone() for ring in mine]

    def step(values, sums, keys, held):
        x = ops.HalfNormed(values, sums)
        q = ops.matmul_rope_cache_write(x, w, cos, sin, at, keys, held, EPS)
        return ops.decode_attention(q[:, 0], keys, held, at + 1) + ops.matmul_swiglu(x, w, EPS).view(2, 2, 32)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(half.values, half.sums, *mine), step(half.values, half.sums, *theirs))
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(mine, theirs))


def refuse(match, function, *given, error=ValueError, **options):
    with pytest.raises(error, match=match):
        function(*given, **options)


def test_bad_input_is_refused_with_its_values():
    w, half, turn, rings = arguments()
    x, stream = half.values, torch.randn(2, 128)
    residual, swiglu, rope = ops.matmul_residual, ops.matmul_swiglu, ops.matmul_rope_cache_write
    portable = dataclasses.replace(w, layout="portable")
    refuse(r"needs a weight in layout tiles, got portable", swiglu, x, portable)
    refuse(r"x must be \[M, K\], got \[2, 1, 64\]", swiglu, x[:, None], w)
    refuse(r"residual must be torch.float32 \[2, N\], got torch.float64", residual, x, w, stream.double())
    refuse(r"residual must be .*\[2, N\], got torch.float32 \[1, 128\]", residual, x, w, stream[:1])
    refuse(r"ask for 2048 contiguous bytes of int4.*got torch.uint8 \[4096\]", residual, x, w, stream[:, :64])
    refuse(r"norm must be .*\[128\], got torch.float32 \[64\]", residual, x, w, stream, torch.ones(64))
    refuse(r"impl must be auto, reference or triton, got 'fast'", residual, x, w, stream, impl="fast")
    short = ops.HalfNormed(x, half.sums[:, :1])
    refuse(r"sums of x \[2, 64\] must be contiguous \[1, 2\], got \[1, 1\]", swiglu, short, w)
    wide = ops.HalfNormed(x, half.sums.double())
    refuse(r"sums must be torch.float32, got torch.float64", swiglu, wide, w, error=TypeError)
    odd, _ = packed(SPECS[0], 48, 64, torch.float32)
    refuse(r"each have a multiple of 16 rows, got 48 in all", swiglu, x, odd)
    cos, sin, at = turn
    narrow = (cos[..., :24], sin[..., :24])
    refuse(r"heads must be a multiple of 32 wide, got cos \[2, 1, 24\]", rope, x, w, *narrow, at, *rings)
    refuse(r"cos and sin must be torch.float32", rope, x, w, cos.half(), sin, at, *rings)
    refuse(r"must fit, got \[2, 64\], \[2, 1, 32\] and \[3\]", rope, x, w, cos, sin, torch.arange(3), *rings)
    refuse(r"positions must be torch.int32", rope, x, w, cos, sin, at.float(), *rings, error=TypeError)
    refuse(r"the ring must be \[2, KV, W, 32\]", rope, x, w, cos, sin, at, *(r[:1] for r in rings))
    refuse(r"int8 keys need their scales", rope, x, w, cos, sin, at, *(r.to(torch.int8) for r in rings))
    turns = rotary(2, 6, 32, torch.float32)
    wide = x.repeat(6, 1)
    refuse(r"6 tokens do not fit into a ring of 5 slots", rope, wide, w, *turns, at, *rings)
    many = [torch.zeros(2, 2, 5, 32) for _ in "kv"]
    refuse(r"must hold H \+ 2 \* 2 heads of 32 rows.*got 128 rows", rope, x, w, cos, sin, at, *many)
    refuse(r"impl='triton' needs a GPU tensor", swiglu, half, w, impl="triton")
