"""The table of algorithms: how codes are chosen. An algorithm knows no format; its spec names one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from .gptq import GPTQOptions, gptq
from .rtn import rtn

if TYPE_CHECKING:
    from .config import QuantSpec
    from .tensor import QuantizedTensor


@dataclass(frozen=True)
class NoOptions:
    """An algorithm with nothing to set."""


class Quantize(Protocol):
    """weight [N, K], spec, Hessian fp32 [K, K] (or None) -> quantized weight."""

    def __call__(self, w: Tensor, spec: QuantSpec, hessian: Tensor | None) -> QuantizedTensor: ...


@dataclass(frozen=True)
class Algorithm:
    """One row of the table: the function, its options, and whether it needs a Hessian."""

    name: str
    run: Quantize
    options: type
    needs_hessian: bool

    def make_options(self, data: Mapping[str, Any]) -> Any:
        from .config import ConfigError

        known = {f.name for f in dataclasses.fields(self.options)}
        unknown = sorted(map(str, set(data) - known))
        if unknown:
            raise ConfigError(
                f"unknown option of {self.name}: {', '.join(unknown)}; "
                f"known: {', '.join(sorted(known)) or 'none'}"
            )
        return self.options(**data)

    def check(self, spec: QuantSpec) -> None:
        """Raise ConfigError where the options contradict the rest of the spec."""
        if hasattr(self.options, "check"):
            spec.options.check(spec)


ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm("rtn", rtn, NoOptions, needs_hessian=False),
        Algorithm("gptq", gptq, GPTQOptions, needs_hessian=True),
    )
}
