"""The launches of decode attention that ship: every head size, the frequent ones in each dtype and with int8 rings."""

from __future__ import annotations

import triton.language as tl

from . import tuning_decode
from .decode import decode_kernel
from .variant import Variant

_DTYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}


def _decode(head_dim: int, groups: int, dtype: str, int8: bool = False, queries: int = 1) -> Variant:
    size = 4 if dtype == "fp32" else 2
    tile = tuning_decode.rows_of(groups * queries, size)
    config = tuning_decode.decode_config(head_dim, size, tile)
    pointer = "*" + dtype
    ring = "*i8" if int8 else pointer
    types = {
        "q_ptr": pointer, "k_ptr": ring, "v_ptr": ring, "ks_ptr": "*fp32", "vs_ptr": "*fp32", "seen_ptr": "*i32",
        "start_ptr": "*i32", "out_ptr": pointer, "acc_ptr": "*fp32", "stat_ptr": "*fp32", "lock_ptr": "*i32",
        "scale": "fp32", "T": "i32", "KV": "i32", "W": "i32", "window": "i32",
    }  # fmt: skip
    strides = ("sqb", "sqt", "sqh", "skb", "skh", "skw", "svb", "svh", "svw", "ssb", "ssh")
    constants = {
        "G": groups, "D": head_dim, "BD": 1 << (head_dim - 1).bit_length(), "BR": tile, "BN": config.bn,
        "CHUNK": tuning_decode.CHUNK,
        "INT8": int8, "START": queries > 1, "SEVERAL": queries > 1, "STAGES": config.stages, "DTYPE": _DTYPES[dtype],
    }  # fmt: skip
    if queries == 1:
        # the launch makes a constant of an argument that is 1
        constants["T"] = 1
    name = f"decode-d{head_dim}-g{groups}-{dtype}" + "-int8" * int8 + f"-t{queries}" * (queries > 1)
    return Variant(
        name, decode_kernel, types | dict.fromkeys(strides, "i32"), constants, config.warps, config.stages,
        divisible=("W", *strides), needs=("HMMA",) if size == 2 and tile < 64 else (),
    )  # fmt: skip


def variants() -> list[Variant]:
    """Mistral has 4 query heads a KV head, of 128; SmolLM2 3, of 64."""
    out = [_decode(128, 4, dtype) for dtype in ("fp16", "bf16", "fp32")]
    out += [_decode(128, 4, dtype, int8=True) for dtype in ("fp16", "bf16", "fp32")]
    out += [_decode(128, 4, "bf16", queries=8), _decode(128, 4, "bf16", int8=True, queries=8)]
    out += [_decode(64, 3, "fp16"), _decode(64, 3, "bf16", int8=True), _decode(96, 1, "fp16")]
    out += [_decode(256, 2, dtype) for dtype in ("fp16", "fp32")] + [_decode(256, 2, "fp16", int8=True)]
    # many query heads on one KV head
    return [
        *out,
        _decode(128, 64, "bf16"),
        _decode(128, 64, "fp16", int8=True),
        _decode(256, 64, "fp16", int8=True),
    ]
