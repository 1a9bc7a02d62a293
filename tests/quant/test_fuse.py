"""Several quantized weights as one: the same products, the same files, nothing stored twice."""

import pytest
import torch

from brise.quant import linear
from brise.quant.algorithms import ALGORITHMS
from brise.quant.config import QuantSpec
from brise.quant.formats import FORMATS
from brise.quant.fuse import fuse, why_not
from brise.quant.linear import QuantLinear
from brise.quant.tensor import QuantizedTensor

ROWS, WIDTH = (32, 16, 48), 64


def layers(**spec):
    torch.manual_seed(0)
    made = QuantSpec(**spec)
    return [
        QuantLinear.from_quantized(ALGORITHMS["rtn"].run(torch.randn(n, WIDTH), made, None)) for n in ROWS
    ]


SPECS = [{"format": name, "group_size": 32} for name in FORMATS]
SPECS += [{"format": "int4", "group_size": 32, "symmetric": False}, {"format": "int8", "group_size": None}]


@pytest.mark.parametrize("tiles", [False, True], ids=["portable", "tiles"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: " ".join(map(str, s.values())))
def test_one_product_is_the_others_side_by_side(spec, tiles, monkeypatch):
    if tiles:
        if spec["format"] == "int3":
            pytest.skip("the two planes of int3 cannot be cut by rows, and on a GPU why_not says so")
        pack = linear.pack_weight
        monkeypatch.setattr(linear, "pack_weight", lambda *a, **k: pack(*a, **{**k, "layout_name": "tiles"}))
    parts = layers(**spec)
    x = torch.randn(5, WIDTH)
    products = [part(x) for part in parts]
    states = [{n: t.clone() for n, t in part.state_dict().items()} for part in parts]
    whole, cut = fuse(parts, torch.float32)
    assert whole.layout == ("tiles" if tiles else "portable")
    torch.testing.assert_close(whole(x), torch.cat(products, dim=1), atol=1e-5, rtol=1e-5)
    for part, product, state in zip(cut, products, states):
        torch.testing.assert_close(part(x), product, atol=1e-5, rtol=1e-5)
        assert part.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[n]) for n, t in part.state_dict().items())
    name = "packed_qweight" if tiles else "qweight"
    storages = {m.get_buffer(name).untyped_storage().data_ptr() for m in (whole, *cut)}
    assert len(storages) == 1
    # a part that is moved goes its own way
    alone = cut[1].to("cpu")
    alone.release()
    torch.testing.assert_close(alone(x), products[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(alone.state_dict()["qweight"], states[1]["qweight"])


def test_what_cannot_be_one_says_why():
    assert (
        why_not(layers(format="nf4", double_quant=True))
        == "double-quantized scales have an offset for each weight"
    )
    mixed = [*layers(format="nf4")[:1], *layers(format="int8")[1:]]
    assert "different ways" in why_not(mixed)
    biased = layers(format="nf4")
    biased[0].bias = torch.nn.Parameter(torch.zeros(ROWS[0]))
    assert "biases" in why_not(biased)
    odd = QuantLinear.from_quantized(
        ALGORITHMS["rtn"].run(torch.randn(12, WIDTH), QuantSpec(format="nf4"), None)
    )
    assert "multiples of 16" in why_not([odd, odd])
    with pytest.raises(ValueError, match="double-quantized"):
        fuse(layers(format="nf4", double_quant=True), torch.float32)


def test_orders_of_groups_must_agree():
    from brise.quant.gptq import GPTQOptions

    options = GPTQOptions(act_order=True, static_groups=False)
    spec = QuantSpec(format="int4", group_size=32, algorithm="gptq", options=options)
    orders = [torch.arange(WIDTH, dtype=torch.int32) // 32, torch.arange(WIDTH, dtype=torch.int32) % 2]

    def layer(order):
        plain = ALGORITHMS["rtn"].run(torch.randn(32, WIDTH), QuantSpec(format="int4", group_size=32), None)
        return QuantLinear.from_quantized(
            QuantizedTensor(spec, plain.shape, {**plain.tensors, "g_idx": order})
        )

    assert "orders" in why_not([layer(orders[0]), layer(orders[1])])
    parts = [layer(orders[1]), layer(orders[1].clone())]
    x = torch.randn(3, WIDTH)
    wanted = torch.cat([part(x) for part in parts], dim=1)
    whole, _ = fuse(parts, torch.float32)
    torch.testing.assert_close(whole(x), wanted, atol=1e-5, rtol=1e-5)
