"""The launches of the fused kernels that ship, at the shapes of Mistral-7B and SmolLM2-135M."""

from __future__ import annotations

import triton.language as tl

from . import tuning_decode
from .fused import rms_norm_kernel, rope_kernel, swiglu_kernel
from .variant import Variant

_DTYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}


def _norm(width: int, dtype: str, add: bool) -> Variant:
    block = min(1 << (width - 1).bit_length(), tuning_decode.NORM_BLOCK)
    pointers = ("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "sum_ptr")
    types = dict.fromkeys(pointers, "*" + dtype) | {"D": "i32", "eps": "fp32", "sx": "i32", "sr": "i32"}
    constants = {"BLOCK": block, "ONE": width <= block, "ADD": add, "DTYPE": _DTYPES[dtype]}
    name = f"rms-norm-{width}-{dtype}" + "-add" * add
    warps = tuning_decode.norm_warps(block)
    return Variant(name, rms_norm_kernel, types, constants, warps, divisible=("D", "sx", "sr"))


def _swiglu(dtype: str) -> Variant:
    types = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), "*" + dtype) | dict.fromkeys(
        ("D", "sg", "su"), "i32"
    )
    constants = {"BLOCK": tuning_decode.SWIGLU_BLOCK, "DTYPE": _DTYPES[dtype]}
    return Variant(f"swiglu-{dtype}", swiglu_kernel, types, constants, 4, divisible=("D", "sg", "su"))


def _rope(head_dim: int, dtype: str, int8: bool = False, each: bool = False) -> Variant:
    pointer, ring = "*" + dtype, "*i8" if int8 else "*" + dtype
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "cos_ptr", "sin_ptr", "qo_ptr", "ko_ptr"), pointer)
    types |= {
        "position_ptr": "*i32",
        "keys_ptr": ring,
        "values_ptr": ring,
        "ks_ptr": "*fp32",
        "vs_ptr": "*fp32",
    }
    strides = [n for n in rope_kernel.arg_names if n.startswith("s") and not n.endswith("_ptr")]
    types |= dict.fromkeys(("T", "H", "KV", "W", *strides), "i32")
    half = 1 << (head_dim // 2 - 1).bit_length()
    constants = {
        "D": head_dim, "BD": half, "BH": max(1, min(16, tuning_decode.ROPE_BLOCK // half)), "BT": 1024 if each else 1,
        "EACH": each, "INT8": int8, "DTYPE": _DTYPES[dtype],
    }  # fmt: skip
    if not each:
        # the launch makes a constant of an argument that is 1
        constants["T"] = 1
    name = f"rope-d{head_dim}-{dtype}" + "-int8" * int8 + "-each" * each
    return Variant(name, rope_kernel, types, constants, 2, divisible=("W", *strides))


def variants() -> list[Variant]:
    out = [_norm(4096, dtype, add) for dtype in ("fp16", "bf16") for add in (False, True)]
    out += [_norm(576, "bf16", True), _norm(4096, "fp32", True), _norm(14336, "bf16", True)]
    out += [_swiglu(dtype) for dtype in ("fp16", "bf16", "fp32")]
    out += [_rope(128, dtype, int8) for dtype in ("fp16", "bf16") for int8 in (False, True)]
    return [
        *out,
        _rope(64, "fp16"),
        _rope(96, "bf16"),
        _rope(128, "bf16", True, each=True),
        _rope(128, "fp32"),
    ]
