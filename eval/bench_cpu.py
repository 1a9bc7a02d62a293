"""Our NF4 and our layers beside bitsandbytes' on the CPU, in one run, and what GPTQ of a model takes.

Both sides take turns, so that what else the machine does falls on both alike; each turn gives a ratio of its
own, and the median of those says who is faster. Each figure of memory comes from a fresh process: in a used
one, what was freed before could be taken again unseen.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.config import QuantConfig, QuantSpec
from ..quant.rtn import rtn
from . import bench_linear
from .memory import human_bytes, process_peak, reset_peak
from .provenance import collect
from .timing import BenchError, Spread, bitsandbytes_module, in_child, take_turns, version_of

Progress = Callable[[str, int, int], None]
DTYPES = ("float32", "bfloat16")
OPERATIONS = ("quantize", "dequantize")
ROWS, TABLE = "cpu.jsonl", "cpu.md"
# as published, and the preset
GPTQ_CONFIGS = ("classic-gptq-int4-g64", "gptq-int4-g64")
_SPEC = QuantSpec(format="nf4")


@dataclass(frozen=True)
class GptqJob:
    """GPTQ of the checkpoint ``source`` under ``config`` (a preset or a file), on calibration windows."""

    source: str
    config: str
    windows: int = 64
    length: int = 1024


def run_bench(
    size: int = 4096,
    repeats: int = 15,
    gptq: Sequence[GptqJob] = (),
    *,
    command: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Time NF4 of a [size, size] weight with both libraries, and layers of that size with 1, 16 and 512 tokens, in
    fp32 and bf16; and the GPTQ of each job given.

    Args:
        repeats: timed turns of each side, after two that are not timed.
        progress: called with (stage, done, total).

    Returns:
        A dict a measurement, JSON-ready: times in seconds, ratios ours / bitsandbytes, memory in bytes.

    Raises:
        ImportError: bitsandbytes is not installed.
        BenchError: the two give different weights.
    """
    say = progress or (lambda *_: None)
    origin = dataclasses.asdict(collect(torch.device("cpu"), 0, command))
    origin["versions"]["bitsandbytes"] = version_of("bitsandbytes")
    rows: list[dict[str, Any]] = []
    total = len(DTYPES) * len(OPERATIONS)
    for dtype in DTYPES:
        weight = make_weight(size, getattr(torch, dtype))
        check_equal(weight)
        for operation in OPERATIONS:
            say("NF4", len(rows), total)
            ours, theirs = take_turns(calls(weight, operation), repeats)
            rows.append(
                {
                    "bench": f"nf4-{operation}",
                    "dtype": dtype,
                    "shape": [size, size],
                    "repeats": repeats,
                    "ours": dataclasses.asdict(Spread.of(ours)),
                    "bitsandbytes": dataclasses.asdict(Spread.of(theirs)),
                    "ratio": dataclasses.asdict(
                        Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])
                    ),
                    "ours_peak": in_child(_peak_of, "ours", operation, size, dtype),
                    "bitsandbytes_peak": in_child(_peak_of, "bitsandbytes", operation, size, dtype),
                    "provenance": origin,
                }
            )
    say("NF4", total, total)
    layers = bench_linear.linear_rows(size, repeats, progress=progress)
    rows += [{**row, "provenance": origin} for row in layers]
    for i, job in enumerate(gptq):
        say("GPTQ", i, len(gptq))
        rows.append({"bench": "gptq", **run_gptq(job), "provenance": origin})
    return rows


@dataclass(frozen=True)
class Side:
    """One library: how it quantizes a weight [N, K] to NF4, and how it gives the weight back."""

    quantize: Callable[[Tensor], Any]
    dequantize: Callable[[Any, torch.dtype], Tensor]


SIDES = {
    "ours": Side(lambda w: rtn(w, _SPEC), lambda q, dtype: q.dequantize(dtype)),
    "bitsandbytes": Side(lambda w: _their_quantize(w), lambda q, dtype: _their_dequantize(q)),
}


