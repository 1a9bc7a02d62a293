"""The Format protocol, and the table of formats: the one place where a new one is named.

A format says which numbers a weight can take. It works elementwise, on anything that broadcasts: a whole matrix
in groups for plain rounding, one column at a time for GPTQ. It knows nothing of how codes are chosen
(:mod:`.algorithms`) or laid out on disk (:mod:`.tensor`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from .integer import INTEGERS
from .minimum import INT4_MIN
from .nf4 import FP4, NF4

if TYPE_CHECKING:
    from .config import QuantSpec


class Format(Protocol):
    """What an algorithm may ask of a format."""

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def default_group(self) -> int | None: ...
    @property
    def default_scale_dtype(self) -> str: ...
    @property
    def codes_from_exact_scale(self) -> bool:
        """Plain rounding encodes with the scale before storage rounds it (else with the stored one)."""
        ...

    def check(self, spec: QuantSpec) -> None:
        """Raise ConfigError if the spec asks for what the format has not."""
        ...

    def fit(self, groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """fp32 groups [..., g] -> (scale fp32 [...], zero point uint8 [...] or None)."""
        ...

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """fp32 weights -> nearest uint8 codes; scale and zero broadcast to w."""
        ...

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """uint8 codes -> fp32 weights; scale and zero broadcast to the codes."""
        ...

    def grid(self, scale: Tensor, zero: Tensor | None = None) -> Grid:
        """The values of G groups, prepared for one small look-up after the other; scale and zero [G, N]."""
        ...


class Grid(Protocol):
    """:meth:`Format.encode` and :meth:`Format.decode` for algorithms that go input channel by input channel."""

    def nearest(self, w: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """fp32 ``w`` [..., N] of a group -> (places on the grid, in a dtype of the grid's own; their values, fp32)."""
        ...

    def codes(self, places: Tensor, groups: Tensor) -> Tensor:
        """Places [K, N] and the group int64 [K] of each row -> uint8 codes [K, N]."""
        ...

    def places(self, count: int) -> Tensor:
        """An empty tensor [count, N] for places."""
        ...


_ALL: tuple[Format, ...] = (NF4, FP4, *INTEGERS)
# read from other libraries' files and written back, but not to be chosen
IMPORTED: dict[str, Format] = {INT4_MIN.name: INT4_MIN}


class _Formats(dict[str, Format]):
    """The formats to choose from; those that are only imported are found by name, and not listed."""

    def __missing__(self, name: str) -> Format:
        return IMPORTED[name]


FORMATS: dict[str, Format] = _Formats({fmt.name: fmt for fmt in _ALL})
