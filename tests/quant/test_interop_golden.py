"""Weights that other libraries packed, and what they decoded them to: read here to the same bits, and written back.

The files were written once by golden/make_interop.py, in environments of those libraries.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from brise.quant.config import QuantSpec
from brise.quant.gptq import GPTQOptions
from brise.quant.interop.awq import AWQWeight
from brise.quant.interop.compressed_tensors import PackedWeight
from brise.quant.interop.gptq import GPTQWeight

FOLDER = Path(__file__).parent.parent / "golden" / "interop"
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
SHAPE = (64, 96)


def load(name: str) -> tuple[dict, dict]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (no dict)
        return json.loads(file.metadata()["config"]), tensors


def test_the_files_are_there():
    assert len(NAMES) == 10 and sum(p.stat().st_size for p in FOLDER.iterdir()) < 500_000


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("gptq_v2")])
def test_gptqmodel(name):
    config, theirs = load(name)
    options = GPTQOptions(act_order=True, static_groups=False) if config["desc_act"] else None
    spec = QuantSpec(
        format=f"int{config['bits']}",
        group_size=config["group_size"],
        symmetric=config["sym"],
        algorithm="gptq" if options else "rtn",
        options=options,
    )
    q = GPTQWeight(2).read(theirs, spec, SHAPE)
    # they multiply in float16: the fp32 product is exact, so rounding it once gives theirs
    assert torch.equal(q.dequantize(torch.float16).float(), theirs["decoded"])
    assert all(torch.equal(t, theirs[n]) for n, t in GPTQWeight(2).write(q).items())


def test_awq():
    config, theirs = load("awq")
    spec = QuantSpec(format="int4", group_size=config["group_size"], symmetric=False)
    q = AWQWeight().read(theirs, spec, SHAPE)
    assert torch.equal(q.dequantize(torch.float16).float(), theirs["decoded"])
    assert all(torch.equal(t, theirs[n]) for n, t in AWQWeight().write(q).items())


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("compressed-tensors")])
def test_compressed_tensors(name):
    config, theirs = load(name)
    spec = QuantSpec(
        format=f"int{config['num_bits']}",
        group_size=config["group_size"],
        symmetric=config["symmetric"],
        scale_dtype="float32",
    )
    q = PackedWeight("float32").read(theirs, spec, SHAPE)
    assert torch.equal(q.dequantize(), theirs["decoded"])
    assert all(torch.equal(t, theirs[n]) for n, t in PackedWeight("float32").write(q).items())
