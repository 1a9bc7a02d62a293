"""One decoder block quantized under calibration: Hessian, quantize, carry on, a group of Linears at a time.

Each block runs once over the calibration windows. The input of q, k and v is there before they run; o, gate-up and
down then see what the already quantized Linears before them give (GPTQ's "true sequential" order). Linears that
share an input share a Hessian. Weights are in memory only from when they are needed until they are not: at
Mistral-7B's width those of a block take 0.9 GB, and the Hessian of down_proj as much again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..quant.calibrate import HessianAccumulator
from .blocks import MistralDecoderLayer
from .solve import Quantized, Setting, Specs, quantize_under, reduce, spec_of
from .walk import STAGES, BlockWalk, WalkContext

Load = Callable[[str], Tensor]


@dataclass
class Activations:
    """Hidden states of this process's calibration windows in front of a block: [windows, T, D] fp32, on the CPU.

    Attributes:
        hidden: as the already quantized blocks give them.
        full: as the unquantized model gives them; only where the calibration's target is ``full``.
        buffer: gives memory, or a file's, of a shape in fp32, for what is kept within a block.
    """

    hidden: Tensor
    full: Tensor | None = None
    buffer: Callable[[tuple[int, ...]], Tensor] = torch.empty


@torch.no_grad()
def quantize_block(
    layer: MistralDecoderLayer,
    load: Load,
    setting: Setting,
    activations: Activations,
    context: WalkContext,
    prefix: str,
) -> dict[str, Quantized]:
    """Quantize one block under its calibration inputs, and move ``activations`` behind it, in place.

    Args:
        layer: the block, everything in it but the weights of the walk's stages in its place.
        load: path in the block -> the unquantized weight, fp32.
        prefix: the block's path.
    Returns:
        What became of every module that has a spec, by its path from the root. The layer's weights are dropped.
    """
    if not setting.true_sequential:
        return _quantize_at_once(layer, load, setting, activations, context, prefix)
    done: dict[str, Quantized] = {}
    streams = _streams(layer, context, activations)
    for stage in range(len(STAGES)):
        _fill_stage(streams, stage, load)
        done |= _quantize_stage(stage, setting, streams, prefix)
        for stream in streams:
            stream.finish(stage)
        if stage in (1, 3):
            for stream in streams:
                stream.drop(stage - 1, stage)
    return done


@torch.no_grad()
def replay_block(
    layer: MistralDecoderLayer, load: Load, decoded: Load, activations: Activations, context: WalkContext
) -> None:
    """Move ``activations`` behind a block that was quantized before, to the bit as :func:`quantize_block` did.

    Args:
        load: as there. decoded: path in the block -> the weight as it is now, fp32.
    """
    quantized, *full = _streams(layer, context, activations)
    for stage in range(len(STAGES)):
        quantized.fill(stage, {name: decoded(name) for name in STAGES[stage]})
        for stream in full:
            stream.fill(stage, {name: load(name) for name in STAGES[stage]})
        if stage in (1, 3):
            for stream in (quantized, *full):
                stream.finish(stage)
                stream.drop(stage - 1, stage)


def _streams(layer: MistralDecoderLayer, context: WalkContext, activations: Activations) -> list[_Stream]:
    streams = [_Stream(layer, context, activations.hidden, activations.buffer)]
    if activations.full is not None:
        twin = _frozen_copy(layer)
        streams.append(_Stream(twin, context, activations.full, activations.buffer, frozen=True))
    return streams


class _Stream:
    """Calibration windows on their way through a block: the inputs of each stage, and the residual they join.

    Args:
        frozen: the block's weights stay as they are (the unquantized twin), so that what o and down give joins the
            residual at once; otherwise their inputs are kept until :meth:`finish`, when they have been quantized.
    """

    def __init__(
        self,
        layer: MistralDecoderLayer,
        context: WalkContext,
        hidden: Tensor,
        buffer: Callable[[tuple[int, ...]], Tensor],
        frozen: bool = False,
    ) -> None:
        self.layer = layer
        self.walk = BlockWalk(layer, context)
        self.device = context.device
        self.hidden = hidden
        self.frozen = frozen
        self._buffer = buffer
        self._kept: Tensor | None = None
        self._ran = False

    def fill(self, stage: int, weights: Mapping[str, Tensor]) -> None:
        """Put the weights of a stage in their places."""
        for name in STAGES[stage]:
            set_weight(self.layer.get_submodule(name), weights[name])

    def drop(self, *stages: int) -> None:
        """Give back the weights of stages that are over."""
        for stage in stages:
            for name in STAGES[stage]:
                module = self.layer.get_submodule(name)
                set_weight(module, torch.empty_like(module.weight, device="meta"))  # type: ignore[arg-type]

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
        walk, hidden = self.walk, hidden.to(self.device)
        if stage == 0:
            return walk.attention_input(hidden)
        if stage == 1:
            return walk.attend(walk.attention_input(hidden))
        if stage == 2:
            return walk.mlp_input(hidden)
        return walk.mlp_hidden(walk.mlp_input(hidden))

    def _join(self, stage: int, i: int, x: Tensor) -> None:
        join = self.walk.after_attention if stage == 1 else self.walk.after_mlp
        self.hidden[i : i + 1] = join(self.hidden[i : i + 1].to(self.device), x.to(self.device))

    def _keep(self, i: int, x: Tensor) -> None:
        if self._kept is None:
            self._kept = self._buffer((self.hidden.shape[0], *x.shape[1:]))
        self._kept[i] = x[0]


def _fill_stage(streams: list[_Stream], stage: int, load: Load) -> None:
    weights = {name: load(name) for name in STAGES[stage]}
    for stream in streams:
        stream.fill(stage, weights)


def _quantize_stage(
    stage: int, setting: Setting, streams: list[_Stream], prefix: str
) -> dict[str, Quantized]:
    specs = setting.specs
    layer = streams[0].layer
    names = [name for name in STAGES[stage] if specs[f"{prefix}.{name}"][0] is not None]
    if not names:
        return {}
    accumulator = None
    if any(spec.needs_hessian for name in names if (spec := specs[f"{prefix}.{name}"][0])):
        width: int = layer.get_submodule(names[0]).in_features  # type: ignore[assignment]
        accumulator = HessianAccumulator(width, len(streams) == 2, streams[0].device)
        for inputs in zip(*(stream.inputs(stage) for stream in streams), strict=True):
            accumulator.add(*inputs)
        if stage in (1, 3):  # all windows are past them
            for stream in streams:
                stream.drop(stage - 1)
            for stream in streams[1:]:
                stream.drop(stage)
        reduce(accumulator, setting.group)
    return _quantize_linears(layer, names, prefix, setting, accumulator)


def _quantize_linears(
    layer: nn.Module, names: list[str], prefix: str, setting: Setting, accumulator: HessianAccumulator | None
) -> dict[str, Quantized]:
    """Linears that share an input; those that also share a spec are solved as one matrix, row under row."""
    done: dict[str, Quantized] = {}
    batches = _batches(names, prefix, setting.specs)
    for number, together in enumerate(batches):
        paths = [f"{prefix}.{name}" for name in together]
        weights: list[Tensor] = [layer.get_submodule(name).weight.data for name in together]  # type: ignore
        gathered = accumulator if spec_of(setting.specs, paths[0]).needs_hessian else None
        results = quantize_under(paths, weights, setting, gathered, last=number == len(batches) - 1)
        for path, weight, name, result in zip(paths, weights, together, results, strict=True):
            if result.tensor is not None:
                # the decoded weight in the place of the codes: the same values, decoded once and not once a window
                set_weight(layer.get_submodule(name), result.tensor.dequantize(weight.dtype))
            done[path] = result
    return done


def _batches(names: list[str], prefix: str, specs: Specs) -> list[list[str]]:
    batches: dict[object, list[str]] = {}
    for name in names:
        spec = spec_of(specs, f"{prefix}.{name}")
        # double-quantized scales share blocks and an offset, so each such weight is solved by itself
        batches.setdefault(name if spec.double_quant else spec, []).append(name)
    return list(batches.values())


def _quantize_at_once(
    layer: MistralDecoderLayer,
    load: Load,
    setting: Setting,
    activations: Activations,
    context: WalkContext,
    prefix: str,
) -> dict[str, Quantized]:
    """All Hessians of the block from its unquantized weights; then one more run with the quantized ones."""
    unquantized = _Stream(layer, context, activations.hidden.clone(), activations.buffer, frozen=True)
    gathered: dict[str, HessianAccumulator] = {}
    for stage, names in enumerate(STAGES):
        _fill_stage([unquantized], stage, load)
        width: int = layer.get_submodule(names[0]).in_features  # type: ignore[assignment]
        accumulator = HessianAccumulator(width, device=unquantized.device)
        for x in unquantized.inputs(stage):
            accumulator.add(x)
        reduce(accumulator, setting.group)
        gathered |= dict.fromkeys(names, accumulator)
        unquantized.finish(stage)
    done: dict[str, Quantized] = {}
    for names in STAGES:
        chosen = [name for name in names if setting.specs[f"{prefix}.{name}"][0] is not None]
        if chosen:
            done |= _quantize_linears(layer, chosen, prefix, setting, gathered[names[0]])
    quantized = _Stream(layer, context, activations.hidden, activations.buffer)
    for stage in (1, 3):
        quantized.finish(stage)
        quantized.drop(stage - 1, stage)
    return done


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Another weight in the place of a module's, on whatever device that was."""
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


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
