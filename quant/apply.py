"""Which module becomes what, the swap itself, and the report of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .algorithms import ALGORITHMS
from .config import ConfigError, QuantConfig, QuantSpec, Rule
from .formats import FORMATS, IMPORTED
from .linear import QuantEmbedding, QuantLinear
from .tensor import QuantizedTensor, Shape, groups_per_row

# rows of a weight that are measured at once
_ROWS = 2048


@dataclass(frozen=True)
class Target:
    """A module that can be quantized: path, ``linear`` or ``embedding``, weight shape (N, K), what it is tied to."""

    path: str
    kind: str
    shape: Shape
    tied_to: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one module: its spec and weight error, or ``None`` and the reason it was kept."""

    path: str
    shape: Shape
    spec: QuantSpec | None
    reason: str
    nbytes: int | None = None
    # ||W - Q||_F^2 / ||W||_F^2
    relative_error: float | None = None
    # tr((W - Q) H (W - Q)^T) / tr(W H W^T) on the calibration inputs
    output_error: float | None = None
    # what was wrong with the weight or its Hessian, in words
    trouble: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "spec": None if self.spec is None else self.spec.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """Inverse of :meth:`to_dict`, also after JSON."""
        spec = None if data["spec"] is None else QuantSpec.from_dict(data["spec"])
        return cls(**{**data, "spec": spec, "shape": (data["shape"][0], data["shape"][1])})


@dataclass
class Report:
    """One :class:`Outcome` for every module that could have been quantized.

    Attributes:
        copied: of norms and biases, by their paths, what is wrong with them; the others are not in it.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    copied: dict[str, str] = field(default_factory=dict)

    @property
    def quantized(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.spec is not None]

    @property
    def kept(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.spec is None]

    def to_dict(self) -> dict[str, Any]:
        return {"modules": [o.to_dict() for o in self.outcomes], "copied": self.copied}


def find_targets(model: nn.Module) -> list[Target]:
    """Every nn.Linear and nn.Embedding of a model, in its own order; a head tied to the embedding says so."""
    targets = []
    owners: dict[int, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or isinstance(module, QuantLinear):
            continue
        kind = "linear" if isinstance(module, nn.Linear) else "embedding"
        tied_to = owners.setdefault(id(module.weight), path)
        shape = (module.weight.shape[0], module.weight.shape[1])
        targets.append(Target(path, kind, shape, None if tied_to == path else tied_to))
    return targets


def resolve(config: QuantConfig, targets: Iterable[Target]) -> dict[str, tuple[QuantSpec | None, str]]:
    """Path -> (spec or None, which rule or why not), in the order of the targets.

    Raises:
        ConfigError: a rule that matches no target, a width that is no multiple of the group, an embedding under an
            algorithm that needs inputs, or a head and an embedding that are tied but are to become different things.
    """
    targets = list(targets)
    for rule in config.rules:
        if not any(rule.matches(t.path) for t in targets):
            raise ConfigError(
                f"the rule {', '.join(rule.match)} matches no module; modules that can be quantized: {_some(targets)}"
            )
    out: dict[str, tuple[QuantSpec | None, str]] = {}
    for target in targets:
        first = next((r for r in config.rules if r.matches(target.path)), None)
        spec, reason = _apply_rule(first, target)
        if target.tied_to is not None:
            tied_spec = out[target.tied_to][0]
            if first is not None and spec != tied_spec:
                raise ConfigError(
                    f"{target.path} shares its weight with {target.tied_to}, so both must become the same: "
                    f"the rules give {_short(spec)} and {_short(tied_spec)}"
                )
            spec, reason = tied_spec, f"tied to {target.tied_to}"
        out[target.path] = (spec, reason)
    return out


def _apply_rule(rule: Rule | None, target: Target) -> tuple[QuantSpec | None, str]:
    if rule is None:
        return None, "no rule matches it"
    name = f"rule {', '.join(rule.match)}"
    if rule.spec is None:
        return None, f"kept by {name}"
    if target.kind == "embedding" and rule.spec.needs_hessian:
        raise ConfigError(
            f"{target.path} is an embedding: it has no input activations, so {rule.spec.algorithm} with scale "
            f"{rule.spec.scale} cannot be used; give it a rule of its own with algorithm rtn"
        )
    if rule.spec.format in IMPORTED:
        raise ConfigError(
            f"{rule.spec.format} is read from other libraries' files; choose one of {', '.join(FORMATS)}"
        )
    try:
        groups_per_row(rule.spec, target.shape)
    except ConfigError as error:
        raise ConfigError(f"{target.path}: {error}") from None
    return rule.spec, name


def quantize_weight(path: str, w: Tensor, spec: QuantSpec, hessian: Tensor | None = None) -> QuantizedTensor:
    """Run the spec's algorithm on a weight [N, K]; errors name the module."""
    try:
        return ALGORITHMS[spec.algorithm].run(w, spec, hessian)
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from error


