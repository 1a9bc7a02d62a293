"""Write quantized_weights.json: run only when a format is added. What is in it already must not change."""

import json
from pathlib import Path

import torch

from brise.quant.apply import quantize_weight
from brise.quant.config import QuantSpec
from brise.quant.formats import FORMATS

SHAPE = (4, 32)


def weight(rows: int, width: int) -> torch.Tensor:
    """Multiples of 1/64 between -2 and 2 in no order, a row of zeros, a one-signed row."""
    n, k = torch.arange(rows)[:, None], torch.arange(width)[None]
    w = ((n * 37 + k * 101 + n * k * 7) % 257 - 128) / 64
    w[1] = 0
    w[2] = w[2].abs()
    return w


def to_hex(t: torch.Tensor) -> str:
    return bytes(t.contiguous().flatten().view(torch.uint8).tolist()).hex()


def main() -> None:
    specs = {}
    for name in FORMATS:
        specs[name] = QuantSpec(format=name, group_size=16)
        specs[f"{name}-dq"] = QuantSpec(format=name, group_size=16, double_quant=True)
        if name.startswith("int"):
            specs[f"{name}-asym"] = QuantSpec(format=name, group_size=16, symmetric=False)
    specs["int8-row"] = QuantSpec(format="int8", scale="absmax_narrow", scale_dtype="float32")
    specs["int3-bf16"] = QuantSpec(format="int3", group_size=8, symmetric=False, scale_dtype="bfloat16")
    specs["int4-g_idx"] = QuantSpec(
        format="int4", group_size=8, algorithm="gptq", symmetric=False, options={"static_groups": False}
    )
    # a diagonal Hessian leaves no sum to round: the same bytes on any machine
    hessian = torch.diag((torch.arange(SHAPE[1]) * 11 % 32 + 1).float())
    out = []
    for name, spec in specs.items():
        q = quantize_weight(name, weight(*SHAPE), spec, hessian)
        out.append(
            {
                "name": name,
                "spec": spec.to_dict(),
                "shape": list(SHAPE),
                "original": to_hex(weight(*SHAPE)),
                "tensors": {n: to_hex(t) for n, t in q.tensors.items()},
                "weights": to_hex(q.dequantize(torch.float32)),
            }
        )
    path = Path(__file__).parent / "quantized_weights.json"
    path.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
