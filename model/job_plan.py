"""The steps of a quantization, and every tensor that will come of them, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..quant.apply import Target
from ..quant.config import ConfigError, QuantSpec
from ..quant.tensor import layout
from .quantization_entry import guard_of
from .shards import Planned
from .source import Source


@dataclass(frozen=True)
class Step:
    """What is done, written and put on record at once: the embedding, a block, or what comes after the blocks.

    Attributes:
        name: ``embedding``, the block's path, or ``head``.
        targets: paths of the modules in it that can be quantized and own their weight.
        names: its tensors in the source.
    """

    name: str
    targets: tuple[str, ...]
    names: tuple[str, ...]

    def copied(self, specs: Mapping[str, QuantSpec | None]) -> list[str]:
        """The tensors that stay as they are."""
        coded = {f"{path}.weight" for path in self.targets if specs[path] is not None}
        return [name for name in self.names if name not in coded]


def plan_steps(source: Source, model: nn.Module, targets: Mapping[str, Target]) -> list[Step]:
    """The steps, in the order in which the model runs; every tensor of the source is in one of them."""
    paths = [path for path, _ in blocks_of(model)]
    own = [t for t in targets.values() if t.tied_to is None]
    tied = {f"{t.path}.weight" for t in targets.values() if t.tied_to is not None}
    names = [name for name in source.names if name not in tied]
    embedding = [t.path for t in own if t.kind == "embedding"][:1]
    first = tuple(n for n in names if any(n.startswith(path + ".") for path in embedding))
    steps = [Step("embedding", tuple(embedding), first)]
    for path in paths:
        inside = tuple(t.path for t in own if t.path.startswith(path + "."))
        steps.append(Step(path, inside, tuple(n for n in names if n.startswith(path + "."))))
    seen = {name for step in steps for name in step.names}
    done = {path for step in steps for path in step.targets}
    rest = tuple(t.path for t in own if t.path not in done)
    steps.append(Step("head", rest, tuple(n for n in names if n not in seen)))
    return steps


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks with their paths, in the order in which they run.

    Raises:
        ConfigError: the model has no list of blocks.
    """
    layers = next(((p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList)), None)
    if layers is None:
        raise ConfigError(f"{type(model).__name__} has no list of decoder blocks")
    path, modules = layers
    return [(f"{path}.{i}", block) for i, block in enumerate(modules)]


def plan_tensors(
    steps: list[Step],
    source: Source,
    targets: Mapping[str, Target],
    specs: Mapping[str, QuantSpec | None],
    entry: Mapping[str, Any],
) -> list[Planned]:
    """Every tensor of the checkpoint to be, step by step: first the quantized, then what is copied.

    Args:
        entry: the ``quantization_config`` to be, for its guard.
    """
    out = []
    for step in steps:
        for path in step.targets:
            spec = specs[path]
            if spec is not None:
                out += [
                    Planned(f"{path}.{part}", dtype, shape)
                    for part, (dtype, shape) in layout(spec, targets[path].shape).items()
                ]
        out += [Planned(name, *source.info(name)) for name in step.copied(specs)]
    guard = guard_of(entry, [tensor.name for tensor in out])
    if guard is not None:
        out.append(Planned(guard[0], torch.uint8, (0,)))
    return out


def tensors_of(step: Step, specs: Mapping[str, QuantSpec | None], targets: Mapping[str, Target]) -> list[str]:
    """The names of the tensors that a step writes."""
    out = []
    for path in step.targets:
        spec = specs[path]
        if spec is not None:
            out += [f"{path}.{part}" for part in layout(spec, targets[path].shape)]
    return out + step.copied(specs)
