"""The launches of the products with epilogues that ship: Mistral-7B's layers, whose stream is 4096 wide."""

from __future__ import annotations

from typing import Any

from . import tuning
from .matmul_epilogue import matmul_residual_kernel, matmul_rope_kernel, matmul_swiglu_kernel
from .variant import Variant
from .variants_matmul import matmul_variant

# rooms for the partial sums of squares of 4096 channels
_PARTS = 64
# the widest block that leaves registers for an epilogue on every architecture
_MOST_TOKENS = 32
_KERNELS = {
    "residual": matmul_residual_kernel,
    "swiglu": matmul_swiglu_kernel,
    "rope": matmul_rope_kernel,
}
# as one token's product is split on 132 multiprocessors: gate and up are enough programs as they are
_SPLITS = {"residual": 4, "swiglu": 1, "rope": 2}


def _variant(
    kind: str,
    fmt: str,
    group: int,
    dtype: str,
    config: tuning.MatmulConfig,
    norm: bool,
    head_dim: int = 128,
    **changes: Any,
) -> Variant:
    plain = matmul_variant(fmt, group, dtype, config, **({"SPLIT": _SPLITS[kind]} | changes))
    names = _KERNELS[kind].arg_names
    pointer = "*" + dtype
    types = plain.types | {
        name: pointer for name in names if name.endswith("_ptr") and name not in plain.types
    }
    types |= {name: "i32" for name in names if name not in types and name.islower()}
    types |= {"T": "i32", "H": "i32", "KV": "i32", "W": "i32", "sums_ptr": "*fp32", "position_ptr": "*i32"}
    types["eps"] = "fp32"
    constants = {name: value for name, value in plain.constants.items() if name != "BIAS"}
    if kind == "residual":
        constants["NORM"] = norm
    else:
        constants["PARTS"] = _PARTS if norm else 0
    if kind == "rope":
        # one token a row: the launch makes a constant of an argument that is 1
        constants |= {"D": head_dim, "T": 1}
    strides = [name for name in names if len(name) == 3 and name.startswith("s") and name != "sxk"]
    name = plain.name.replace("matmul", f"matmul-{kind}", 1) + "-normed" * norm
    return Variant(
        name + f"-d{head_dim}" * (kind == "rope" and head_dim != 128), _KERNELS[kind],
        {name: types[name] for name in names if name not in constants}, constants, plain.warps, plain.stages,
        divisible=(*plain.divisible, "W", *strides), weights=plain.weights, needs=plain.needs,
    )  # fmt: skip


def variants() -> list[Variant]:
    """bf16 with the norms half done, fp16 without; and what was found for an architecture."""
    configs = [config for _, config in tuning.MATMUL if config.bm <= _MOST_TOKENS]
    one = configs[0]
    out = []
    for kind in _KERNELS:
        out += [_variant(kind, "int4", 128, "bf16", config, True) for config in configs]
        out += [
            _variant(kind, "int4", 128, "bf16", config, True, SPLIT=1)
            for config in configs
            if kind != "swiglu"
        ]
        if kind != "swiglu":
            # before the first block, and behind the last one, the norm is a launch of its own
            out.append(_variant(kind, "int4", 128, "bf16", one, False))
        out += [_variant(kind, "int4", 128, "fp16", config, False) for config in configs]
        out.append(_variant(kind, "int4", 128, "bf16", one, True, ZERO=True))
        out.append(_variant(kind, "int4", 128, "bf16", one, True, EVEN=False))
        out.append(_variant(kind, "nf4", 64, "bf16", one, True))
        out.append(_variant(kind, "int8", 0, "bf16", one, True))
        out += [_variant(kind, fmt, 64, "bf16", one, True) for fmt in ("int3", "int2")]
    for fmt, config in tuning.tuned_configs():
        if config.bm <= _MOST_TOKENS:
            group = {"int4": 128, "int8": 0}.get(fmt, 64)
            out += [_variant(kind, fmt, group, "bf16", config, True) for kind in _KERNELS]
    # as the output and down projections have it, which need not be fused
    out.append(_variant("residual", "nf4", 64, "bf16", one, True, DOUBLE=True))
    out += [_variant("rope", "int4", 128, "bf16", one, True, head_dim=width) for width in (64, 96)]
    return out
