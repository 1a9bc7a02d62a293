"""What a quantization will take, before it runs: every byte on disk, the peak of the job, the KV cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.job_plan import Step, plan_steps, plan_tensors
from ..model.skeleton import check_depth, check_tensors, empty_model
from ..model.source import Source
from ..model.walk import STAGES
from ..quant.apply import Target, find_targets, resolve
from ..quant.calibrate import MIRROR, ROWS
from ..quant.config import ConfigError, QuantConfig, QuantSpec
from .memory import Ledger, kv_cache_bytes, ledger_of_tensors

_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}
# of a process that has imported torch and transformers, and of its threads' pieces of work
_BASE = 420 << 20


@dataclass(frozen=True)
class Plan:
    """What is known before a job runs.

    Attributes:
        ledger: every tensor that will be on disk, to the byte.
        peak: about the most memory of its own that the job will hold, pages of mapped files left out.
        scratch: bytes on disk beside the checkpoint while the job runs.
        kv_cache: bytes at each length that was asked for.
        specs: of every module that is quantized.
    """

    ledger: Ledger
    peak: int
    scratch: int
    kv_cache: dict[int, int]
    specs: dict[str, QuantSpec]

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.ledger.to_dict(),
            "peak": self.peak,
            "scratch": self.scratch,
            "kv_cache": {str(length): nbytes for length, nbytes in self.kv_cache.items()},
        }


@dataclass(frozen=True)
class Layout:
    """A source's modules and steps, for any number of plans."""

    source: Source
    config: Any
    targets: dict[str, Target]
    steps: list[Step]

    @classmethod
    def of(cls, source: Source) -> Layout:
        """Raises CheckpointError where the tensors are not those of the config, ConfigError for a quantized source."""
        if "quantization_config" in source.config:
            raise ConfigError(
                f"{source.folder} is quantized already: give the checkpoint that it was made from"
            )
        check_depth(source)
        model = empty_model(source.config, str(source.folder / "config.json"))
        targets = {target.path: target for target in find_targets(model)}
        check_tensors(
            source, model, None, {t.path: t.tied_to for t in targets.values() if t.tied_to is not None}
        )
        return cls(source, model.config, targets, plan_steps(source, model, targets))

    @property
    def parameters(self) -> int:
        """Weights of the model, a tied one counted once."""
        names = [name for step in self.steps for name in step.names]
        return sum(torch.Size(self.source.info(name)[1]).numel() for name in names)

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor that is copied."""
        dtype, shape = self.source.info(name)
        return torch.Size(shape).numel() * dtype.itemsize

    def ledger(self, config: QuantConfig) -> Ledger:
        """Every tensor on disk under a config; ConfigError where its rules do not fit the model."""
        resolved = resolve(config, self.targets.values())
        specs = {path: spec for path, (spec, _) in resolved.items()}
        # without an entry there is no guard: it has no bytes, and no ledger shows it
        planned = plan_tensors(self.steps, self.source, self.targets, specs, {})
        own = [t for t in self.targets.values() if t.tied_to is None and specs[t.path] is not None]
        return ledger_of_tensors(
            ((t.name, t.dtype, t.shape) for t in planned),
            self.parameters,
            sum(t.shape[0] * t.shape[1] for t in own),
        )

    def plan(self, config: QuantConfig, lengths: Sequence[int], memory: str = "memory") -> Plan:
        """Everything about a config; ``memory`` is where calibration activations are kept."""
        resolved = resolve(config, self.targets.values())
        specs = {path: spec for path, (spec, _) in resolved.items() if spec is not None}
        kept = activation_bytes(self, config, memory="memory") if config.needs_calibration else 0
        return Plan(
            self.ledger(config),
            peak_bytes(self, config, specs, memory),
            2 * kept if memory == "file" else 0,
            {length: kv_cache_bytes(self.config, length) for length in lengths},
            specs,
        )


def parse_size(text: str, parameters: int) -> int:
    """Bytes of ``3.5GiB``, ``900MB``, or ``3.25bits`` (a weight, of ``parameters``).

    Raises:
        ValueError: it is none of them.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match and match[2] in _UNITS:
        return int(float(match[1]) * _UNITS[match[2]])
    if match and match[2] == "bits":
        return int(float(match[1]) * parameters / 8)
    raise ValueError(f"expected a size such as 3.5GiB, 900MB or 3.25bits (a weight), got {text!r}")


def activation_bytes(layout: Layout, config: QuantConfig, memory: str) -> int:
    """Bytes in memory of the hidden states of all calibration windows."""
    if memory == "file":
        return 0
    streams = 2 if config.calibration.target == "full" else 1
    tokens = config.calibration.windows * config.calibration.length
    return 4 * streams * tokens * int(layout.config.hidden_size)


def peak_bytes(layout: Layout, config: QuantConfig, specs: dict[str, QuantSpec], memory: str) -> int:
    """About the most memory of its own that a job holds: the sum of what lives at once at its widest place."""
    stored = [e.nbytes for e in layout.ledger(config).entries]
    # two steps' codes: one is written while the next is computed
    largest = max(stored)
    rounding = _BASE + 3 * largest + max((4 * s[0] for s in _shapes(layout)), default=0)
    if not config.needs_calibration:
        return rounding
    c = layout.config
    tokens = config.calibration.windows * config.calibration.length
    streams = 2 if config.calibration.target == "full" else 1
    kept = 0 if memory == "file" else 4 * tokens * max(c.intermediate_size, c.hidden_size)
    constant = _BASE + activation_bytes(layout, config, memory) + 2 * largest
    worst = 0
    for number, most in enumerate(stage_bytes(layout, streams)):
        worst = max(worst, (kept if number in (1, 3) else 0) + most)
    return max(rounding, constant + worst)


def stage_bytes(layout: Layout, streams: int) -> list[int]:
    """Of each of a block's stages the most that its weights and Hessians take while it is gathered and solved.

    Args:
        streams: 2 where the unquantized model's activations go along.
    """
    block = layout.steps[1].name
    shapes = [[layout.targets[f"{block}.{name}"].shape for name in names] for names in STAGES]
    out = []
    for number, members in enumerate(shapes):
        rows, width = sum(n for n, _ in members), members[0][1]
        square, weights = 4 * width * width, 4 * rows * width
        before = sum(4 * n * k for n, k in shapes[number - 1]) if number in (1, 3) else 0
        gather = streams * (square + before) + weights
        # the weights in one matrix, or what is to be quantized in their place
        stacked = weights if streams == 2 or len(members) > 1 else 0
        # the factor in fp64 and what it becomes in fp32
        factor = square + 3 * square + weights + stacked
        # the weights by columns, their codes as numbers, and the same as bytes
        solve = 2 * square + weights + stacked + 3 * weights + rows * width
        matched = 0
        if streams == 2:
            # in fp64: the products, and of what they are made so many rows at once; then the Hessian in their place
            parts = 8 * width * (min(rows, ROWS) + min(width, MIRROR))
            first = 2 * square + weights + (stacked if len(members) > 1 else 0) + 2 * weights + parts
            matched = max(first, 3 * square + 3 * weights)
        out.append(max(gather, matched, factor, solve))
    return out


def _shapes(layout: Layout) -> list[tuple[int, int]]:
    return [target.shape for target in layout.targets.values()]
