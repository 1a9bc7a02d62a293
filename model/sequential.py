"""One decoder block quantized under calibration: Hessian, quantize, carry on, a group of Linears at a time.

Each block runs once over the calibration windows. The input of q, k and v is there before they run; o, gate-up and
down then see what the already quantized Linears before them give (GPTQ's "true sequential" order). Linears that
share an input share a Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..quant.apply import Outcome, measure, quantize_weight
from ..quant.calibrate import HessianAccumulator, matched_weight
from ..quant.config import Calibration, QuantSpec
from ..quant.tensor import QuantizedTensor
from .blocks import MistralDecoderLayer
from .walk import STAGES, BlockWalk, WalkContext

Specs = Mapping[str, tuple[QuantSpec | None, str]]


@dataclass
class Activations:
    """Hidden states of all calibration windows in front of a block: [windows, T, D] fp32.

    Attributes:
        hidden: as the already quantized blocks give them.
        full: as the unquantized model gives them; only where the calibration's target is ``full``.
    """

    hidden: Tensor
    full: Tensor | None = None


@dataclass(frozen=True)
class Quantized:
    """A module's new weight, and what is reported of it."""

    tensor: QuantizedTensor
    outcome: Outcome


@torch.no_grad()
def quantize_block(
    layer: MistralDecoderLayer,
    specs: Specs,
    activations: Activations,
    context: WalkContext,
    calibration: Calibration,
    prefix: str,
) -> dict[str, Quantized]:
    """Quantize one block under its calibration inputs, and move ``activations`` behind it, in place.

    The layer's quantized Linears are left holding the decoded weights.

    Args:
        specs: path -> (spec or None, reason), paths from the model's root. prefix: the block's path.
    """
    if not calibration.true_sequential:
        return _quantize_at_once(layer, specs, activations, context, prefix)
    done: dict[str, Quantized] = {}
    streams = [_Stream(layer, context, activations.hidden)]
    if activations.full is not None:
        streams.append(_Stream(_frozen_copy(layer), context, activations.full, frozen=True))
    for stage in range(len(STAGES)):
        done |= _quantize_stage(layer, stage, specs, streams, prefix)
        for stream in streams:
            stream.finish(stage)
    return done


class _Stream:
    """Calibration windows on their way through a block: the inputs of each stage, and the residual they join.

    Args:
        frozen: the block's weights stay as they are (the unquantized twin), so that what o and down give joins the
            residual at once; otherwise their inputs are kept until :meth:`finish`, when they have been quantized.
    """

    def __init__(
        self, layer: MistralDecoderLayer, context: WalkContext, hidden: Tensor, frozen: bool = False
    ) -> None:
        self.walk = BlockWalk(layer, context)
        self.hidden = hidden
        self.frozen = frozen
        self._kept: Tensor | None = None
        self._ran = False

    def inputs(self, stage: int) -> Iterator[Tensor]:
        """The stage's input [1, T, K], window by window."""
        self._ran = True
        for i in range(self.hidden.shape[0]):
            x = self._input(stage, self.hidden[i : i + 1])
            if stage in (1, 3):
                if self.frozen:
                    self._join(stage, i, x)
                else:
                    self._keep(i, x)
            yield x

    def finish(self, stage: int) -> None:
        """With the stage's Linears as they now are, add what o or down gives to the residual, in place."""
        if stage in (1, 3):
            if not self._ran:
                for _ in self.inputs(stage):
                    pass
            if self._kept is not None:
                for i in range(self.hidden.shape[0]):
                    self._join(stage, i, self._kept[i : i + 1])
        self._kept, self._ran = None, False

    def _input(self, stage: int, hidden: Tensor) -> Tensor:
        walk = self.walk
        if stage == 0:
            return walk.attention_input(hidden)
        if stage == 1:
            return walk.attend(walk.attention_input(hidden))
        if stage == 2:
            return walk.mlp_input(hidden)
        return walk.mlp_hidden(walk.mlp_input(hidden))

    def _join(self, stage: int, i: int, x: Tensor) -> None:
        join = self.walk.after_attention if stage == 1 else self.walk.after_mlp
        self.hidden[i : i + 1] = join(self.hidden[i : i + 1], x)

    def _keep(self, i: int, x: Tensor) -> None:
        if self._kept is None:
            self._kept = x.new_empty((self.hidden.shape[0], *x.shape[1:]))
        self._kept[i] = x[0]


