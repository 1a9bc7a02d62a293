"""QuantLinear on the kernels: what is packed when, what is saved, and that nothing stale is ever multiplied."""

import contextlib
import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from brise.kernels import native, ops
from brise.kernels.budget import check_budget
from brise.kernels.ops import dequantize, pack_weight
from brise.quant import linear
from brise.quant.apply import quantize_model, quantize_weight
from brise.quant.config import QuantConfig, QuantSpec, Rule
from brise.quant.linear import QuantLinear, batch_invariant

SPECS = {
    "int4": QuantSpec(format="int4", group_size=32),
    "int4-asym": QuantSpec(format="int4", group_size=32, symmetric=False),
    "nf4-dq": QuantSpec(format="nf4", double_quant=True),
    "fp4": QuantSpec(format="fp4"),
    "int8": QuantSpec(format="int8"),
    "int3": QuantSpec(format="int3", group_size=64),
    "int2-asym-dq": QuantSpec(format="int2", group_size=64, symmetric=False, double_quant=True),
}


@pytest.fixture(params=["as it comes", "torch", "tiles"])
def layouts(request, monkeypatch):
    """Packing as a CPU does it, with and without compiled code, and as a GPU does: tiles are for a CPU as well."""
    if request.param == "tiles":
        tiles = functools.partial(pack_weight, layout_name="tiles")
        monkeypatch.setattr(linear, "pack_weight", tiles)
    with native.without() if request.param == "torch" else contextlib.nullcontext():
        yield request.param


def make(name: str, seed: int = 0):
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))
    return quantize_weight("w", w, SPECS[name])


def expect(module, x, q, what=""):
    """The product of ``q``, within the budget."""
    exact = x.double() @ q.dequantize(torch.float64).T
    check_budget(module(x), x @ q.dequantize(x.dtype).T, exact, what)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_what_is_saved_is_the_stored_form_to_the_bit(name, dtype, layouts):
    q = make(name)
    stored = {n: t.clone() for n, t in q.tensors.items()}
    module = QuantLinear.from_quantized(q)
    for rows in (1, 5):
        expect(module, torch.randn(rows, 128).to(dtype), q, f"{name} {dtype}")
    assert same(dict(module.state_dict()), stored) and same(module.quantized().tensors, stored)
    if layouts == "tiles":
        # in the place of the stored form, not beside it
        assert module.layout == "tiles" and module.qweight is None
        sizes = sum(b.nbytes for b in module.buffers())
        assert sizes <= q.nbytes + 1024 + (stored["zeros"].numel() * 4 if "zeros" in stored else 0)
    else:
        int4 = name.startswith("int4") and dtype == torch.bfloat16 and native.active() is None
        assert (
            module.layout == ("cpu_int4" if int4 else "portable") and module.qweight is q.tensors["qweight"]
        )
    # the weight of the product is that of the record, double-quantized scales included
    assert torch.equal(module.quantized().dequantize(), q.dequantize())
    loaded = QuantLinear(q.spec, 128, 64)
    loaded.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(3, 128).to(dtype)
    assert torch.equal(loaded(x), module(x))


@pytest.mark.parametrize("name", ["nf4-dq", "int2-asym-dq"])
def test_double_quantized_scales_are_decoded_as_the_format_does(name):
    q = make(name)
    module = QuantLinear.from_quantized(q)
    module.prepare(torch.float32)
    assert torch.equal(dequantize(module._weight(module.layout), torch.float32), q.dequantize())


