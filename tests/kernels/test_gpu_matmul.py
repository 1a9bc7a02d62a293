"""The products with quantized weights on a GPU: against float64, to the bit where that is promised."""

import pytest
import torch

from brise.kernels import ops, reference, tuning
from brise.kernels.budget import check_budget
from brise.quant.config import QuantSpec
from brise.quant.double_quant import dynamic_map
from brise.quant.linear import QuantLinear
from brise.quant.rtn import rtn

pytestmark = pytest.mark.gpu
HALF = [torch.float16, torch.bfloat16]
SPECS = [
    *(
        QuantSpec(format="int4", group_size=g, symmetric=s)
        for g in (32, 64, 128, None)
        for s in (True, False)
    ),
    QuantSpec(format="nf4"),
    QuantSpec(format="nf4", double_quant=True),
    QuantSpec(format="fp4"),
    QuantSpec(format="int8", group_size=None),
    QuantSpec(format="int8", group_size=128, symmetric=False),
    QuantSpec(format="int3", group_size=64),
    QuantSpec(format="int2", group_size=64, symmetric=False),
]
IDS = [f"{s.format}-{s.group_size}{'' if s.symmetric else '-asym'}{'-dq' * s.double_quant}" for s in SPECS]


def make(spec, n, k, dtype, device="cuda"):
    generator = torch.Generator("cpu").manual_seed(0)
    q = rtn(torch.randn(n, k, generator=generator).to(device) * 0.02, spec)
    scales_map = dynamic_map(torch.device(device)) if spec.double_quant else None
    w = ops.pack_weight(q.tensors, spec.format, (n, k), dtype, scales_map=scales_map)
    return q, w


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_every_number_of_tokens_keeps_the_budget(spec, dtype):
    for n, k in ((1000, 4096), (4096, 1024)):
        q, w = make(spec, n, k, dtype)
        assert w.layout == "tiles"
        dense = q.dequantize(torch.float64)
        bias = torch.randn(n, device="cuda").to(dtype)
        assert torch.equal(ops.dequantize(w, dtype), dense.to(dtype)) or spec.double_quant
        most = tuning.CROSSOVER[spec.format]
        for m in (0, 1, 2, 7, 16, 17, 33, 64, 65, 100, most, most + 1):
            wide = torch.randn(m, 2 * k, device="cuda").to(dtype)
            for x in (wide[:, :k], wide[:, ::2]):
                exact = x.double() @ dense.T + bias.double()
                eager = torch.nn.functional.linear(x, dense.to(dtype), bias)
                for how in ({}, {"impl": "triton"}, {"batch_invariant": True}):
                    out = ops.quant_matmul(x, w, bias, **how)
                    check_budget(out, eager, exact, f"m {m} {n}x{k} {dtype} {how}")
                    assert torch.equal(out, ops.quant_matmul(x, w, bias, **how))


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_a_row_does_not_depend_on_its_batch_where_that_is_asked(spec):
    _, w = make(spec, 1000, 4096, torch.float16)
    x = torch.randn(300, 4096, device="cuda").half()
    whole = ops.quant_matmul(x, w, batch_invariant=True)
    for rows in (slice(0, 1), slice(5, 22), slice(100, 300)):
        assert torch.equal(ops.quant_matmul(x[rows], w, batch_invariant=True), whole[rows])


