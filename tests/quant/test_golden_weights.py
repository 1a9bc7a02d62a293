"""What is on disk today is read the same for ever: pinned bytes of small weights, and what they stand for.

``tests/golden/quantized_weights.json`` holds, for every spec, the original weights, the stored tensors and the
dequantized fp32 weights as hexadecimal bytes. ``python tests/golden/make_quantized_weights.py`` writes it anew;
a changed byte is a changed format.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from brise.quant.apply import quantize_weight
from brise.quant.config import QuantSpec
from brise.quant.formats import FORMATS
from brise.quant.tensor import QuantizedTensor, layout

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "quantized_weights.json").read_text())


def from_hex(text: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype).view(shape)


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: e["name"])
def test_stored_bytes_are_read_as_ever(entry):
    spec = QuantSpec.from_dict(entry["spec"])
    shape = tuple(entry["shape"])
    tensors = {
        name: from_hex(entry["tensors"][name], dtype, size)
        for name, (dtype, size) in layout(spec, shape).items()
    }
    q = QuantizedTensor(spec, shape, tensors)
    assert torch.equal(q.dequantize().view(torch.int32), from_hex(entry["weights"], torch.int32, shape))


@pytest.mark.parametrize(
    "entry", [e for e in GOLDEN if e["spec"]["algorithm"] == "rtn"], ids=lambda e: e["name"]
)
def test_rounding_gives_the_same_bytes_as_ever(entry):
    w = from_hex(entry["original"], torch.float32, tuple(entry["shape"]))
    q = quantize_weight("w", w, QuantSpec.from_dict(entry["spec"]))
    assert {
        name: bytes(t.flatten().view(torch.uint8).tolist()).hex() for name, t in q.tensors.items()
    } == entry["tensors"]


def test_every_format_is_pinned():
    assert {entry["spec"]["format"] for entry in GOLDEN} == set(FORMATS)
    assert any("g_idx" in entry["tensors"] for entry in GOLDEN)
