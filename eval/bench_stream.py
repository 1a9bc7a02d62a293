"""What quantizing a checkpoint of full size takes: time, cores, memory; and the same tensors by bitsandbytes.

Every job runs as the command itself, in a fresh process whose memory is looked at all the while. Pages of mapped
files are counted apart: the system takes them back when it needs them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..model.source import Source, open_source, whole
from ..quant.config import QuantSpec
from ..quant.rows import round_rows
from ..quant.workers import Workers
from .memory import human_bytes, ledger_of_checkpoint
from .process import Watched, watch
from .provenance import collect
from .timing import BenchError, Spread, bitsandbytes_module, take_turns, version_of

Progress = Callable[[str, int, int], None]
ROWS, TABLE = "stream.jsonl", "stream.md"
_SPEC = QuantSpec(format="nf4", double_quant=True)


def run_bench(
    source: Path,
    work: Path,
    *,
    config: str = "nf4-dq-all",
    gptq: Path | None = None,
    gptq_config: str = "gptq-int4-g128",
    windows: int = 32,
    length: int = 512,
    text: str | None = None,
    repeats: int = 5,
    command: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Quantize ``source`` plainly and generate from the result, compare a block with bitsandbytes, and run GPTQ.

    Args:
        work: a folder for what is made; it is removed again.
        gptq: the checkpoint for GPTQ, whose activations are kept in files; None leaves GPTQ out.
        repeats: turns of each side of the comparison.

    Raises:
        ProcessError: a job failed. BenchError: the two libraries give different codes.
    """
    say = progress or (lambda *_: None)
    origin = dataclasses.asdict(collect(torch.device("cpu"), 0, command))
    origin["versions"]["bitsandbytes"] = version_of("bitsandbytes")
    rows: list[dict[str, Any]] = []
    total = 4 if gptq is not None else 3
    work.mkdir(parents=True, exist_ok=True)
    out = work / "plain"
    try:
        say("bench", 0, total)
        warm(source)
        rows.append(
            _job("plain", source, out, config, watch(["quantize", str(source), str(out), "-c", config]))
        )
        say("bench", 1, total)
        rows.append(_generate(out))
        shutil.rmtree(out)
        say("bench", 2, total)
        rows.append(compare(open_source(source), repeats))
        if gptq is not None:
            say("bench", 3, total)
            out = work / "gptq"
            words = ["quantize", str(gptq), str(out), "-c", gptq_config, "--memory", "file"]
            words += ["--windows", str(windows), "--length", str(length), *(["--text", text] if text else [])]
            job = _job("gptq", gptq, out, gptq_config, watch(words))
            rows.append({**job, "windows": windows, "length": length})
        say("bench", total, total)
    finally:
        shutil.rmtree(work / "plain", ignore_errors=True)
        shutil.rmtree(work / "gptq", ignore_errors=True)
    return [{**row, "provenance": origin} for row in rows]


