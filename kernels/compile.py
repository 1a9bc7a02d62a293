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
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import variants_attention, variants_decode, variants_epilogue, variants_fused, variants_matmul
from .variant import Variant

ARCHITECTURES = (80, 90)
# bytes of shared memory that one program may have (CUDA programming guide, technical specifications)
SHARED_LIMIT = {80: 166_912, 90: 232_448}


def build(variant: Variant, arch: int) -> Any:
    """What triton makes of a variant for sm_<arch>: ``.asm`` holds its stages, from "ttir" to "cubin"."""
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
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_variant(variant: Variant, arch: int) -> dict[str, Any]:
    """Compile for sm_<arch>: registers, stack and spill bytes, shared memory, and instructions by family.

    ``per_weight`` is the instructions of the longest loop a weight and lane: what a regression would show in.
    """
    built = build(variant, arch)
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


def variants() -> list[Variant]:
    """Every configuration that ships."""
    families = (variants_matmul, variants_epilogue, variants_attention, variants_decode, variants_fused)
    return [variant for family in families for variant in family.variants()]
