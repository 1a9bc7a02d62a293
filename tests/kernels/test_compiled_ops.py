"""Every public op under torch: opcheck in both dtypes, and one graph for any number of tokens, gradients included."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from brise.kernels import checks, epilogue_reference, ops
from brise.quant.config import QuantSpec
from brise.quant.double_quant import dynamic_map
from brise.quant.rtn import rtn

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5
# none of them a size of anything else, which a compiler would take for the same
TOKENS = (5, 3, 19, 70)
SPECS = {
    "int4": QuantSpec(format="int4", group_size=32),
    "int4-zeros": QuantSpec(format="int4", group_size=32, symmetric=False),
    "int3": QuantSpec(format="int3", group_size=32),
    "int2": QuantSpec(format="int2", group_size=32, symmetric=False),
    "int8": QuantSpec(format="int8", group_size=None),
    "nf4": QuantSpec(format="nf4"),
    "nf4-double": QuantSpec(format="nf4", double_quant=True),
    "fp4": QuantSpec(format="fp4"),
}


def weight(name, n, k, dtype, layout_name="portable"):
    spec = SPECS[name]
    scales_map = dynamic_map(torch.device("cpu")) if spec.double_quant else None
    tensors = rtn(torch.randn(n, k) * 0.1, spec).tensors
    return ops.pack_weight(
        tensors, spec.format, (n, k), dtype, scales_map=scales_map, layout_name=layout_name
    )


def one_graph(function, make, moving, backwards=True):
    """``function`` of what ``make(tokens)`` returns, compiled once with dimension ``moving[i]`` of the i-th argument
    free (None: fixed), has the bits of eager code and of its gradients, and leaves the same in its arguments."""
    torch.compiler.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counted)
    for tokens in TOKENS:
        results = []
        given = make(tokens)
        for run in (compiled, function):
            inputs = [x.detach().clone() for x in given]
            for x, dim in zip(inputs, moving):
                if dim is not None:
                    torch._dynamo.mark_dynamic(x, dim)
            leaves = [x.requires_grad_() for x in inputs if backwards and x.is_floating_point()]
            out = run(*inputs)
            out = list(out) if isinstance(out, tuple) else [out]
            grads = torch.autograd.grad([x.float().square().sum() for x in out], leaves) if leaves else ()
            results.append([*out, *grads, *inputs])
        for got, want in zip(*results, strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want), f"{tokens} tokens"
    assert counted.frame_count == 1, "a graph for each number of tokens"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_products(name, dtype):
    torch.manual_seed(0)
    w, bias = weight(name, 48, 64, dtype), torch.randn(48).to(dtype)
    t = [w.tensors.get(key) for key in checks.TENSORS]
    x = torch.randn(3, 64).to(dtype)
    op = getattr(torch.ops.brise, f"{w.format}_matmul")
    given = (x.requires_grad_(), *t, bias.requires_grad_(), 48, "portable", "auto", False)
    torch.library.opcheck(op.default, given)
    backward = getattr(torch.ops.brise, f"{w.format}_matmul_backward")
    torch.library.opcheck(backward.default, (torch.randn(3, 48).to(dtype), *t, 64, "portable"))
    one_graph(
        lambda x, b: ops.quant_matmul(x, w, b).relu(),
        lambda m: [torch.randn(m, 64).to(dtype), bias],
        (0, None),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_activations(dtype):
    torch.manual_seed(0)
    w = weight("int8", 48, 64, dtype)
    given = (torch.randn(2, 3, 64).to(dtype), w.tensors["qweight"], w.tensors["scales"], None, 2.0, "auto")
    torch.library.opcheck(torch.ops.brise.int8_dynamic_matmul.default, given)
    one_graph(
        lambda x: ops.int8_dynamic_matmul(x, w, threshold=2.0).relu(),
        lambda m: [torch.randn(2, m, 64).to(dtype)],
        (1,),
        backwards=False,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_with_epilogues(dtype):
    torch.manual_seed(0)
    square, wide = (weight("int4", n, 64, dtype, "tiles") for n in (64, 128))
    norm, brise = torch.rand(64).to(dtype), torch.ops.brise
    ring = torch.zeros(2, 1, 9, 32, dtype=dtype)

    def streams(m):
        return [torch.randn(m, 64).to(dtype) for _ in "xh"]

    def step(x, stream):
        h, half = ops.matmul_residual(x, square, stream, norm)
        return h, ops.matmul_swiglu(half, wide, EPS), ops.matmul_swiglu(x, wide)

    def turned(x, cos, sin, at, keys, values):
        half = ops.HalfNormed(x * norm, epilogue_reference.square_sums(x))
        return ops.matmul_rope_cache_write(half, wide, cos, sin, at, keys, values, EPS), keys + 1

    def rows(m):
        angles = [torch.randn(m, 1, 32).to(dtype) for _ in "cs"]
        rings = [torch.zeros(m, 1, 9, 32, dtype=dtype) for _ in "kv"]
        return [torch.randn(m, 64).to(dtype), *angles, torch.arange(m), *rings]

    t, t2 = ([w.tensors.get(key) for key in checks.TENSORS[:6]] for w in (square, wide))
    x, stream = streams(2)
    sums = epilogue_reference.square_sums(x)
    torch.library.opcheck(brise.matmul_residual.default, (x, *t, stream, norm, "int4", "auto", False))
    torch.library.opcheck(brise.matmul_swiglu.default, (x, *t2, sums, EPS, 128, "int4", "auto", False))
    given = (x, *t2, sums, EPS, *rows(2)[1:4], ring, ring.clone(), 128, "int4", "auto", False)
    torch.library.opcheck(brise.matmul_rope_cache_write.default, given)
    one_graph(step, streams, (0, 0), backwards=False)
    one_graph(turned, rows, (0,) * 6, backwards=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_swiglu(dtype):
    torch.manual_seed(0)
    w, brise = torch.rand(12).to(dtype), torch.ops.brise
    x, r, w = (t.requires_grad_() for t in (*torch.randn(2, 3, 12).to(dtype), w))
    torch.library.opcheck(brise.rms_norm.default, (x, w, EPS, "auto"))
    torch.library.opcheck(brise.add_rms_norm.default, (x, r, w, EPS, "auto"))
    torch.library.opcheck(brise.swiglu.default, (x, r, "auto"))

    def step(x, r, w):
        y, total = ops.rms_norm(x, w, EPS, r)
        return ops.swiglu(y, total), ops.swiglu(ops.rms_norm(total, w, EPS)[0])

    one_graph(step, lambda m: [*torch.randn(2, 2, m, 12).to(dtype), w.detach()], (1, 1, None))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_the_cache_and_decoding(dtype, int8):
    """Rows come and go, and a prompt has any length: the ring is written, and read behind it."""
    torch.manual_seed(0)

    def rings(batch):
        codes = [torch.zeros(batch, 2, 9, 12, dtype=torch.int8 if int8 else dtype) for _ in "kv"]
        return codes + [torch.ones(batch, 2, 9) for _ in "kv"] * int8

    def make(batch, tokens):
        states = [torch.randn(batch, tokens, n, 12).to(dtype) for n in (4, 2, 2)]
        return [*states, *torch.randn(2, batch, tokens, 12).to(dtype), torch.arange(batch), *rings(batch)]

    def step(q, k, v, cos, sin, at, keys, values, *scales):
        named = dict(zip(("key_scales", "value_scales"), scales))
        q, k = ops.rope_cache_write(q, k, v, cos, sin, at, keys, values, **named)
        seen = at + q.shape[1]
        return ops.decode_attention(q[:, -2:], keys, values, seen, window=7, start=seen - 9, **named), k

    q, *rest = make(2, 3)
    given = (q, *rest[:7], *(rest[7:] or (None, None)))
    torch.library.opcheck(torch.ops.brise.rope_cache_write.default, (*given, "auto"))
    ring = (*given[6:8], given[5] + 4, given[5], *given[8:])
    torch.library.opcheck(torch.ops.brise.decode_attention.default, (q, *ring, 7, 0.25, "auto", False))
    arguments = 6 + len(rings(1))
    one_graph(step, lambda m: make(m, 3), (0,) * arguments, backwards=False)
    one_graph(step, lambda m: make(2, m), (*(1,) * 5, *(None,) * (arguments - 5)), backwards=False)


@pytest.mark.parametrize("packing", ["none", "starts", "lengths", "offset", "packed", "bounds"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sliding_attention(dtype, packing):
    torch.manual_seed(0)

    def attend(q, k, v, says):
        named = {} if packing == "none" else {"cu_seqlens" if packing == "packed" else packing: says}
        return ops.sliding_attention(q, k, v, window=None if packing == "bounds" else 4, **named)

    def make(m):
        batch = 1 if packing == "packed" else 2
        says = {"starts": [0, 2], "lengths": [m, 2], "offset": [0, -1]}
        says |= {"packed": [0, 2, m], "bounds": [[[0] * m, [*range(m)]]], "none": [0]}
        values = torch.tensor(says[packing], dtype=torch.int32)
        return [*(torch.randn(batch, m, n, 8).to(dtype) for n in (4, 2, 2)), values]

    q, k, v, _ = (x.requires_grad_() if x.is_floating_point() else x for x in make(6))
    bounds = torch.tensor([[[0, 0, 0, 1, 2, 3], [1, 2, 3, 4, 5, 5]]], dtype=torch.int32)
    for given, window in ((None, 4), (bounds, 0)):
        options = (given, window, given is None, 0, 0.5, "auto")
        torch.library.opcheck(torch.ops.brise.sliding_attention.default, (q, k, v, *options))
    one_graph(attend, make, (1, 1, 1, 2 if packing == "bounds" else None))