def measure(path: str, w: Tensor, q: QuantizedTensor, reason: str, hessian: Tensor | None = None) -> Outcome:
    """The outcome of a quantized weight, with its error in the weights and, given a Hessian, in the outputs."""
    totals = torch.zeros(4, dtype=torch.float64)
    h = None if hessian is None else hessian.to(torch.float32)
    for start in range(0, w.shape[0], _ROWS):
        stop = min(start + _ROWS, w.shape[0])
        part = w[start:stop].to(torch.float32)
        error = part - q.dequantize(torch.float32, start, stop)
        totals[0] += float(error.square().sum())
        totals[1] += float(part.square().sum())
        if h is not None:
            totals[2] += float(torch.linalg.vecdot(error @ h, error).sum())
            totals[3] += float(torch.linalg.vecdot(part @ h, part).sum())
    relative, output = (float(a / b) if float(b) else 0.0 for a, b in totals.view(2, 2))
    return Outcome(path, q.shape, q.spec, reason, q.nbytes, relative, None if h is None else output)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` where ``path`` leads."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def swap(model: nn.Module, specs: Mapping[str, QuantSpec], dtype: torch.dtype) -> None:
    """Replace the modules named by empty quantized ones on the meta device, to be filled by a strict load.

    A head that is tied to a quantized embedding shares its tensors: it is replaced by a QuantLinear with the very
    same buffers once they are there (:func:`tie_quantized`).
    """
    for path, spec in specs.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.Embedding):
            new: nn.Module = QuantEmbedding(
                spec, module.num_embeddings, module.embedding_dim, dtype, module.padding_idx, device="meta"
            )
        elif isinstance(module, nn.Linear) and not isinstance(module, QuantLinear):
            new = QuantLinear(spec, module.in_features, module.out_features, module.bias, device="meta")
        else:
            raise ConfigError(
                f"{path} is a {type(module).__name__}: only Linear and Embedding can be quantized"
            )
        replace_module(model, path, new)


def tie_quantized(head: QuantLinear, embedding: QuantEmbedding) -> None:
    """Let the head read the embedding's tensors."""
    head.set_quantized(embedding.quantized())
    head.tied = True


def quantize_model(model: nn.Module, config: QuantConfig, dtype: torch.dtype | None = None) -> Report:
    """Quantize a model in memory, in place, with plain algorithms (those that take no calibration).

    Raises:
        ConfigError: the config asks for calibration; ``brise.model.stream`` walks a model for that.
    """
    if config.needs_calibration:
        raise ConfigError("this config needs calibration data: use brise.model.stream.quantize_checkpoint")
    report = Report()
    made: dict[str, QuantizedTensor] = {}
    targets = find_targets(model)
    resolved = resolve(config, targets)
    for target in targets:
        spec, reason = resolved[target.path]
        if spec is None:
            report.outcomes.append(Outcome(target.path, target.shape, None, reason))
            continue
        module = model.get_submodule(target.path)
        assert isinstance(module, nn.Linear | nn.Embedding)
        weight = module.weight.detach()
        q = made[target.tied_to] if target.tied_to else quantize_weight(target.path, weight, spec)
        made[target.path] = q
        report.outcomes.append(measure(target.path, weight, q, reason))
        new: QuantEmbedding | QuantLinear
        if isinstance(module, nn.Embedding):
            new = QuantEmbedding.from_quantized(q, dtype or weight.dtype, module.padding_idx)
        else:
            new = QuantLinear.from_quantized(q, None if module.bias is None else module.bias.detach())
            new.tied = target.tied_to is not None
        replace_module(model, target.path, new)
    return report


def _some(targets: list[Target], limit: int = 6) -> str:
    names = [t.path for t in targets[:limit]]
    return ", ".join(names) + (f" and {len(targets) - limit} more" if len(targets) > limit else "")


def _short(spec: QuantSpec | None) -> str:
    return "none (kept)" if spec is None else f"{spec.format} by {spec.algorithm}"
