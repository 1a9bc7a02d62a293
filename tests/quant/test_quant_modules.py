"""QuantLinear and QuantEmbedding as modules: forward, gradients, casts, copies, saving."""

import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from brise.kernels.budget import check_budget
from brise.quant.apply import quantize_weight
from brise.quant.config import QuantSpec
from brise.quant.formats import FORMATS
from brise.quant.linear import QuantEmbedding, QuantLinear
from brise.quant.tensor import layout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SPECS = [
    *(QuantSpec(format=name, group_size=16) for name in FORMATS),
    *(QuantSpec(format=name, group_size=16, symmetric=False) for name in FORMATS if name.startswith("int")),
    QuantSpec(format="nf4", group_size=16, double_quant=True),
    QuantSpec(format="int4", group_size=16, double_quant=True, symmetric=False),
    QuantSpec(format="int8"),
    QuantSpec(format="int4", group_size=16, algorithm="gptq", options={"static_groups": False}),
]
IDS = [
    f"{s.format}{'' if s.symmetric else '-asym'}{'-dq' * s.double_quant}-{s.group_size}-{s.algorithm}"
    for s in SPECS
]


def make(spec: QuantSpec, rows: int = 24, width: int = 48, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, width, generator=generator)
    x = torch.randn(100, width, generator=generator)
    return quantize_weight("w", w, spec, x.T @ x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_linear_is_nn_linear_with_the_dequantized_weight(spec, dtype):
    """As close to it in float64 as the budget of the kernels asks."""
    q = make(spec)
    bias = torch.randn(24)
    for given in (None, bias):
        module = QuantLinear.from_quantized(q, given)
        plain = nn.Linear(48, 24, bias=given is not None).to(dtype)
        plain.weight.data = q.dequantize(dtype)
        if given is not None:
            plain.bias.data = given.to(dtype)
        x = torch.randn(2, 3, 48).to(dtype)
        exact = x.double() @ q.dequantize(torch.float64).T + (
            0 if given is None else given.to(dtype).double()
        )
        check_budget(module(x), plain(x), exact, str(spec))
        assert module(x).dtype == dtype and module(x).shape == (2, 3, 24)
    assert (module.in_features, module.out_features) == (48, 24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_embedding_rows_are_those_of_the_table(spec, dtype):
    q = make(spec)
    module = QuantEmbedding.from_quantized(q, dtype, padding_idx=3)
    ids = torch.tensor([[5, 0, 23, 5], [3, 3, 1, 0]])
    expected = nn.functional.embedding(ids, q.dequantize(dtype))
    for kind in (torch.int64, torch.int32):
        assert torch.equal(module(ids.to(kind)), expected)
    assert module(ids).dtype == dtype
    assert torch.equal(module(torch.tensor(7)), q.dequantize(dtype)[7])
    assert module(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 48)
    assert (module.num_embeddings, module.embedding_dim, module.padding_idx) == (24, 48, 3)


@pytest.mark.parametrize("bad", [-1, 24, 10**9])
def test_ids_outside_the_table_are_an_error(bad):
    module = QuantEmbedding.from_quantized(make(SPECS[0]), torch.float32)
    with pytest.raises(IndexError, match=rf"token ids must be 0\.\.23, got .*{bad}"):
        module(torch.tensor([[0, bad]]))


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_state_dict_names_are_the_layout(spec):
    q = make(spec)
    for module in (QuantLinear.from_quantized(q), QuantEmbedding.from_quantized(q, torch.float32)):
        state = module.state_dict()
        assert {n: (t.dtype, tuple(t.shape)) for n, t in state.items()} == layout(spec, (24, 48))
    assert set(QuantLinear.from_quantized(q, torch.zeros(24)).state_dict()) == {
        *layout(spec, (24, 48)),
        "bias",
    }


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to(float16)": lambda m: m.to(torch.float16),
    "to(cpu, bfloat16)": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
    "float": lambda m: m.float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_casts_leave_what_is_stored_alone(spec, cast):
    q = make(spec)
    model = nn.Sequential(
        QuantEmbedding.from_quantized(q, torch.float32), QuantLinear.from_quantized(q, torch.randn(24))
    )
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert cast(model) is model
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            assert tensor.dtype == model[0].dtype
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    assert model[0](torch.tensor([1])).dtype == model[0].dtype
    assert isinstance(model[1].bias, nn.Parameter)


def test_casts_change_what_the_embedding_gives():
    module = QuantEmbedding.from_quantized(make(SPECS[0]), torch.float32)
    assert module.half().dtype == torch.float16
    assert module.bfloat16()(torch.tensor([1])).dtype == torch.bfloat16
    assert module.float().dtype == torch.float32


def test_bias_stays_the_same_parameter_through_a_cast():
    """An optimizer or a hook that holds it must not lose it; nn.Module casts parameters in place too."""
    module = QuantLinear.from_quantized(make(SPECS[0]), torch.randn(24))
    bias = module.bias
    module.bfloat16()
    assert bias is not None and module.bias is bias and bias.dtype == torch.bfloat16


def test_moves_to_meta_and_back_by_to_empty():
    q = make(SPECS[0])
    module = QuantLinear.from_quantized(q, torch.randn(24)).to("meta")
    assert all(t.device.type == "meta" for t in module.state_dict().values())
    module.to_empty(device="cpu")
    assert {n: (t.dtype, tuple(t.shape)) for n, t in module.state_dict().items() if n != "bias"} == layout(
        q.spec, (24, 48)
    )
    module.load_state_dict({**q.tensors, "bias": torch.zeros(24)})
    x = torch.randn(4, 48)
    torch.testing.assert_close(module(x), x @ q.dequantize().T)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_gradient_reaches_the_input_and_the_bias(spec):
    q = make(spec)
    module = QuantLinear.from_quantized(q, nn.Parameter(torch.randn(24)))
    x = torch.randn(5, 48, requires_grad=True)
    upstream = torch.randn(5, 24)
    module(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ q.dequantize())
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["bias"]
    assert module.bias is not None
    torch.testing.assert_close(module.bias.grad, upstream.sum(0))
    frozen = QuantLinear.from_quantized(q)
    assert list(frozen.parameters()) == []


def test_input_of_another_width_is_an_error():
    module = QuantLinear.from_quantized(make(SPECS[0]))
    with pytest.raises(ValueError, match=r"expected an input \[\.\.\., 48\], got \[2, 47\]"):
        module(torch.randn(2, 47))


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_deepcopy_shares_nothing(spec):
    module = QuantLinear.from_quantized(make(spec), torch.randn(24))
    twin = copy.deepcopy(module)
    x = torch.randn(3, 48)
    expected = module(x)
    assert torch.equal(twin(x), expected)
    for t in twin.buffers():
        t.zero_()
    assert torch.equal(module(x), expected)
    assert twin.spec == module.spec


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_saved_without_pickle_and_loaded_strictly(spec):
    q = make(spec)
    data = save(QuantLinear.from_quantized(q, torch.randn(24)).state_dict())
    fresh = QuantLinear(spec, 48, 24, bias=torch.zeros(24))
    fresh.load_state_dict(load(data), strict=True)
    assert torch.equal(fresh.quantized().dequantize(), q.dequantize())
    state = load(data)
    state.pop("scales")
    with pytest.raises(RuntimeError, match=r'Missing key.*"scales"'):
        fresh.load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight"):
        fresh.load_state_dict({**load(data), "weight": torch.zeros(24, 48)}, strict=True)


def test_set_quantized_refuses_another_weight():
    q = make(SPECS[0])
    module = QuantLinear(SPECS[1], 48, 24)
    with pytest.raises(ValueError, match="this module holds"):
        module.set_quantized(q)
    with pytest.raises(ValueError, match="this module holds"):
        QuantLinear(SPECS[0], 32, 24).set_quantized(q)


def test_record_shares_the_storage_of_the_module():
    module = QuantLinear.from_quantized(make(SPECS[0]))
    assert module.quantized().tensors["qweight"].data_ptr() == module.get_buffer("qweight").data_ptr()


def test_inference_mode_spoils_no_table_for_training():
    """Look-up tables are cached: one that was made under inference mode must not break autograd later."""
    from brise.quant import dequantize, double_quant, nf4

    for cached in (
        nf4.codebook,
        nf4._bins,
        dequantize._pairs,
        double_quant.dynamic_map,
        double_quant._nearest_of_bin,
    ):
        cached.cache_clear()
    spec = QuantSpec(format="nf4", group_size=16, double_quant=True)
    with torch.inference_mode():
        module = QuantLinear.from_quantized(make(spec))
        module(torch.randn(2, 48))
    module = QuantLinear.from_quantized(make(spec), torch.zeros(24))
    x = torch.randn(2, 48, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None


def test_repr_says_what_it_holds():
    text = repr(QuantLinear.from_quantized(make(SPECS[-1])))
    assert "[24, 48], int4, group 16, gptq" in text
    assert "asymmetric" in repr(QuantEmbedding.from_quantized(make(SPECS[9]), torch.float32))
    assert "per channel" in repr(QuantLinear.from_quantized(make(QuantSpec(format="int8"))))
