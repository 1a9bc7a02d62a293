"""Configurations that fit a budget: the presets that do, and the mixture of formats that loses least."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..quant.config import Calibration, ConfigError, QuantConfig, QuantSpec, Rule
from ..quant.presets import PRESETS
from ..quant.tensor import layout as layout_of
from .allocate import Allocation, BudgetError, Option, allocate
from .plan import Layout
from .sensitivity import Losses, without_hessian

# formats that a mixture may take, by preset: from 2.1 to 8 bits a weight, each with scales that are worth their bytes
FORMATS = (
    "int2-g64",
    "int2-g32",
    "int3-g128",
    "int3-g64",
    "int3-g32",
    "int4-g128",
    "int4-g64",
    "int4-g32",
    "int8",
)


@dataclass(frozen=True)
class Uniform:
    """A preset that fits: its bytes, bits a weight of the whole model, and predicted KL (None where not measured)."""

    name: str
    nbytes: int
    bits: float
    predicted: float | None = None


@dataclass(frozen=True)
class Mixed:
    """The best mixture within a budget; ``config`` makes it."""

    config: QuantConfig
    allocation: Allocation
    nbytes: int
    bits: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "bytes": self.nbytes,
            "bits_per_weight": self.bits,
            "predicted_kl": self.allocation.loss,
            "modules": self.allocation.chosen,
        }


def candidates(layout: Layout, prefix: str, names: Sequence[str] = FORMATS) -> dict[str, QuantSpec]:
    """Name -> spec of the formats that fit every module's width; ``prefix`` is ``gptq-`` or nothing.

    Raises:
        ConfigError: none fits.
    """
    out: dict[str, QuantSpec] = {}
    for name in names:
        spec = PRESETS[prefix + name].rules[0].spec
        assert spec is not None
        if spec.group_size is None or all(t.shape[1] % spec.group_size == 0 for t in layout.targets.values()):
            out[name] = spec
    if not out:
        raise ConfigError(f"none of {', '.join(names)} fits the widths of this model")
    return out


def uniform_plans(
    layout: Layout, budget: int, prefix: str = "", losses: Losses | None = None
) -> list[Uniform]:
    """The presets of ``prefix``, or the plain ones, that fit, the largest first.

    Raises:
        BudgetError: none fits.
    """
    out = []
    for name, config in PRESETS.items():
        if not name.startswith(prefix) or config.needs_calibration != bool(prefix):
            continue
        try:
            ledger = layout.ledger(config)
        except ConfigError:  # a group that does not divide this model's widths
            continue
        predicted = None if losses is None else _predicted(name.removeprefix(prefix), losses)
        out.append(Uniform(name, ledger.nbytes, ledger.bits_per_weight, predicted))
    fitting = sorted((u for u in out if u.nbytes <= budget), key=lambda u: (-u.nbytes, u.name))
    if not fitting and losses is None:
        least = min(out, key=lambda u: u.nbytes, default=None)
        smallest = "" if least is None else f": the smallest, {least.name}, takes {least.nbytes:,} bytes"
        raise BudgetError(f"no preset fits {budget:,} bytes{smallest}; raise the budget, or try --mixed")
    return fitting


def _predicted(name: str, losses: Losses) -> float | None:
    """The sum of the losses where every module takes the format, with the ends or without."""
    short = name.removesuffix("-all")
    rows = losses.items() if name.endswith("-all") else [(p, r) for p, r in losses.items() if ".layers." in p]
    values = [row.get(short) for _, row in rows]
    return None if any(v is None for v in values) else sum(v for v in values if v is not None)


def mixed_plan(
    layout: Layout,
    budget: int,
    losses: Losses,
    specs: Mapping[str, QuantSpec],
    calibration: Calibration,
    *,
    keep_ends: bool = False,
) -> Mixed:
    """The formats by module that lose least within ``budget`` bytes of the whole checkpoint.

    Args:
        losses: path -> candidate -> predicted KL, see :func:`.sensitivity.measure_sensitivities`.
        specs: candidate -> spec. calibration: for the config that is made.
        keep_ends: leave embedding and head as they are.

    Raises:
        BudgetError: nothing is small enough.
    """
    tied = {t.tied_to for t in layout.targets.values() if t.tied_to is not None}
    options: dict[str, dict[str, Option]] = {}
    for path, row in losses.items():
        target = layout.targets[path]
        kept = layout.stored_bytes(f"{path}.weight")
        ends = ".layers." not in path
        options[path] = {"keep": Option(kept, 0.0)}
        if not (ends and keep_ends):
            for name, spec in specs.items():
                nbytes = _nbytes(_spec_for(path, spec, tied), target.shape)
                options[path][name] = Option(nbytes, row[name])
    chosen_bytes = sum(row["keep"].nbytes for row in options.values())
    fixed = sum(layout.stored_bytes(name) for step in layout.steps for name in step.names) - chosen_bytes
    allocation = allocate(options, budget - fixed)
    rules: dict[QuantSpec, list[str]] = {}
    for path, name in allocation.chosen.items():
        if name != "keep":
            spec = _spec_for(path, specs[name], tied)
            rules.setdefault(spec, []).append(path)
            rules[spec] += [t.path for t in layout.targets.values() if t.tied_to == path]
    if not rules:
        raise ConfigError("the whole model fits the budget as it is: nothing has to be quantized")
    made = QuantConfig(tuple(Rule(tuple(paths), spec) for spec, paths in rules.items()), Calibration())
    config = dataclasses.replace(made, calibration=calibration) if made.needs_calibration else made
    ledger = layout.ledger(config)
    return Mixed(config, allocation, ledger.nbytes, ledger.bits_per_weight)


def _spec_for(path: str, spec: QuantSpec, tied: set[str]) -> QuantSpec:
    return without_hessian(spec) if path.endswith("embed_tokens") or path in tied else spec


def _nbytes(spec: QuantSpec, shape: tuple[int, int]) -> int:
    total = 0
    for dtype, size in layout_of(spec, shape).values():
        count = 1
        for n in size:
            count *= n
        total += count * dtype.itemsize
    return total
