"""Steps without calibration: each weight rounded from its rows, straight from the source."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.apply import Outcome, Target, measure, quantize_weight
from ..quant.config import QuantSpec
from ..quant.rows import Pieces, round_rows
from ..quant.scales import NonFiniteError
from ..quant.tensor import QuantizedTensor
from .device_copy import pieces_on
from .job_plan import Step
from .shards import ShardFiles
from .solve import Quantized, kept
from .source import Source, whole
from .trouble import Policy, in_words, look_at

Resolved = Mapping[str, tuple[QuantSpec | None, str]]


@dataclass
class StepResult:
    """What a step came to: the quantized tensors by name, to be written, and what is reported."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    # paths of the modules that did not become what the rules say
    changes: list[str] = field(default_factory=list)

    def add(self, path: str, result: Quantized, planned: QuantSpec | None) -> None:
        self.outcomes.append(result.outcome)
        if result.outcome.spec != planned:
            self.changes.append(path)
        if result.tensor is not None:
            self.tensors |= {f"{path}.{name}": tensor.cpu() for name, tensor in result.tensor.tensors.items()}

    def record(self, step: int) -> dict[str, Any]:
        """The step's line in the journal."""
        checksum = 0
        for name in sorted(self.tensors):
            flat = self.tensors[name].contiguous().reshape(-1).view(torch.uint8)
            checksum = zlib.crc32(flat.numpy().data, checksum)
        return {
            "step": step,
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
            "changes": self.changes,
            "crc32": checksum,
        }


class PlainSteps:
    """Computes steps of which none needs the one before it, so that processes can share them out."""

    shared_out = True

    def __init__(
        self,
        source: Source,
        targets: Mapping[str, Target],
        resolved: Resolved,
        policy: Policy,
        device: torch.device,
    ) -> None:
        self.source = source
        self.targets = targets
        self.resolved = resolved
        self.policy = policy
        self.device = device

    def resume(self, folder: Path, shards: ShardFiles, done: list[Step]) -> None:
        """Nothing is carried from step to step."""

    def compute(self, step: Step, index: int) -> StepResult:
        result = StepResult()
        paths = [path for path in step.targets if self.resolved[path][0] is not None]
        with pieces_on(self.device) as workers:
            for number, path in enumerate(paths):
                for later in paths[number : number + 2]:
                    self.source.prefetch(f"{later}.weight")
                result.add(path, self.round(path, workers), self.resolved[path][0])
        return result

    def sync(self, index: int) -> None:
        """Nothing to wait for."""

    def on_record(self, index: int) -> None:
        """Nothing to forget."""

    def round(self, path: str, workers: Pieces) -> Quantized:
        """One weight, by its spec; its tensors are whole when the work of ``workers`` is over.

        Raises:
            TroubleError: something is wrong with it, and the policy is to fail.
        """
        spec, reason = self.resolved[path]
        assert spec is not None
        name, shape = f"{path}.weight", self.targets[path].shape
        if spec.algorithm != "rtn":
            return self._whole(path, whole(self.source, name).to(torch.float32), spec, reason)
        try:
            rounded = round_rows(lambda a, b: self.source.rows(name, a, b), shape, spec, workers)
        except NonFiniteError:
            return self._whole(path, whole(self.source, name).to(torch.float32), spec, reason)
        if not rounded.norm and self.policy.decide(path, "zero", "all its weights are zero") == "keep":
            return kept(path, torch.empty(shape, device="meta"), "all its weights are zero")
        outcome = Outcome(
            path,
            shape,
            spec,
            reason,
            rounded.tensor.nbytes,
            rounded.error / rounded.norm if rounded.norm else 0.0,
            trouble=None if rounded.norm else "all its weights are zero",
        )
        return Quantized(rounded.tensor, outcome)

    def _whole(self, path: str, weight: Tensor, spec: QuantSpec, reason: str) -> Quantized:
        """For algorithms that want all of a weight at once, and to see what is wrong with one."""
        kind = look_at(weight)
        if kind and self.policy.decide(path, kind, in_words(kind, weight)) == "keep":
            return kept(path, weight, in_words(kind, weight))
        q: QuantizedTensor = quantize_weight(path, weight, spec)
        outcome = measure(path, weight, q, reason)
        return Quantized(q, dataclasses.replace(outcome, trouble=in_words(kind, weight) if kind else None))
