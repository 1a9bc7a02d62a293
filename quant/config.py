"""What each weight becomes: specs, ordered rules, and the calibration that algorithms with a Hessian ask for.

Everything here is frozen and complete: a config that was read from YAML, resolved and written into
``config.json`` says all that is needed to load the checkpoint or to make it again.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A quantization config that cannot be carried out; the message says what to change."""


SCALE_RULES = ("absmax", "absmax_narrow", "mse", "hessian")
SCALE_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """What one weight [N = out_features, K = in_features] becomes.

    Attributes:
        format: a name in :data:`brise.quant.formats.FORMATS`.
        algorithm: a name in :data:`brise.quant.algorithms.ALGORITHMS`; it chooses the codes.
        group_size: consecutive input channels that share a scale; ``None`` is one scale per output channel.
            Left out, it is the format's usual one (64 for nf4 and fp4, none for int8, else 128).
        symmetric: integers only: the zero point is the middle code and is not stored.
        double_quant: scales are themselves stored as 8-bit codes in blocks of 256 (QLoRA, section 3).
        scale: how a group's scale is chosen. ``absmax``: the largest magnitude lands on the end of the grid
            (for integers at half a step beyond the last code, absmax / ((2^b - 1) / 2));
            ``absmax_narrow``: on the largest positive integer, absmax / (2^(b-1) - 1);
            ``mse``: least squared error of the group over a grid of clipping ratios;
            ``hessian``: the same search with the error weighed by the group's own block of the Hessian.
        scale_dtype: storage of scales without double quantization. Left out: float32 for nf4 and fp4 (what
            bitsandbytes stores), float16 for integers.
        options: the algorithm's own options, a frozen dataclass (``GPTQOptions`` for gptq).
    """

    format: str
    algorithm: str = "rtn"
    group_size: int | None = -1  # -1: the format's usual; replaced in __post_init__
    symmetric: bool = True
    double_quant: bool = False
    scale: str = "absmax"
    scale_dtype: str = ""
    options: Any = None

    def __post_init__(self) -> None:
        from .algorithms import ALGORITHMS
        from .formats import FORMATS, IMPORTED

        fmt = _lookup({**FORMATS, **IMPORTED}, self.format, "format")
        algorithm = _lookup(ALGORITHMS, self.algorithm, "algorithm")
        for name in ("symmetric", "double_quant"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.group_size == -1:
            object.__setattr__(self, "group_size", fmt.default_group)
        if self.group_size is not None and (
            isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 2
        ):
            raise ConfigError(f"group_size must be an integer of at least 2 or null, got {self.group_size!r}")
        if not self.scale_dtype:
            object.__setattr__(self, "scale_dtype", fmt.default_scale_dtype)
        if self.scale_dtype not in SCALE_DTYPES:
            raise ConfigError(
                f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}, got {self.scale_dtype!r}"
            )
        if self.scale not in SCALE_RULES:
            raise ConfigError(f"scale must be one of {', '.join(SCALE_RULES)}, got {self.scale!r}")
        if isinstance(self.options, Mapping) or self.options is None:
            object.__setattr__(self, "options", algorithm.make_options(self.options or {}))
        elif not isinstance(self.options, algorithm.options):
            raise ConfigError(
                f"options of {self.algorithm} must be a {algorithm.options.__name__}, got {self.options!r}"
            )
        fmt.check(self)
        algorithm.check(self)

    @property
    def needs_hessian(self) -> bool:
        """Whether choosing the codes takes calibration data."""
        from .algorithms import ALGORITHMS

        return ALGORITHMS[self.algorithm].needs_hessian or self.scale == "hessian"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that :meth:`from_dict` reads back to an equal spec."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "options"}
        options = dataclasses.asdict(self.options)
        return {**out, "options": options} if options else out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """Raises ConfigError for a key that is not a field of the spec."""
        _known(data, [f.name for f in dataclasses.fields(cls)], "spec")
        if "format" not in data:
            raise ConfigError(f"a spec needs a format, got only {', '.join(data) or 'nothing'}")
        return cls(**data)


