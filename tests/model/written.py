"""Small checkpoints to write, and what is seen of them from outside."""

from pathlib import Path

import torch

from brise.model.checkpoint import CheckpointReader, CheckpointWriter

INTEGERS = (torch.uint64, torch.int64, torch.uint32, torch.int32, torch.uint16, torch.int16, torch.int8)
INDEX = "model.safetensors.index.json"


def tensors(fill=1):
    """Some of every width, shape and stride."""
    generator = torch.Generator().manual_seed(fill)
    wide = torch.randn(6, 10, generator=generator)
    return {
        "b.weight": wide,
        "a.weight": wide.bfloat16().t(),
        "a.codes": torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=generator),
        "scalar": torch.tensor(float(fill)),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "long": torch.arange(5) * fill,
        "flag": torch.tensor([True, False]),
        "strided": wide[::2, 1::3].double(),
        "eight": wide.to(torch.float8_e4m3fn),
        "power": wide.abs().to(torch.float8_e8m0fnu),
        "other eight": wide.to(torch.float8_e5m2),
        **{f"z{d.itemsize}{d}": torch.arange(9).to(d) for d in INTEGERS},
        "ünï.weight": wide[:1].half(),
    }


def write(out, fill=1, finish=True, config=None, copy_from=None, extra=None, **options):
    with CheckpointWriter(out, **options) as writer:
        for name, tensor in tensors(fill).items():
            writer.add(name, tensor)
        if finish:
            writer.finish({"fill": fill} if config is None else config, copy_from, extra)
    return Path(out)


def state(out):
    """What a reader sees at ``out``: None, or which of the writers made it, everything checked."""
    if not out.exists():
        return None
    reader = CheckpointReader(out)
    fill = reader.config["fill"]
    expected = tensors(fill)
    assert reader.names == sorted(expected)
    for name, tensor in reader.tensors():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape
        assert tensor.float().equal(expected[name].float())
    return fill


def siblings(out):
    return sorted(p.name for p in out.parent.iterdir() if p != out)