def warm(folder: Path) -> None:
    """Read the files once, so that the page cache holds what fits in it."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(1 << 24)
            while file.readinto(buffer):
                pass


def _job(name: str, source: Path, out: Path, config: str, seen: Watched) -> dict[str, Any]:
    ledger = ledger_of_checkpoint(out)
    return {
        "bench": f"stream-{name}",
        "config": config,
        "parameters": ledger.parameters,
        "source_bytes": sum(p.stat().st_size for p in source.glob("*.safetensors")),
        "stored_bytes": ledger.nbytes,
        "bits_per_weight": ledger.bits_per_weight,
        "seconds": seen.seconds,
        "cpu_seconds": seen.cpu_seconds,
        "anonymous_peak": seen.anonymous_peak,
        "resident_peak": seen.resident_peak,
        "samples": seen.samples,
    }


def _generate(out: Path) -> dict[str, Any]:
    words = ["generate", str(out), "--prompt", "The wind", "--max-new-tokens", "4", "--json"]
    seen = watch(words)
    return {
        "bench": "stream-generate",
        "seconds": seen.seconds,
        "cpu_seconds": seen.cpu_seconds,
        "anonymous_peak": seen.anonymous_peak,
        "resident_peak": seen.resident_peak,
        "samples": seen.samples,
        "said": json.loads(seen.output.splitlines()[-1]),
    }


def compare(source: Source, repeats: int) -> dict[str, Any]:
    """NF4 with double quantization of the first block's Linear weights, by both, in turns: seconds of the whole block.

    Ours reads the rows from the file as it goes, and measures the error too; theirs gets the tensors in memory.

    Raises:
        BenchError: the codes differ.
    """
    functional = bitsandbytes_module().functional
    names = [n for n in source.names if ".layers.0." in n and n.endswith("_proj.weight")]
    tensors = {name: whole(source, name) for name in names}

    def ours() -> list[Any]:
        with Workers() as workers:
            return [
                round_rows(partial(source.rows, n), (t.shape[0], t.shape[1]), _SPEC, workers)
                for n, t in tensors.items()
            ]

    def theirs() -> list[Any]:
        return [
            functional.quantize_4bit(t, blocksize=64, compress_statistics=True, quant_type="nf4")
            for t in tensors.values()
        ]

    for name, mine, (packed, _) in zip(names, ours(), theirs(), strict=True):
        codes = packed.flatten()
        # bitsandbytes has the even weight in the high nibble
        if not torch.equal(mine.tensor.tensors["qweight"].flatten(), (codes >> 4) | (codes << 4)):
            raise BenchError(f"{name}: our codes and bitsandbytes' differ")
    mine, other = take_turns({"ours": ours, "bitsandbytes": theirs}, repeats)
    return {
        "bench": "stream-block",
        "weights": sum(t.numel() for t in tensors.values()),
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "repeats": repeats,
        "ours": dataclasses.asdict(Spread.of(mine)),
        "bitsandbytes": dataclasses.asdict(Spread.of(other)),
        "ratio": statistics.median(b / a for a, b in zip(mine, other, strict=True)),
    }


def write_bench(out: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """Append the rows to ``stream.jsonl`` and write the table of this run to ``stream.md``."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ROWS).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (out / TABLE).write_text(table(rows))
    return [out / ROWS, out / TABLE]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one run in Markdown."""
    by_name = {row["bench"]: row for row in rows}
    lines = [
        "| job | weights | stored | seconds | cores busy | peak memory of its own | with pages of files |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in ("stream-plain", "stream-gptq", "stream-generate"):
        if (row := by_name.get(name)) is None:
            continue
        what = {
            "stream-plain": f"quantize, {row.get('config')}",
            "stream-gptq": f"quantize, {row.get('config')}, {row.get('windows')} windows of {row.get('length')}",
            "stream-generate": "load and generate 4 tokens",
        }[name]
        weights = f"{row['parameters']:,}" if "parameters" in row else ""
        stored = f"{row['stored_bytes']:,} B" if "stored_bytes" in row else ""
        cells = [what, weights, stored, f"{row['seconds']:.1f}", f"{row['cpu_seconds'] / row['seconds']:.2f}"]
        cells += [human_bytes(row["anonymous_peak"]), human_bytes(row["resident_peak"])]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    if (row := by_name.get("stream-block")) is not None:
        ours, other = row["ours"]["median"], row["bitsandbytes"]["median"]
        lines.append(
            f"- NF4 with double quantization of one block ({row['weights']:,} weights, {row['dtype']}): "
            f"ours {ours:.2f} s, bitsandbytes {other:.2f} s, {row['ratio']:.2f} times as long; "
            f"medians of {row['repeats']} turns; equal codes."
        )
    origin = rows[0]["provenance"]
    versions = ", ".join(f"{k} {origin['versions'][k]}" for k in ("torch", "bitsandbytes", "brise"))
    lines.append("- The files were in the page cache. Seconds include the start of the process.")
    lines.append("- Memory was looked at every 20 ms.")
    lines += [f"- {origin['device']}, {origin['threads']} threads; {versions}; {origin['time']}.", ""]
    return "\n".join(lines)