@dataclass(frozen=True)
class Rule:
    """Modules whose path fits any of ``match`` (shell wildcards, ``*`` crosses dots) become ``spec``; None: kept."""

    match: tuple[str, ...]
    spec: QuantSpec | None

    def matches(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.match)

    def to_dict(self) -> dict[str, Any]:
        return {"match": list(self.match), **(self.spec.to_dict() if self.spec else {"keep": True})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rule:
        rest = dict(data)
        match = rest.pop("match", None)
        if isinstance(match, str):
            match = [match]
        if not isinstance(match, list | tuple) or not match or not all(isinstance(m, str) for m in match):
            raise ConfigError(f"a rule needs match: a module path pattern or a list of them, got {match!r}")
        if rest.get("keep") is True:
            _known(rest, ["keep"], "rule that keeps")
            return cls(tuple(match), None)
        return cls(tuple(match), QuantSpec.from_dict(rest))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text that Hessians are gathered on, and how the model is walked.

    Attributes:
        text: a text by name or a file (see ``brise.eval.data``).
        windows: number of windows of ``length`` tokens, taken in order from the text.
        length: tokens a window.
        true_sequential: within a block, o / gate-up / down see what the already quantized Linears before them
            give; otherwise all Hessians of a block come from its unquantized weights.
        target: ``quantized`` minimises ||(W - Q) X|| on the activations X of the quantized prefix, as GPTQ does;
            ``full`` minimises ||W X_full - Q X||, with X_full the activations of the unquantized model
            (GPTAQ, arXiv:2504.02692, in closed form).
        hessians: ``sequential``: of the activations of the quantized prefix, as above; ``once``: all of them of the
            unquantized model in one pass, which many configs can share (brise.model.hessian_store). An approximation:
            no layer makes up for the errors of those before it.
        seed: None takes the text's first windows, side by side; a number draws their places with that seed.
    """

    text: str = "boolq"
    windows: int = 64
    length: int = 1024
    true_sequential: bool = True
    target: str = "quantized"
    hessians: str = "sequential"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.hessians not in ("sequential", "once"):
            raise ConfigError(f"calibration hessians must be sequential or once, got {self.hessians!r}")
        if self.hessians == "once" and (self.target != "quantized" or self.true_sequential):
            raise ConfigError(
                "calibration hessians once are of the unquantized model: set target to quantized and true_sequential "
                "to false"
            )
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0
        ):
            raise ConfigError(f"calibration seed must be a whole number or null, got {self.seed!r}")
        for name in ("windows", "length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"calibration {name} must be a positive integer, got {value!r}")
        if not isinstance(self.text, str) or not self.text:
            raise ConfigError(f"calibration text must be a text by name or a file, got {self.text!r}")
        if not isinstance(self.true_sequential, bool):
            raise ConfigError(
                f"calibration true_sequential must be true or false, got {self.true_sequential!r}"
            )
        if self.target not in ("quantized", "full"):
            raise ConfigError(f"calibration target must be quantized or full, got {self.target!r}")
        if self.target == "full" and not self.true_sequential:
            raise ConfigError("calibration target full goes through each block in true-sequential order")

    def to_dict(self) -> dict[str, Any]:
        """As :meth:`from_dict` reads it; what came later and is as it always was is left out, so that older configs
        are equal to what they were.
        """
        out = dataclasses.asdict(self)
        return {k: v for k, v in out.items() if (k, v) not in (("hessians", "sequential"), ("seed", None))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        if not isinstance(data, Mapping):
            raise ConfigError(f"calibration must be a mapping, got {data!r}")
        _known(data, [f.name for f in dataclasses.fields(cls)], "calibration")
        return cls(**data)


@dataclass(frozen=True)
class QuantConfig:
    """Ordered rules from module path to spec: the first that matches wins."""

    rules: tuple[Rule, ...]
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        if not self.rules:
            raise ConfigError("a config needs at least one rule")

    @property
    def needs_calibration(self) -> bool:
        return any(rule.spec is not None and rule.spec.needs_hessian for rule in self.rules)

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"rules": [rule.to_dict() for rule in self.rules]}
        if self.needs_calibration or self.calibration != Calibration():
            out["calibration"] = self.calibration.to_dict()
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantConfig:
        if not isinstance(data, Mapping):
            raise ConfigError(f"a config is a mapping with rules, got {type(data).__name__}")
        _known(data, ["rules", "calibration"], "config")
        rules = data.get("rules")
        if not isinstance(rules, list) or not all(isinstance(r, Mapping) for r in rules):
            raise ConfigError("rules must be a list of mappings, each with match and format")
        given = data.get("calibration")
        calibration = Calibration() if given is None else Calibration.from_dict(given)
        return cls(tuple(Rule.from_dict(r) for r in rules), calibration)

    @classmethod
    def load(cls, source: str | Path) -> QuantConfig:
        """A preset by name, or a YAML or JSON file.

        Raises:
            ConfigError: neither a preset nor a readable file, or its contents do not make a config.
        """
        from .presets import PRESETS

        if str(source) in PRESETS:
            return PRESETS[str(source)]
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"{source} is neither a file nor a preset; presets: {', '.join(PRESETS)}")
        try:
            data = (
                json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
            )
        except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid {path.suffix or 'YAML'}: {error}") from error
        return cls.from_dict(data)


def _known(data: Mapping[str, Any], allowed: list[str], what: str) -> None:
    unknown = sorted(set(map(str, data)) - set(allowed))
    if unknown:
        raise ConfigError(f"unknown key in a {what}: {', '.join(unknown)}; known: {', '.join(allowed)}")


def _lookup(table: Mapping[str, Any], name: Any, what: str) -> Any:
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"unknown {what} {name!r}; known: {', '.join(table)}")
    return table[name]
