"""What the compiler makes of every kernel configuration that ships, for GPUs that need not be here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Progress = Callable[[str, int, int], None]
ROWS = "compile.jsonl"
_COLUMNS = (
    "registers", "spills", "shared", "instructions", "loop", "per_weight", "HGMMA", "HMMA", "IGMMA", "IMMA",
    "LDGSTS", "LDSM", "SHFL", "wide_loads",
)  # fmt: skip


class CompileError(RuntimeError):
    """No configuration to compile, or none of a name that was asked for."""


def compile_rows(
    arches: Iterable[int] = (), kernel: str | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Compile ahead of time and read the result: a row for every shipped configuration and architecture.

    Args:
        arches: compute capabilities, 80 for sm_80; none is all that kernels/compile.py names.
        kernel: keep the configurations whose name holds this.
        progress: called with (stage, done, total).

    Returns:
        The rows of :func:`brise.kernels.compile.compile_variant`, each with ``faults``, a list of what is wrong.

    Raises:
        ImportError: triton is not installed.
        CompileError: no configuration of that name, or an architecture without a known limit of shared memory.
    """
    try:
        from ..kernels import compile as aot
    except ImportError as error:
        raise ImportError("the kernels are compiled by triton: pip install triton (Linux)") from error
    chosen = tuple(arches) or aot.ARCHITECTURES
    if unknown := [arch for arch in chosen if arch not in aot.SHARED_LIMIT]:
        raise CompileError(f"--arch must be one of {', '.join(map(str, aot.SHARED_LIMIT))}, got {unknown[0]}")
    variants = aot.variants()
    kept = [variant for variant in variants if kernel is None or kernel in variant.name]
    if not kept:
        names = sorted({variant.name.split("-")[0] for variant in variants})
        raise CompileError(
            f"no configuration has {kernel!r} in its name; names begin with {', '.join(names)}"
        )
    pairs = [(variant, arch) for variant in kept for arch in chosen if arch in variant.arches]
    if not pairs:
        raise CompileError(
            f"no configuration of {kernel!r} is launched on sm_{', sm_'.join(map(str, chosen))}"
        )
    rows: list[dict[str, Any]] = []
    for variant, arch in pairs:
        if progress is not None:
            progress("compiled", len(rows), len(pairs))
        row = aot.compile_variant(variant, arch)
        rows.append({**row, "faults": aot.faults(variant, row)})
    if not rows:
        raise CompileError(f"{kernel!r} is launched on no sm_{chosen[0]}")
    if progress is not None:
        progress("compiled", len(rows), len(rows))
    return rows


def write_rows(folder: str | Path, rows: list[dict[str, Any]]) -> Path:
    """Bring ``compile.jsonl`` in ``folder`` up to date: these rows in place of their older ones, the others kept."""
    file = Path(folder) / ROWS
    file.parent.mkdir(parents=True, exist_ok=True)
    old = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    merged = {(row["kernel"], row["arch"]): row for row in old}
    merged |= {(row["kernel"], row["arch"]): {k: v for k, v in row.items() if k != "faults"} for row in rows}
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in merged.values()))
    part.replace(file)
    return file


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; faults, where there are any, as a list below it."""
    lines = [
        "| kernel | arch | " + " | ".join(_COLUMNS) + " |",
        "|:--|:--|" + "--:|" * len(_COLUMNS),
    ]
    for row in rows:
        cells = ["–" if row[name] is None else str(row[name]) for name in _COLUMNS]
        lines.append(f"| {row['kernel']} | {row['arch']} | {' | '.join(cells)} |")
    wrong = [f"- {row['kernel']} {row['arch']}: {', '.join(row['faults'])}" for row in rows if row["faults"]]
    said = f"{len(rows)} configurations, triton {rows[0]['triton']}: "
    said += f"{len(wrong)} with faults" if wrong else "no spills, memory within the limit, no fault"
    return "\n".join([*lines, "", said, *wrong, ""])
