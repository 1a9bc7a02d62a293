"""The launches of sliding-window attention that ship: each head_dim, and what padding or packing makes of them."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from . import tuning_attention as tuning
from .attention import forward_kernel
from .attention_backward import dkdv_kernel, dq_kernel
from .variant import Variant

_DTYPES = {"fp16": tl.float16, "bf16": tl.bfloat16}


def _variant(
    what: str,
    arch: int,
    head_dim: int,
    dtype: str,
    groups: int = 4,
    bounded: bool = False,
    windowed: bool = True,
) -> Variant:
    kernel = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}[what]
    config: tuning.AttentionConfig = getattr(tuning.configs(arch, head_dim, 2), what)
    types: dict[str, str] = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            whole = name in ("bounds_ptr", "ranges_ptr")
            exact = name in ("lse_ptr", "dlse_ptr", "delta_ptr")
            types[name] = "*i32" if whole else "*fp32" if exact else "*" + dtype
        elif name in ("scale", "qk_scale"):
            types[name] = "fp32"
        else:
            types[name] = "i32"
    constants: dict[str, Any] = {
        "G": groups, "D": head_dim, "DP": 1 << (head_dim - 1).bit_length(), "BM": config.bm, "BN": config.bn,
        "CAUSAL": not bounded, "WINDOWED": windowed and not bounded, "BOUNDED": bounded,
        "DTYPE": _DTYPES[dtype], "STAGES": config.stages,
    }  # fmt: skip
    if what == "dq":
        constants["DLSE"] = False
    strides = tuple(n for n in kernel.arg_names if len(n) == 3 and n[0] == "s" and n not in ("sbb", "srb"))
    marks = ["bounds"] * bounded + ["causal"] * (not windowed and not bounded) + ["mha"] * (groups == 1)
    name = "-".join([f"attention-{what}", f"d{head_dim}", dtype, f"sm{arch}", *marks])
    # the side of the product that the instruction wants 64 wide
    wide = (config.bn if what == "dkdv" else config.bm) >= 64
    return Variant(
        name, kernel, types, constants, config.warps, config.stages, divisible=strides,
        needs=("HGMMA",) if wide else (),
        arches=(arch,),
    )  # fmt: skip


def variants() -> list[Variant]:
    """Every head_dim in bf16, and at 128 also fp16, with bounds, without a window and without groups."""
    out = []
    for arch in (80, 90):
        for what in ("forward", "dq", "dkdv"):
            out += [_variant(what, arch, head_dim, "bf16") for head_dim in (64, 96, 128, 256)]
            out += [_variant(what, arch, 128, "fp16"), _variant(what, arch, 128, "bf16", bounded=True)]
        out += [
            _variant("forward", arch, 128, "bf16", windowed=False),
            _variant("forward", arch, 128, "bf16", groups=1),
        ]
    return out