@pytest.mark.parametrize("m", [1, 33])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", HALF)
def test_int8_by_int8_is_exact_in_its_integers(dtype, threshold, m):
    q, _ = make(QuantSpec(format="int8", group_size=None), 1000, 4096, dtype)
    w = ops.pack_weight(q.tensors, "int8", (1000, 4096), dtype, layout_name="portable")
    x = torch.randn(m, 4096, device="cuda").to(dtype)
    x[:, 7] = 20
    out = ops.int8_dynamic_matmul(x, w, threshold=threshold)
    weight = reference.Weight("int8", (1000, 4096), **w.tensors)
    want = reference.int8_dynamic_matmul(x.float(), weight, None, threshold)
    torch.testing.assert_close(out.float(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_a_weight_of_more_than_2_to_the_31_elements():
    """int4, 65536 x 40960: 2.7e9 weights in 1.3 GB. Rows at both ends and in between are checked."""
    n, k = 65536, 40960
    qweight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scales = torch.rand(n, k // 128, device="cuda").half() * 0.01
    w = ops.pack_weight({"qweight": qweight, "scales": scales}, "int4", (n, k), torch.float16)
    rows = torch.tensor([0, 1, 777, n // 2, 52429, n - 1], device="cuda")
    some = {"qweight": qweight[rows], "scales": scales[rows]}
    few = ops.pack_weight(some, "int4", (len(rows), k), torch.float16, layout_name="portable")
    for m in (1, 40):
        x = torch.randn(m, k, device="cuda").half()
        exact = x.double() @ ops.dequantize(few, torch.float64).T
        eager = ops.quant_matmul(x, few, impl="reference")
        check_budget(ops.quant_matmul(x, w, impl="triton")[:, rows], eager, exact, f"m {m}")
    x = torch.randn(2**31 // n + 8, k, device="cuda").half()
    out = ops.quant_matmul(x, w, impl="triton")
    assert out.numel() > 2**31
    check_budget(out[-8:][:, rows], ops.quant_matmul(x[-8:], few, impl="reference"),
                 x[-8:].double() @ ops.dequantize(few, torch.float64).T)  # fmt: skip


def test_a_graph_replays_on_new_inputs():
    _, w = make(SPECS[0], 4096, 4096, torch.float16)
    x = torch.zeros(1, 4096, device="cuda", dtype=torch.float16)
    ops.quant_matmul(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.quant_matmul(x, w)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, ops.quant_matmul(x, w))


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_a_layer_holds_its_weight_once_and_moves_back_to_the_bit(spec):
    q, _ = make(spec, 512, 1024, torch.float16)
    stored = {name: tensor.cpu() for name, tensor in q.tensors.items()}
    module = QuantLinear.from_quantized(q)
    x = torch.randn(3, 1024, device="cuda").half().requires_grad_()
    module(x).sum().backward()
    dense = q.dequantize(torch.float64)
    want = torch.ones(3, 512, device="cuda", dtype=torch.float64) @ dense
    check_budget(x.grad, torch.ones_like(want[:, :1]).half().expand(3, 512) @ dense.half(), want)
    assert module.qweight is None and module.layout == "tiles"
    with torch.no_grad():
        check_budget(module(x.float()), x.float() @ dense.float().T, x.double() @ dense.T, "fp32 activations")
    assert all(torch.equal(t.cpu(), stored[n]) for n, t in module.state_dict().items())
    module.cpu()
    assert all(torch.equal(t, stored[n]) for n, t in module.state_dict().items())


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", ["nf4", "int4", "int3"])
def test_what_tiles_cannot_hold_is_decoded_first(fmt, dtype, invariant):
    q, w = make(QuantSpec(format=fmt, group_size=24), 100, 240, dtype)
    assert w.layout == "portable"
    x = torch.randn(5, 240, device="cuda").to(dtype)
    dense = q.dequantize(torch.float64)
    out = ops.quant_matmul(x, w, batch_invariant=invariant)
    check_budget(out, x @ dense.to(dtype).T, x.double() @ dense.T, f"{fmt} {dtype}")
    if invariant:
        assert torch.equal(ops.quant_matmul(x[2:3], w, batch_invariant=True), out[2:3])


def test_compiled_by_inductor_in_one_graph():
    q, _ = make(SPECS[0], 512, 1024, torch.float16)
    module = QuantLinear.from_quantized(q)
    graph = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    x = torch.randn(1, 1024, device="cuda").half()
    with torch.no_grad():
        for _ in range(3):
            out = graph(x).clone()
    assert torch.equal(out, module(x)) and module.layout == "tiles"
