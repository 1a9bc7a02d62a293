"""The launches of the matrix products that ship: every format, group mode and token block of tuning.py."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from . import tuning
from .int8 import int8_dynamic_kernel, quantize_tokens_kernel
from .matmul import dequantize_kernel, matmul_kernel
from .variant import Variant

_DTYPES = {"fp16": tl.float16, "bf16": tl.bfloat16}


def matmul_variant(fmt: str, group: int, dtype: str, config: tuning.MatmulConfig, **changes: Any) -> Variant:
    """The plain product; BIAS, SPLIT and the like by ``changes``."""
    options = {"ZERO": False, "DOUBLE": False, "BIAS": False, "SPLIT": 1, "EVEN": True} | changes
    bk = tuning.block_k(config, group)
    marks = [key.lower() for key in ("ZERO", "DOUBLE", "BIAS") if options[key]]
    marks += ["split"] * (options["SPLIT"] > 1) + ["ragged"] * (not options["EVEN"])
    if all(config != usual for _, usual in tuning.MATMUL):
        marks.append(f"n{config.bn}k{config.bk}w{config.warps}s{config.stages}")
    name = "-".join(["matmul", fmt, f"g{group}" if group else "row", dtype, f"m{config.bm}", *marks])
    pointer = "*" + dtype
    scale = "*u8" if options["DOUBLE"] else "*fp32" if fmt in ("nf4", "fp4") else "*fp16"
    types = {
        "x_ptr": pointer, "w_ptr": "*u8", "s_ptr": scale, "z_ptr": "*u8", "absmax_ptr": "*fp32",
        "offset_ptr": "*fp32", "map_ptr": "*fp32", "book_ptr": "*fp32", "bias_ptr": pointer, "y_ptr": pointer,
        "work_ptr": "*fp32", "lock_ptr": "*i32", "M": "i32", "N": "i32", "K": "i32", "G": "i32", "sxm": "i32",
        "plane_bytes": "i32",
    }  # fmt: skip
    constants = {
        "FORMAT": fmt, "GROUP": group, "BN": config.bn, "BK": bk, "BM": config.bm, "STAGES": config.stages,
        "DTYPE": _DTYPES[dtype], "ASM": True, "sxk": 1, **options,
    }  # fmt: skip
    needs = ("HGMMA",) if config.warps >= 4 and config.bn >= 64 else ()
    return Variant(
        name, matmul_kernel, types, constants, config.warps, config.stages,
        divisible=("N", "K", "sxm", "plane_bytes"), weights=config.bn * bk, needs=needs,
    )  # fmt: skip


def matmul_variants() -> list[Variant]:
    """What launch.py starts: every format, group mode and token block in fp16, the frequent ones in bf16."""
    configs = [config for _, config in tuning.MATMUL]
    one = configs[0]
    out = [matmul_variant("int4", 128, dtype, config) for dtype in ("fp16", "bf16") for config in configs]
    out += [
        matmul_variant("int4", group, "fp16", one, ZERO=zero)
        for group in (32, 64, 0)
        for zero in (False, True)
    ]
    out += [
        matmul_variant("int4", 128, "fp16", one, SPLIT=4),
        matmul_variant("int4", 128, "fp16", one, ZERO=True, BIAS=True),
    ]
    out += [matmul_variant("int4", 128, "fp16", one, EVEN=False)]
    for fmt in ("nf4", "fp4"):
        out += [matmul_variant(fmt, 64, dtype, one) for dtype in ("fp16", "bf16")]
    out += [matmul_variant("nf4", 64, "fp16", config) for config in configs[1:]]
    out += [matmul_variant("nf4", 64, dtype, one, DOUBLE=True, SPLIT=4) for dtype in ("fp16", "bf16")]
    out += [matmul_variant("int8", 0, dtype, one) for dtype in ("fp16", "bf16")]
    out += [matmul_variant("int8", 0, "fp16", config) for config in configs[1:]]
    out += [matmul_variant(fmt, 64, dtype, one) for fmt in ("int3", "int2") for dtype in ("fp16", "bf16")]
    groups = {"int4": 128, "int8": 0}
    for fmt, config in tuning.tuned_configs():
        out += [matmul_variant(fmt, groups.get(fmt, 64), dtype, config) for dtype in ("fp16", "bf16")]
    return out


def other_variants() -> list[Variant]:
    """Dequantization, and the int8 x int8 product with its quantization of tokens."""
    base = matmul_variant("int4", 128, "fp16", tuning.MATMUL[0][1])
    out = []
    for fmt, group in (("int4", 128), ("nf4", 64), ("int8", 0), ("int3", 64), ("int2", 64)):
        names = dequantize_kernel.arg_names
        types = {n: base.types[n] for n in names if n in base.types}
        types["s_ptr"] = "*fp32" if fmt == "nf4" else "*fp16"
        constants = {"FORMAT": fmt, "GROUP": group, "ZERO": False, "DOUBLE": False, "BN": 64, "BK": 64}
        constants |= {"DTYPE": tl.float16, "ASM": True}
        out.append(
            Variant(f"dequantize-{fmt}-fp16", dequantize_kernel, types, constants, 4, divisible=("N", "K"))
        )
    plain = [(config, False) for _, config in tuning.INT8_DYNAMIC]
    for config, outliers in plain + [(config, True) for _, config in tuning.INT8_OUTLIERS]:
        types = {
            "x_ptr": "*fp16", "q_ptr": "*i8", "xs_ptr": "*fp32", "outlier_ptr": "*u8", "w_ptr": "*u8",
            "ws_ptr": "*fp32", "bias_ptr": "*fp16", "y_ptr": "*fp16",
            "M": "i32", "N": "i32", "K": "i32", "sxm": "i32",
        }  # fmt: skip
        constants = {
            "BM": config.bm, "BN": config.bn, "BK": config.bk, "STAGES": config.stages, "OUTLIERS": outliers,
            "BIAS": False, "DTYPE": tl.float16, "sxk": 1,
        }  # fmt: skip
        name = f"int8-dynamic-m{config.bm}" + ("-outliers" if outliers else "")
        out.append(
            Variant(
                name,
                int8_dynamic_kernel,
                types,
                constants,
                config.warps,
                config.stages,
                divisible=("N", "K", "sxm"),
                needs=("IGMMA",),
            )
        )
    types = {
        "x_ptr": "*fp16",
        "outlier_ptr": "*u8",
        "q_ptr": "*i8",
        "scale_ptr": "*fp32",
        "K": "i32",
        "sxm": "i32",
    }
    constants = {"BLOCK": 1024, "OUTLIERS": True, "sxk": 1}
    out.append(
        Variant("quantize-tokens", quantize_tokens_kernel, types, constants, 4, divisible=("K", "sxm"))
    )
    return out


def variants() -> list[Variant]:
    return matmul_variants() + other_variants()
