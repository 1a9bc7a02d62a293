"""Weights quantized under the Hessian of their common input, and what becomes of those that are in trouble."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..quant.apply import Outcome, measure, quantize_weight
from ..quant.calibrate import HessianAccumulator, HessianError, matched_products, matched_weight
from ..quant.config import QuantSpec
from ..quant.gptq import dead_channels
from ..quant.tensor import QuantizedTensor
from .group import Group
from .trouble import Policy, in_words, look_at, plain

Specs = Mapping[str, tuple[QuantSpec | None, str]]


@dataclass(frozen=True)
class Quantized:
    """A module's new weight (None where it was kept after all), and what is reported of it."""

    tensor: QuantizedTensor | None
    outcome: Outcome


@dataclass(frozen=True)
class Setting:
    """What is the same for every block of a job."""

    specs: Specs
    policy: Policy
    group: Group
    true_sequential: bool = True


def reduce(accumulator: HessianAccumulator, group: Group) -> None:
    """Add up what every process gathered on its windows."""
    for tensor in accumulator.parts():
        group.all_reduce(tensor)


def quantize_under(
    paths: list[str],
    weights: list[Tensor],
    setting: Setting,
    accumulator: HessianAccumulator | None,
    last: bool = True,
) -> list[Quantized]:
    """Quantize weights [N_i, K] under the Hessian of their common input, or plainly where there is none.

    Args:
        last: the accumulator's cross term is not needed any more.

    Raises:
        TroubleError: something is wrong with a weight or the Hessian, and the policy is to fail.
    """
    found: dict[str, Quantized] = {}
    for path, weight in zip(paths, weights, strict=True):
        if (kind := look_at(weight)) and setting.policy.decide(path, kind, in_words(kind, weight)) == "keep":
            found[path] = kept(path, weight, in_words(kind, weight))
    left = {p: w for p, w in zip(paths, weights, strict=True) if p not in found}
    if left:
        found |= _solve(left, setting, accumulator, last)
    return [found[path] for path in paths]


def _solve(
    weights: dict[str, Tensor], setting: Setting, accumulator: HessianAccumulator | None, last: bool
) -> dict[str, Quantized]:
    paths = list(weights)
    together = " + ".join(paths)
    spec, hessian, trouble = spec_of(setting.specs, paths[0]), None, None
    if accumulator is not None:
        hessian = accumulator.hessian
        if dead := int(dead_channels(hessian).sum()):
            trouble = (
                f"{dead} of {hessian.shape[0]} input channels are dead: the calibration never excites them"
            )
            if setting.policy.decide(together, "dead", trouble) == "keep":
                return {path: kept(path, w, trouble) for path, w in weights.items()}
    try:
        tensor = _quantize_stacked(together, list(weights.values()), spec, hessian, accumulator, last)
    except HessianError as error:
        trouble = str(error).removeprefix(f"{together}: ")
        if setting.policy.decide(together, "hessian", trouble) == "keep":
            return {path: kept(path, w, trouble) for path, w in weights.items()}
        spec, hessian = plain(spec), None
        tensor = _quantize_stacked(together, list(weights.values()), spec, None, None, last)
    parts = [tensor] if len(paths) == 1 else tensor.split([w.shape[0] for w in weights.values()])
    out = {}
    for (path, weight), part in zip(weights.items(), parts, strict=True):
        outcome = measure(path, weight, part, setting.specs[path][1], hessian)
        zero = "all its weights are zero" if look_at(weight) == "zero" else None
        out[path] = Quantized(part, replace(outcome, trouble=trouble or zero))
    return out


def _quantize_stacked(
    path: str,
    weights: list[Tensor],
    spec: QuantSpec,
    hessian: Tensor | None,
    accumulator: HessianAccumulator | None,
    last: bool,
) -> QuantizedTensor:
    stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
    if accumulator is not None and hessian is not None and accumulator.cross is not None:
        damp = getattr(spec.options, "damp", 0.01)
        stacked = matched_products(stacked, hessian, accumulator.cross, damp)
        if last:
            accumulator.drop_cross()
        stacked = matched_weight(stacked, hessian, damp)
    return quantize_weight(path, stacked, spec, hessian)


def kept(path: str, weight: Tensor, trouble: str) -> Quantized:
    """A module that was to be quantized and is not."""
    shape = (weight.shape[0], weight.shape[1])
    return Quantized(None, Outcome(path, shape, None, f"kept: {trouble}", trouble=trouble))


def spec_of(specs: Specs, path: str) -> QuantSpec:
    spec = specs[path][0]
    assert spec is not None
    return spec
