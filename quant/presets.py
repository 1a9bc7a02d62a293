"""Configurations by name. ``-all`` quantizes the embedding and the head as well; ``gptq-`` calibrates.

``classic-gptq-`` is GPTQ as published, scales by the largest magnitude and the quantized model's own activations: what
other people's GPTQ does, in less than half of the time of ours.
"""

from __future__ import annotations

import dataclasses

from .config import Calibration, QuantConfig, QuantSpec, Rule

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


# What pays on SmolLM2 (results/gptq): scales searched under the Hessian, and the full model's outputs as the target.
_CALIBRATION = Calibration(target="full")


def _gptq(spec: QuantSpec) -> QuantSpec:
    # one scale for a whole row is searched by its squared error: its block of the Hessian would be all of it
    scale = "mse" if spec.group_size is None else "hessian"
    return dataclasses.replace(spec, algorithm="gptq", scale=scale, options=None)


def _presets() -> dict[str, QuantConfig]:
    out = {}
    for name, spec in _SPECS.items():
        classic = dataclasses.replace(spec, algorithm="gptq", options=None)
        for prefix, chosen in (("", spec), ("gptq-", _gptq(spec)), ("classic-gptq-", classic)):
            calibration = _CALIBRATION if prefix == "gptq-" else Calibration()
            out[prefix + name] = QuantConfig((Rule(_BODY, chosen),), calibration)
            # the ends are rounded plainly: a table of token vectors has no calibration inputs
            out[f"{prefix}{name}-all"] = QuantConfig((Rule(_BODY, chosen), Rule(_ENDS, spec)), calibration)
    return out


PRESETS: dict[str, QuantConfig] = _presets()
