"""What an export will do to every weight, known before anything is written."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from ...quant.config import QuantSpec
from ...quant.formats import FORMATS
from ...quant.integer import IntegerFormat
from ...quant.interop.restate import Unfit, check_restate
from ...quant.tensor import QuantizedTensor, Shape
from ..reader import CheckpointReader
from .formats import Admitting, ForeignFormat, Target
from .reader import quantized, specs_of


class Verdict(StrEnum):
    """What becomes of one weight."""

    EXACT = "exact"  # the same codes, the same scales
    ROUNDED = "scales rounded"  # the same codes, scales in another dtype
    DECODED = "decoded"  # an embedding or head, which the format cannot hold, in the model's dtype
    REQUANTIZED = "re-quantized"  # new codes: the grid is another one


@dataclass(frozen=True)
class Step:
    """One weight of an export. ``target`` is its spec in the new format; ``rounding`` the largest relative change
    of a scale (or of a weight, where it is decoded); ``why`` says what stands in the way of more."""

    path: str
    shape: Shape
    verdict: Verdict
    spec: QuantSpec | None
    target: QuantSpec | None
    rounding: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """All of an export: one step a weight that is quantized before or after it.

    ``notes`` say what the format holds and the tools that it is for leave out, as clauses.
    """

    format: str
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    @property
    def lossless(self) -> bool:
        """Whether the new folder holds the same function, bit for bit in float32."""
        return all(
            s.verdict == Verdict.EXACT or (s.verdict == Verdict.DECODED and not s.rounding)
            for s in self.steps
        )

    @property
    def rounding(self) -> float:
        """The largest relative change of a scale."""
        return max((s.rounding for s in self.steps if s.verdict == Verdict.ROUNDED), default=0.0)

    def of(self, verdict: Verdict) -> list[Step]:
        return [step for step in self.steps if step.verdict == verdict]

    def describe(self) -> str:
        """In one sentence: lossless, rounded and by how much, or what has to be quantized again and why; the notes."""
        return "; ".join([self._verdict(), *self.notes])

    def _verdict(self) -> str:
        if again := self.of(Verdict.REQUANTIZED):
            why = Counter(step.why for step in again).most_common(1)[0][0]
            return (
                f"to {self.format}: {len(again)} of {len(self.steps)} weights need re-quantization, the first "
                f"{again[0].path}: {why}"
            )
        kept = "" if not self.of(Verdict.DECODED) else f", {len(self.of(Verdict.DECODED))} of them decoded"
        if self.lossless:
            return f"to {self.format}: lossless, {len(self.steps)} weights{kept}"
        parts = []
        if self.rounding:
            parts.append(f"scales are rounded by up to {self.rounding:.2e} of themselves")
        decoded = max((s.rounding for s in self.of(Verdict.DECODED)), default=0.0)
        if decoded:
            parts.append(f"decoded weights are rounded by up to {decoded:.2e}")
        return f"to {self.format}: codes are kept, {' and '.join(parts)} ({len(self.steps)} weights{kept})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "lossless": self.lossless,
            "scale_rounding": self.rounding,
            "verdicts": dict(Counter(step.verdict.value for step in self.steps)),
            "summary": self.describe(),
        }


def in_block(path: str) -> bool:
    """Whether a module belongs to a decoder block: some part of its path is a number."""
    return any(part.isdigit() for part in path.split("."))


def make_plan(reader: CheckpointReader, format: ForeignFormat, dtype: str) -> Plan:
    """Look at every weight's spec, scales and zero points, and say what the format makes of it.

    Args:
        dtype: of the model, by torch's name.
    """
    writer = format.weight(dtype)
    specs = {path: spec for path, spec in specs_of(reader).items() if f"{path}.qweight" in reader.names}
    steps = [_step(reader, format, writer, path, spec, dtype) for path, spec in specs.items()]
    decoded: list[str] = getattr(reader, "decoded", [])
    for path in _dense(reader, decoded if specs or decoded else None, format):
        rows, width = reader.info(f"{path}.weight")[1]
        if format.decodes:
            stored = str(reader.info(f"{path}.weight")[0]).removeprefix("torch.")
            rounding = 0.0 if stored == "float16" else half_step("float16")
            steps.append(Step(path, (rows, width), Verdict.DECODED, None, None, rounding))
            continue
        why = "its blocks have no spec here" if path in decoded else "it is not quantized"
        steps.append(Step(path, (rows, width), Verdict.REQUANTIZED, None, None, 0.0, why))
    fresh = format.fresh_for({s.shape[1] for s in steps if s.verdict == Verdict.REQUANTIZED})
    steps = [dataclasses.replace(s, target=fresh) if s.verdict == Verdict.REQUANTIZED else s for s in steps]
    return Plan(format.name, tuple(steps), tuple(_notes(reader.config, format, steps)))


def _notes(config: Mapping[str, Any], format: ForeignFormat, steps: list[Step]) -> Iterator[str]:
    window, length = config.get("sliding_window"), config.get("max_position_embeddings") or math.inf
    if format.is_gguf and window is not None and window < length:
        yield (
            f"the file says its window of {window}, but llama.cpp attends to everything in llama-type models: "
            f"beyond {window} positions it gives other results than this model"
        )
    if format.name == "compressed-tensors" and any(s.target and not s.target.symmetric for s in steps):
        yield (
            "transformers loads zero points with compressed-tensors up to 0.17; with 0.18 to 0.20 it refuses "
            "them, those that compressed-tensors packs too"
        )


def _step(
    reader: CheckpointReader,
    format: ForeignFormat,
    writer: Target,
    path: str,
    spec: QuantSpec,
    dtype: str,
) -> Step:
    q = quantized(reader, path, spec)
    if format.decodes or (format.kind is None and not in_block(path)):
        rounding = half_step("float16" if format.decodes else dtype)
        why = "" if format.decodes else f"{format.title} holds no quantized embedding or head"
        return Step(path, q.shape, Verdict.DECODED, spec, None, rounding, why)
    try:
        target = writer.target(symmetric_if_it_is(q), q.shape)
        how = check_restate(q, target)
        rounding = how.rounding
        if isinstance(writer, Admitting):
            rounding = max(rounding, writer.admit(how.params))
    except Unfit as error:
        return Step(path, q.shape, Verdict.REQUANTIZED, spec, None, 0.0, str(error))
    verdict = Verdict.ROUNDED if rounding else Verdict.EXACT
    return Step(path, q.shape, verdict, spec, target, rounding)


def symmetric_if_it_is(q: QuantizedTensor) -> QuantSpec:
    """The spec of ``q``, symmetric where all of its zero points are the middle code, as those of AWQ often are."""
    zero, fmt = q.params().zero, FORMATS[q.spec.format]
    if zero is None or not isinstance(fmt, IntegerFormat) or not bool((zero == fmt.middle).all()):
        return q.spec
    return dataclasses.replace(q.spec, symmetric=True)


def half_step(dtype: str) -> float:
    """The largest relative change that rounding an fp32 number to a dtype makes, away from its ends."""
    return 0.0 if dtype == "float32" else torch.finfo(getattr(torch, dtype)).eps / 2


def _dense(reader: CheckpointReader, only: list[str] | None, format: ForeignFormat) -> list[str]:
    """The matrices whose weights are not quantized and that the plan is about.

    For a file without quantized weights that is all of them. Else the Linears of the blocks; of a source that is
    quantized in part, only those that were decoded while it was read.
    """
    if only is not None and not format.decodes:
        return [path for path in only if in_block(path)]
    return [
        name.removesuffix(".weight")
        for name in reader.names
        if name.endswith(".weight") and (format.decodes or in_block(name)) and len(reader.info(name)[1]) == 2
    ]
