"""Weights and Hessians that cannot be quantized as asked, and what the user wants done about each kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quant.config import ConfigError, QuantSpec

ACTIONS = {
    "nonfinite": ("fail", "keep"),
    "zero": ("fail", "keep", "round"),
    "hessian": ("fail", "keep", "round"),
    "dead": ("fail", "keep", "round"),
}


class TroubleError(ValueError):
    """A module is in a trouble that the policy calls a failure."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What becomes of a module in trouble: ``fail`` ends the job, ``keep`` leaves it as it is, ``round`` quantizes it.

    Attributes:
        nonfinite: the weight holds NaN or infinity; it can only be kept. Of norms, biases and what the rules keep too,
            where ``keep`` copies it, and says so.
        zero: every weight is zero; rounding it is exact.
        hessian: not positive definite after the greatest damping, or not finite; ``round`` then takes no Hessian.
        dead: some input channels were never excited by the calibration; with ``round`` those channels are rounded
            plainly, and the others as the algorithm does.
    """

    nonfinite: str = "fail"
    zero: str = "round"
    hessian: str = "fail"
    dead: str = "round"

    def __post_init__(self) -> None:
        for kind, actions in ACTIONS.items():
            if getattr(self, kind) not in actions:
                raise ConfigError(
                    f"the policy for {kind} must be {', '.join(actions[:-1])} or {actions[-1]}, "
                    f"got {getattr(self, kind)!r}"
                )

    @classmethod
    def parse(cls, words: Iterable[str]) -> Policy:
        """From ``KIND=ACTION`` words.

        Raises:
            ConfigError: no such kind or action, or a kind that comes twice.
        """
        chosen: dict[str, str] = {}
        for word in words:
            kind, equals, action = word.partition("=")
            if not equals or kind not in ACTIONS:
                raise ConfigError(
                    f"expected KIND=ACTION with a kind of {', '.join(ACTIONS)}, got {word!r} "
                    "(for example hessian=round)"
                )
            if kind in chosen:
                raise ConfigError(f"the policy for {kind} is given twice")
            chosen[kind] = action
        return cls(**chosen)

    def decide(self, path: str, kind: str, what: str) -> str:
        """The action for a module; ``what`` says in words what is wrong with it.

        Raises:
            TroubleError: it is ``fail``.
        """
        action: str = getattr(self, kind)
        if action == "fail":
            others = " or ".join(f"{kind}={other}" for other in ACTIONS[kind][1:])
            raise TroubleError(f"{path}: {what} (the policy may be {others})")
        return action

    def to_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


def look_at(w: Tensor) -> str | None:
    """``nonfinite``, ``zero``, or None for a weight with nothing wrong, of any float dtype."""
    low, high = torch.aminmax(w)  # both are NaN where any weight is
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        return "nonfinite"
    return "zero" if not bool(low) and not bool(high) else None


def nonfinite_weights(w: Tensor) -> int:
    """How many are NaN or infinite."""
    return int((~torch.isfinite(w)).sum())


def in_words(kind: str, w: Tensor | int) -> str:
    """What is wrong with a weight of which :func:`look_at` found ``kind``; an int: so many are NaN or infinite."""
    if kind == "zero":
        return "all its weights are zero"
    return f"it holds {w if isinstance(w, int) else nonfinite_weights(w)} NaN or infinite weights"


def plain(spec: QuantSpec) -> QuantSpec:
    """The same numbers, chosen without a Hessian."""
    scale = "mse" if spec.scale == "hessian" else spec.scale
    return dataclasses.replace(spec, algorithm="rtn", scale=scale, options=None)
