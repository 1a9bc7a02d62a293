"""What is compiled ahead of time: a kernel with its compile-time arguments; variants_*.py list those that ship."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time arguments, as it is launched.

    ``types`` names every run-time argument and its type; those in ``divisible`` are multiples of 16.
    ``weights`` is the number of weights a step decodes, 0 for kernels that decode none. ``arches`` are those it is
    launched on: a configuration for the shared memory of sm_90 need not fit sm_80.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    divisible: tuple[str, ...] = ()
    weights: int = 0
    needs: tuple[str, ...] = field(default=())
    arches: tuple[int, ...] = (80, 90)
