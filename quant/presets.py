"""Configurations by name. ``-all`` quantizes the embedding and the head as well; ``gptq-`` calibrates."""

from __future__ import annotations

import dataclasses

from .config import QuantConfig, QuantSpec, Rule

_BODY = ("*layers.*",)
_ENDS = ("*embed_tokens", "lm_head")

_SPECS: dict[str, QuantSpec] = {
    "nf4": QuantSpec(format="nf4"),
    "nf4-dq": QuantSpec(format="nf4", double_quant=True),
    "fp4": QuantSpec(format="fp4"),
    "fp4-dq": QuantSpec(format="fp4", double_quant=True),
    "int8": QuantSpec(format="int8"),
    **{
        f"int{bits}-g{group}": QuantSpec(format=f"int{bits}", group_size=group)
        for bits in (4, 3, 2)
        for group in (32, 64, 128)
    },
    **{
        f"int{bits}-g{group}-asym": QuantSpec(format=f"int{bits}", group_size=group, symmetric=False)
        for bits in (4, 3, 2)
        for group in (32, 64, 128)
    },
    "int4": QuantSpec(format="int4", group_size=None),
}


def _gptq(spec: QuantSpec) -> QuantSpec:
    return dataclasses.replace(spec, algorithm="gptq", options=None)


def _presets() -> dict[str, QuantConfig]:
    out = {}
    for name, spec in _SPECS.items():
        for prefix, chosen in (("", spec), ("gptq-", _gptq(spec))):
            out[prefix + name] = QuantConfig((Rule(_BODY, chosen),))
            # the ends are rounded plainly: a table of token vectors has no calibration inputs
            out[f"{prefix}{name}-all"] = QuantConfig((Rule(_BODY, chosen), Rule(_ENDS, spec)))
    return out


PRESETS: dict[str, QuantConfig] = _presets()