CHANGES = {
    "set_quantized": lambda module, q: module.set_quantized(q),
    "load_state_dict": lambda module, q: module.load_state_dict(q.tensors),
    "load and assign": lambda module, q: module.load_state_dict(q.tensors, assign=True),
    "attributes": lambda module, q: [setattr(module, n, t) for n, t in q.tensors.items()],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_weight_is_packed_anew(change, dtype, layouts):
    first, second = make("int4-asym"), make("int4-asym", seed=1)
    module = QuantLinear.from_quantized(first)
    x = torch.randn(2, 128).to(dtype)
    expect(module, x, first)
    change(module, copy.deepcopy(second))
    expect(module, x, second)
    assert same(dict(module.state_dict()), second.tensors)


def test_moves_and_casts_pack_anew(layouts):
    q = make("int4")
    module = QuantLinear.from_quantized(q, torch.randn(64))
    stored = {n: t.clone() for n, t in q.tensors.items()}
    for move in (lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.float16), lambda m: m.float()):
        module(torch.randn(2, 128, dtype=module.bias.dtype))
        move(module)
        assert module.layout == "portable" and module.packed_qweight is None
        assert same({n: t for n, t in module.state_dict().items() if n != "bias"}, stored)
    module(torch.randn(2, 128))
    module.to("meta")
    assert all(t.is_meta for t in module.state_dict().values())
    assert module(torch.randn(2, 128, device="meta")).shape == (2, 64)


def test_one_module_serves_activations_of_every_dtype(layouts):
    q = make("int4")
    module = QuantLinear.from_quantized(q)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16):
        expect(module, torch.randn(3, 128).to(dtype), q, str(dtype))


@pytest.mark.parametrize("rows", [1, 3])
def test_autocast_decides_the_dtype_as_for_a_dense_layer(rows):
    module = QuantLinear.from_quantized(make("int4"))
    x = torch.randn(rows, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        assert torch.equal(module(x), module(x.bfloat16()))
    assert module(x).dtype == torch.float32


@pytest.mark.parametrize("name,dtype", [("int4", torch.bfloat16), ("nf4-dq", torch.float32)])
def test_compiles_into_one_graph_before_and_after_the_first_product(name, dtype, layouts):
    q = make(name)
    x = torch.randn(2, 128).to(dtype)
    model = nn.Sequential(QuantLinear.from_quantized(q), nn.ReLU())
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = graph(x)
    # packed while the graph was made, not in it
    assert model[0]._prepared and (layouts != "tiles" or model[0].qweight is None)
    assert torch.equal(got, model(x))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(graph(x), got)
    for rows in (3, 4, 70):
        assert torch.equal(graph(x[:1].repeat(rows, 1)), model(x[:1].repeat(rows, 1)))
    other = quantize_weight("w", torch.randn(64, 128), q.spec)
    model[0].set_quantized(other)
    assert torch.equal(graph(x), model(x))
    expect(model[0], x, other)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["int4", "nf4-dq"])
def test_exports_what_has_been_packed(name, layouts):
    model = nn.Sequential(QuantLinear.from_quantized(make(name)))
    x = torch.randn(2, 128)
    with pytest.raises(RuntimeError, match=r"call prepare\(torch\.float32\)"):
        torch.export.export(model, (x,))
    expected = model(x)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["int4", "nf4-dq", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_switch_makes_rows_independent_of_their_batch(name, dtype):
    module = QuantLinear.from_quantized(make(name))
    model = nn.Sequential(module)
    x = torch.randn(90, 128).to(dtype)
    with batch_invariant(model):
        assert module.batch_invariant
        whole = model(x)
        for part in (slice(0, 1), slice(7, 9), slice(0, 80)):
            assert torch.equal(model(x[part]), whole[part])
        assert torch.equal(model(x.view(9, 10, 128)), whole.view(9, 10, 64))
    assert not module.batch_invariant
    with pytest.raises(KeyError), batch_invariant(model):
        raise KeyError
    assert not module.batch_invariant


@pytest.mark.parametrize("name", ["int4", "nf4-dq"])
def test_a_weight_packed_in_inference_mode_can_be_trained_on(name, layouts):
    q = make(name)
    module = QuantLinear.from_quantized(q)
    with torch.inference_mode():
        module(torch.randn(2, 128, dtype=torch.bfloat16))
    x = torch.randn(2, 128, dtype=torch.bfloat16, requires_grad=True)
    up = torch.randn(2, 64, dtype=torch.bfloat16)
    module(x).backward(up)
    exact = up.double() @ q.dequantize(torch.float64)
    check_budget(x.grad, up @ q.dequantize(torch.bfloat16), exact)


def test_a_head_tied_to_the_embedding_leaves_it_its_tensors(layouts):
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(64, 128), "lm_head": nn.Linear(128, 64, bias=False)})
    model["lm_head"].weight = model["embed_tokens"].weight
    quantize_model(model, QuantConfig((Rule(("embed_tokens", "lm_head"), SPECS["int4"]),)))
    head, embedding = model["lm_head"], model["embed_tokens"]
    assert head.tied
    rows = embedding(torch.arange(4))
    expect(head, torch.randn(2, 128), head.quantized())
    assert head.qweight is embedding.qweight and torch.equal(embedding(torch.arange(4)), rows)
    assert head.layout == ("tiles" if layouts == "tiles" else "portable")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int4", "int4-asym", "nf4-dq", "int2-asym-dq"])
