"""Ahead-of-time compilation for a named GPU, on any machine: what the compiler made of every shipped
configuration.

The triton wheel carries ptxas, cuobjdump and nvdisasm, so registers, spills, shared memory and the
instructions themselves can be read, and held in tests, where there is no GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import tuning
from .int8 import int8_dynamic_kernel, quantize_tokens_kernel
from .matmul import dequantize_kernel, matmul_kernel

ARCHITECTURES = (80, 90)
# bytes of shared memory that one program may have (CUDA programming guide, technical specifications)
SHARED_LIMIT = {80: 166_912, 90: 232_448}
_DTYPES = {"fp16": tl.float16, "bf16": tl.bfloat16}


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time arguments, as it is launched.

    ``types`` names every run-time argument and its type; those in ``divisible`` are multiples of 16.
    ``weights`` is the number of weights a step decodes, 0 for kernels that decode none.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    divisible: tuple[str, ...] = ()
    weights: int = 0
    needs: tuple[str, ...] = field(default=())


def compile_variant(variant: Variant, arch: int) -> dict[str, Any]:
    """Compile for sm_<arch>: registers, stack and spill bytes, shared memory, and instructions by family.

    ``per_weight`` is the instructions of the longest loop a weight and lane: what a regression would show in.
    """
    names = variant.kernel.arg_names
    signature = {n: "constexpr" if n in variant.constants else variant.types[n] for n in names}
    aligned = [n for n, t in signature.items() if t.startswith("*") or n in variant.divisible]
    source = ASTSource(
        variant.kernel,
        signature,
        {(names.index(n),): value for n, value in variant.constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        sass = _run(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for {variant.name}: {usage[:500]}")
    counts = Counter(op for op, _ in instructions(sass))
    loop = _longest_loop(sass)
    row = {
        "kernel": variant.name,
        "arch": f"sm_{arch}",
        "triton": triton.__version__,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "local": int(found[3]),
        "spills": sum(n for op, n in counts.items() if op.startswith(("STL", "LDL"))),
        "shared": built.metadata.shared,
        "instructions": sum(counts.values()),
        "loop": len(loop),
        "per_weight": round(len(loop) * variant.warps * 32 / variant.weights, 3) if variant.weights else None,
    }
    families = ("HGMMA", "HMMA", "IGMMA", "IMMA", "LDGSTS", "LDSM", "SHFL")
    for family in families:
        row[family] = sum(n for op, n in counts.items() if op.startswith(family))
    row["wide_loads"] = sum(n for op, n in counts.items() if op.startswith("LDG") and ".128" in op)
    return row


def faults(variant: Variant, row: dict[str, Any]) -> list[str]:
    """What is wrong with a row of :func:`compile_variant`; empty for a sound one."""
    arch = int(row["arch"].removeprefix("sm_"))
    found = [f"{name} {row[name]}" for name in ("spills", "local") if row[name]]
    if row["shared"] > SHARED_LIMIT[arch]:
        found.append(f"shared memory {row['shared']} above {SHARED_LIMIT[arch]}")
    if arch >= 90:
        found += [f"no {name}" for name in variant.needs if not row[name]]
    if variant.weights and not row["wide_loads"]:
        found.append("no 128-bit load of the weights")
    return found


def _run(tool: Path, *arguments: str) -> str:
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> Iterator[tuple[str, str]]:
    """(operation with its modifiers, operands) of every machine instruction of a disassembly."""
    for line in sass.splitlines():
        found = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", line)
        if found and found[1] != "NOP":
            yield found[1], found[2]


def _longest_loop(sass: str) -> list[str]:
    """The operations of the loop with the most of them: from a label to the branch that goes back to it."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    longest: tuple[int, int] = (0, 0)
    for line in sass.splitlines():
        if found := re.match(r"(\.L_\w+):", line.strip()):
            labels[found[1]] = len(operations)
        for op, rest in instructions(line):
            operations.append(op)
            target = re.search(r"\((\.L_\w+)\)", rest)
            if op.startswith("BRA") and target and target[1] in labels:
                span = (labels[target[1]], len(operations))
                if span[1] - span[0] > max(1, longest[1] - longest[0]):
                    longest = span
    return operations[longest[0] : longest[1]]


def _matmul(fmt: str, group: int, dtype: str, config: tuning.MatmulConfig, **changes: Any) -> Variant:
    options = {"ZERO": False, "DOUBLE": False, "BIAS": False, "SPLIT": 1, "EVEN": True} | changes
    bk = tuning.block_k(config, group)
    marks = [key.lower() for key in ("ZERO", "DOUBLE", "BIAS") if options[key]]
    marks += ["split"] * (options["SPLIT"] > 1) + ["ragged"] * (not options["EVEN"])
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
    out = [_matmul("int4", 128, dtype, config) for dtype in ("fp16", "bf16") for config in configs]
    out += [_matmul("int4", group, "fp16", one, ZERO=zero) for group in (32, 64, 0) for zero in (False, True)]
    out += [
        _matmul("int4", 128, "fp16", one, SPLIT=4),
        _matmul("int4", 128, "fp16", one, ZERO=True, BIAS=True),
    ]
    out += [_matmul("int4", 128, "fp16", one, EVEN=False)]
    for fmt in ("nf4", "fp4"):
        out += [_matmul(fmt, 64, dtype, one) for dtype in ("fp16", "bf16")]
    out += [_matmul("nf4", 64, "fp16", config) for config in configs[1:]]
    out += [_matmul("nf4", 64, dtype, one, DOUBLE=True, SPLIT=4) for dtype in ("fp16", "bf16")]
    out += [_matmul("int8", 0, dtype, one) for dtype in ("fp16", "bf16")]
    out += [_matmul("int8", 0, "fp16", config) for config in configs[1:]]
    out += [_matmul(fmt, 64, dtype, one) for fmt in ("int3", "int2") for dtype in ("fp16", "bf16")]
    return out


def other_variants() -> list[Variant]:
    """Dequantization, and the int8 x int8 product with its quantization of tokens."""
    base = _matmul("int4", 128, "fp16", tuning.MATMUL[0][1])
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
    """Every configuration that ships."""
    return matmul_variants() + other_variants()