def _quantize_stage(
    layer: nn.Module, stage: int, specs: Specs, streams: list[_Stream], prefix: str
) -> dict[str, Quantized]:
    names = [name for name in STAGES[stage] if specs[f"{prefix}.{name}"][0] is not None]
    if not names:
        return {}
    accumulator = None
    if any(spec.needs_hessian for name in names if (spec := specs[f"{prefix}.{name}"][0])):
        accumulator = HessianAccumulator(layer.get_submodule(names[0]).in_features, cross=len(streams) == 2)  # type: ignore[arg-type]
        for inputs in zip(*(stream.inputs(stage) for stream in streams), strict=True):
            accumulator.add(*inputs)
    return _quantize_linears(layer, names, prefix, specs, accumulator)


def _quantize_linears(
    layer: nn.Module, names: list[str], prefix: str, specs: Specs, accumulator: HessianAccumulator | None
) -> dict[str, Quantized]:
    """Linears that share an input; those that also share a spec are solved as one matrix, row under row."""
    done: dict[str, Quantized] = {}
    for together in _batches(names, prefix, specs):
        paths = [f"{prefix}.{name}" for name in together]
        weights: list[Tensor] = [layer.get_submodule(name).weight.data for name in together]  # type: ignore
        spec, reason = specs[paths[0]]
        assert spec is not None
        gathered = accumulator if spec.needs_hessian else None
        for path, weight, name, result in zip(
            paths, weights, together, quantize_under(paths, weights, spec, reason, gathered), strict=True
        ):
            # the decoded weight in the place of the codes: the same values, decoded once and not once a window
            layer.get_submodule(name).weight.data = result.tensor.dequantize(weight.dtype)  # type: ignore[union-attr]
            done[path] = result
    return done


def _batches(names: list[str], prefix: str, specs: Specs) -> list[list[str]]:
    batches: dict[object, list[str]] = {}
    for name in names:
        spec = specs[f"{prefix}.{name}"][0]
        assert spec is not None
        # double-quantized scales share blocks and an offset, so each such weight is solved by itself
        batches.setdefault(name if spec.double_quant else spec, []).append(name)
    return list(batches.values())


def quantize_under(
    paths: list[str],
    weights: list[Tensor],
    spec: QuantSpec,
    reason: str,
    accumulator: HessianAccumulator | None,
) -> list[Quantized]:
    """Quantize weights [N_i, K] under the Hessian of their common input, or plainly where there is none."""
    hessian = None if accumulator is None else accumulator.hessian
    stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
    if accumulator is not None and hessian is not None and accumulator.cross is not None:
        stacked = matched_weight(stacked, hessian, accumulator.cross, getattr(spec.options, "damp", 0.01))
    tensor = quantize_weight(" + ".join(paths), stacked, spec, hessian)
    parts = [tensor] if len(weights) == 1 else tensor.split([w.shape[0] for w in weights])
    return [
        Quantized(part, measure(path, weight, part, reason, hessian))
        for path, weight, part in zip(paths, weights, parts, strict=True)
    ]


def _quantize_at_once(
    layer: MistralDecoderLayer, specs: Specs, activations: Activations, context: WalkContext, prefix: str
) -> dict[str, Quantized]:
    """All Hessians of the block from its unquantized weights; then one more run with the quantized ones."""
    unquantized = _Stream(layer, context, activations.hidden.clone(), frozen=True)
    gathered: dict[str, HessianAccumulator] = {}
    for stage, names in enumerate(STAGES):
        accumulator = HessianAccumulator(layer.get_submodule(names[0]).in_features)  # type: ignore[arg-type]
        for x in unquantized.inputs(stage):
            accumulator.add(x)
        gathered |= dict.fromkeys(names, accumulator)
        unquantized.finish(stage)
    done: dict[str, Quantized] = {}
    for names in STAGES:
        chosen = [name for name in names if specs[f"{prefix}.{name}"][0] is not None]
        if chosen:
            done |= _quantize_linears(layer, chosen, prefix, specs, gathered[names[0]])
    quantized = _Stream(layer, context, activations.hidden)
    for stage in (1, 3):
        quantized.finish(stage)
    return done


def _frozen_copy(layer: MistralDecoderLayer) -> MistralDecoderLayer:
    """A second layer that shares the present weights: replacing the first one's leaves them be."""
    from copy import copy

    def shallow(module: nn.Module) -> nn.Module:
        twin = copy(module)
        twin._parameters = {
            n: None if p is None else nn.Parameter(p.data, requires_grad=False)
            for n, p in module._parameters.items()
        }
        twin._modules = {n: None if m is None else shallow(m) for n, m in module._modules.items()}
        return twin

    return shallow(layer)  # type: ignore[return-value]
