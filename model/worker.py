"""Which steps compute a config: plainly, from kept Hessians, or with the calibration windows going along."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..quant.apply import Target
from ..quant.config import QuantConfig
from .calibrated import CalibratedSteps
from .group import Group
from .hessian_store import StoredSteps
from .plain import PlainSteps, Resolved
from .source import Source
from .trouble import Policy


def worker_of(
    source: Source,
    model: nn.Module,
    targets: Mapping[str, Target],
    resolved: Resolved,
    policy: Policy,
    device: torch.device,
    group: Group,
    config: QuantConfig,
    ids: Tensor | None,
    memory: str,
    hessians: Path | None,
) -> PlainSteps:
    """See :func:`.stream.quantize_checkpoint`; ``ids`` int64 [windows, length] is None where nothing is calibrated."""
    if ids is None:
        return PlainSteps(source, targets, resolved, policy, device)
    if config.calibration.hessians == "once":
        return StoredSteps(source, targets, resolved, policy, device, ids, hessians)
    return CalibratedSteps(
        source, model, targets, resolved, policy, device, group, config.calibration, ids, memory
    )