def make_weight(size: int, dtype: torch.dtype) -> Tensor:
    """[size, size], with the spread of a trained layer; no time depends on it."""
    return (torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def calls(
    weight: Tensor, operation: str, sides: tuple[str, ...] = tuple(SIDES)
) -> dict[str, Callable[[], Any]]:
    """What is timed, by side: its input is made, and nothing else has been done."""
    out: dict[str, Callable[[], Any]] = {}
    for name in sides:
        side = SIDES[name]
        if operation == "quantize":
            out[name] = functools.partial(side.quantize, weight)
        else:
            out[name] = functools.partial(side.dequantize, side.quantize(weight), weight.dtype)
    return out


def check_equal(weight: Tensor) -> None:
    """Raise BenchError unless both sides make the same weight of ``weight``, bit for bit."""
    mine, other = (call() for call in calls(weight, "dequantize").values())
    if not torch.equal(mine, other):
        wrong = int((mine != other).sum())
        raise BenchError(
            f"{wrong} of {mine.numel()} weights differ between ours and bitsandbytes in {weight.dtype}"
        )


def _their_quantize(weight: Tensor) -> tuple[Tensor, Any]:
    functional = bitsandbytes_module().functional
    packed, state = functional.quantize_4bit(weight, blocksize=_SPEC.group_size, quant_type="nf4")
    return packed, state


def _their_dequantize(quantized: tuple[Tensor, Any]) -> Tensor:
    weight: Tensor = bitsandbytes_module().functional.dequantize_4bit(*quantized)
    return weight


def _peak_of(side: str, operation: str, size: int, dtype: str) -> int | None:
    """The bytes that the first call needs beyond what the process held before, its result included."""
    # what a library loads on its first call is not the call's
    for each in OPERATIONS:
        calls(make_weight(64, torch.float32), each, (side,))[side]()
    call = calls(make_weight(size, getattr(torch, dtype)), operation, (side,))[side]
    _give_back_freed()
    if not reset_peak():
        return None
    before = process_peak()
    result = call()
    after = process_peak()
    del result
    return None if before is None or after is None else after - before


def _give_back_freed() -> None:
    """Return freed memory to the system, or the call could take it again without a peak (glibc only)."""
    with contextlib.suppress(AttributeError):  # another C library, which has no such function
        ctypes.CDLL(None).malloc_trim(0)


def run_gptq(job: GptqJob) -> dict[str, Any]:
    """Seconds of quantizing the checkpoint, and the peak memory of the process that does nothing else."""
    from ..model.checkpoint import load_tokenizer, resolve_source
    from .data import calibration_ids, load_text
    from .model_info import model_info

    folder = resolve_source(job.source)
    config = QuantConfig.load(job.config)
    text = load_text(config.calibration.text, "calibration")
    # tokenized here: the tokenizer's and the text's memory is not GPTQ's
    ids = calibration_ids(text, load_tokenizer(folder), windows=job.windows, length=job.length)
    seconds, peak = in_child(_quantize, folder, job.config, ids.tolist())
    return {
        "model": model_info(folder, job.source).name,
        "config": Path(job.config).name,
        "windows": job.windows,
        "length": job.length,
        "text": text.name,
        "seconds": seconds,
        "process_peak": peak,
    }


def _quantize(folder: Path, config: str, ids: list[list[int]]) -> tuple[float, int | None]:
    from ..model.stream import quantize_checkpoint

    with tempfile.TemporaryDirectory() as out:
        begin = time.perf_counter()
        quantize_checkpoint(
            folder, Path(out) / "quantized", QuantConfig.load(config), calibration=torch.tensor(ids)
        )
        return time.perf_counter() - begin, process_peak()


def write_bench(folder: str | Path, rows: list[dict[str, Any]]) -> tuple[Path, Path]:
    """Write one run to ``cpu.jsonl`` and ``cpu.md`` in ``folder``, in place of an older one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ROWS).write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    (folder / TABLE).write_text(markdown(rows))
    return folder / ROWS, folder / TABLE


def markdown(rows: list[dict[str, Any]]) -> str:
    """The run as a Markdown table; times are medians with the 20th and 80th percentile."""
    nf4 = [row for row in rows if row["bench"].startswith("nf4-")]
    layers = [row for row in rows if row["bench"] == bench_linear.BENCH]
    shape = " × ".join(map(str, nf4[0]["shape"]))
    lines = [
        f"### NF4 on the CPU, weight {shape}: ours and bitsandbytes, taking turns",
        "",
        "| operation | dtype | ours, ms | bitsandbytes, ms | time ours / theirs | peak ours | peak theirs |",
        "|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for row in nf4:
        cells = [
            row["bench"].removeprefix("nf4-"),
            row["dtype"],
            Spread(**row["ours"]).text(1e3),
            Spread(**row["bitsandbytes"]).text(1e3),
            Spread(**row["ratio"]).text(1, 2),
            _memory(row["ours_peak"]),
            _memory(row["bitsandbytes_peak"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"- Median (20th to 80th percentile) of {nf4[0]['repeats']} turns; the ratio is taken turn by turn.",
        "- Both gave the same weights to the bit before anything was timed.",
        "- Peak: memory beyond what the process held before the call, the result included.",
        "",
        *bench_linear.linear_table(layers),
        "",
    ]
    for row in rows:
        if row["bench"] == "gptq":
            lines.append(
                f"- GPTQ ({row['config']}) of {row['model']}, {row['windows']} windows of {row['length']} "
                f"tokens of {row['text']}: {row['seconds']:.0f} s, peak {_memory(row['process_peak'])}."
            )
    origin = rows[0]["provenance"]
    shown = ("torch", "bitsandbytes", "brise", "native")
    versions = ", ".join(f"{k} {origin['versions'].get(k, 'none')}" for k in shown)
    lines += [f"- {origin['device']}, {origin['threads']} threads; {versions}; {origin['time']}.", ""]
    return "\n".join(lines)


def _memory(nbytes: int | None) -> str:
    return "–" if nbytes is None else human_bytes(nbytes)