def test_the_direct_product_is_the_one_with_checks(name, dtype):
    """To the bit, with a bias and rows in any arrangement; and it steps aside where it is not meant."""
    module = QuantLinear.from_quantized(make(name), torch.randn(64))
    if native.active() is None:
        pytest.skip("there is no C compiler here")
    x = torch.randn(2, 3, 128).to(dtype).transpose(0, 1)
    with torch.no_grad():
        module(x)
        assert module._direct is not None and module._multiplies_directly(x, module.bias)
        expected = ops.quant_matmul(x, module._weight("portable"), module.bias)
        assert torch.equal(module(x), expected) and expected.dtype == dtype
        assert module(x[:0]).shape == (0, 2, 64)
        assert not module._multiplies_directly(x.double(), module.bias)
        assert not module._multiplies_directly(torch.empty(65, 128, dtype=dtype), module.bias)
        with native.without():
            assert not module._multiplies_directly(x, module.bias)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(x.float()).dtype == torch.bfloat16
        # a copy, or what was pickled, points at its own tensors
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            other.get_buffer("qweight").zero_()
            assert not torch.equal(other(x), expected)
        assert torch.equal(module(x), expected)
        short = copy.deepcopy(module)
        short(x)
        short.bias.data = torch.zeros(1)
        with pytest.raises(ValueError, match="bias must be"):
            short(x)
        module.get_buffer("scales").data = module.get_buffer("scales").clone()
        assert not module._multiplies_directly(x, module.bias), "another place in memory"
        assert torch.equal(module(x), expected)


def test_the_direct_product_leaves_gradients_to_the_op():
    module = QuantLinear.from_quantized(make("int4"))
    x = torch.randn(2, 128)
    module(x)
    x.requires_grad_()
    module(x).sum().backward()
    assert torch.allclose(x.grad, module.quantized().dequantize().sum(0).expand(2, -1), atol=1e-4)
    module.scales.requires_grad_()
    with pytest.raises(ValueError, match="scales"):
        module(x.detach())


def test_a_product_has_its_forward_mode_derivative():
    """As torch has it of a dense layer, of the input and of the bias, by either of torch's interfaces."""
    module = QuantLinear.from_quantized(make("int4"), torch.randn(64))
    dense = module.quantized().dequantize()
    x, along, shift = torch.randn(2, 128), torch.randn(2, 128), torch.randn(64)
    expected, moved = module(x), along @ dense.T
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(module(x), expected), "of what has no tangent the product is as ever"
        for ours in (module, lambda dual: ops.quant_matmul(dual, module._weight("portable"), module.bias)):
            out, tangent = torch.autograd.forward_ad.unpack_dual(
                ours(torch.autograd.forward_ad.make_dual(x, along))
            )
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(tangent, moved)
        bias = torch.autograd.forward_ad.make_dual(module.bias.detach(), shift)
        out = ops.quant_matmul(x, module._weight("portable"), bias)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out).tangent, shift.expand(2, -1))
    torch.testing.assert_close(torch.func.jvp(module, (x,), (along,)), (expected, moved))
    assert torch.equal(torch.vmap(module)(x), expected)
