"""Launch configurations of the matrix products as data, by architecture, format and tokens. Asks no GPU anything.

Every entry here compiles for sm_80 and sm_90 without spills (kernels/compile.py); none has been timed on a GPU
yet, so the crossovers to dequantize + library product are estimates, marked as such. What ``brise bench gpu``
finds on a GPU goes into a file ``tuned/<architecture>.json`` beside this one, which then has precedence.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MatmulConfig:
    """BN output channels by BM tokens a program, BK input channels a step."""

    bm: int
    bn: int = 64
    bk: int = 128
    warps: int = 4
    stages: int = 3


Table = tuple[tuple[int, MatmulConfig], ...]
ALL = 1 << 62

# tokens up to which an entry serves; the last serves all. Four stages, as three spill for sm_80 with triton 3.6
MATMUL: Table = (
    (16, MatmulConfig(16, stages=4)),
    (32, MatmulConfig(32)),
    (ALL, MatmulConfig(64)),
)
# what is tried on a GPU for each entry of a table, by its tokens
CANDIDATES: dict[int, tuple[MatmulConfig, ...]] = {
    16: (
        MatmulConfig(16),
        MatmulConfig(16, stages=4),
        MatmulConfig(16, stages=5),
        MatmulConfig(16, bk=64, stages=5),
        MatmulConfig(16, bn=128, warps=4),
        MatmulConfig(16, bn=128, warps=8),
    ),
    32: (
        MatmulConfig(32),
        MatmulConfig(32, stages=4),
        MatmulConfig(32, bn=128, warps=8),
    ),
    ALL: (
        MatmulConfig(64),
        MatmulConfig(64, stages=4),
        MatmulConfig(64, bn=128, warps=8),
        MatmulConfig(128, bn=128, warps=8),
    ),
}
# one configuration whatever the number of tokens, so that a row never depends on its neighbours
MATMUL_INVARIANT = MatmulConfig(16, stages=4)
INT8_DYNAMIC: Table = (
    (16, MatmulConfig(16)),
    (64, MatmulConfig(64)),
    (ALL, MatmulConfig(128, bn=128, warps=8)),
)
# two accumulators: wider blocks than these spill
INT8_OUTLIERS: Table = (
    (16, MatmulConfig(16)),
    (ALL, MatmulConfig(32, bn=128, warps=8)),
)

# tokens above which dequantize + library product is used; estimates (no GPU has timed them)
CROSSOVER = {"int4": 256, "nf4": 128, "fp4": 128, "int8": 256, "int3": 64, "int2": 64}

# rows up to which a decode step takes norms, residuals, SwiGLU and RoPE into the products (model/fused_step.py); 0:
# never. The blocks of more rows fill the registers by themselves. An estimate as well: five launches a layer for nine,
# and nothing in between that is written and read again. ``brise bench gpu`` times both (family "step"); where the
# launches on their own are faster, this is to be 0
STEP_ROWS = 32

_TUNED = Path(__file__).parent / "tuned"

# multiprocessors assumed where the device does not say (an H100 or H200 has 132)
MULTIPROCESSORS = 132
MAX_SPLIT = 8


def by_tokens(table: Table, tokens: int) -> MatmulConfig:
    """The entry that serves this many tokens."""
    return next(config for limit, config in table if tokens <= limit)


def block_k(config: MatmulConfig, group: int) -> int:
    """Input channels a step for a group size (0: per channel): the group must hold whole steps, or divide
    one."""
    return 64 if group >= 64 and group % config.bk else config.bk


def group_fits(group: int) -> bool:
    """Whether the kernels take a group size: per channel (0), 16, 32 or a multiple of 64."""
    return group in (0, 16, 32) or group % 64 == 0


def splits(n: int, k: int, blocks_m: int, config: MatmulConfig, bk: int, multiprocessors: int) -> int:
    """Parts of K: enough programs for two on each multiprocessor, at least four steps each."""
    programs = -(-n // config.bn) * blocks_m
    steps = -(-k // bk)
    return max(1, min(MAX_SPLIT, 2 * multiprocessors // programs, steps // 4))


@dataclass(frozen=True)
class Tuned:
    """What was found on one architecture: tables and crossovers by format; a format left out has those above."""

    matmul: dict[str, Table] = field(default_factory=dict)
    crossover: dict[str, int] = field(default_factory=dict)
    # where it was found: device, versions
    origin: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        tables = {
            fmt: [[limit, dataclasses.asdict(config)] for limit, config in table]
            for fmt, table in self.matmul.items()
        }
        document = {"origin": self.origin, "crossover": self.crossover, "matmul": tables}
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Tuned:
        """Raises ValueError for a table that does not serve every number of tokens."""
        data = json.loads(text)
        tables = {
            fmt: tuple((int(limit), MatmulConfig(**config)) for limit, config in table)
            for fmt, table in data["matmul"].items()
        }
        for fmt, table in tables.items():
            limits = [limit for limit, _ in table]
            if limits != sorted(limits) or not limits or limits[-1] != ALL:
                raise ValueError(f"the table of {fmt} must end with {ALL} tokens, its limits are {limits}")
        return cls(tables, data["crossover"], data["origin"])


@lru_cache(maxsize=8)
def _committed(arch: str) -> Tuned:
    file = _TUNED / f"{arch}.json"
    return Tuned.from_json(file.read_text()) if file.exists() else Tuned()


_in_use: dict[str, Tuned] = {}


def use(arch: str, found: Tuned | None) -> None:
    """Have this process launch by ``found`` on an architecture; None: by what is committed again."""
    if found is None:
        _in_use.pop(arch, None)
    else:
        _in_use[arch] = found


def tuned(arch: str | None) -> Tuned:
    """What holds for an architecture, as "sm_90"; nothing for one that was never timed, and for None."""
    if arch is None:
        return Tuned()
    return _in_use[arch] if arch in _in_use else _committed(arch)


def matmul_table(fmt: str, arch: str | None = None) -> Table:
    """The launches of a format's product by tokens."""
    return tuned(arch).matmul.get(fmt, MATMUL)


def crossover(fmt: str, arch: str | None = None) -> int:
    """Tokens above which the weight is decoded first and the library multiplies."""
    return tuned(arch).crossover.get(fmt, CROSSOVER[fmt])


def tuned_configs() -> list[tuple[str, MatmulConfig]]:
    """(format, launch) of every committed table, without those of :data:`MATMUL`."""
    usual = {config for _, config in MATMUL}
    found = {
        (fmt, config): None
        for file in sorted(_TUNED.glob("*.json"))
        for fmt, table in _committed(file.stem).matmul.items()
        for _, config in table
        if config not in usual
    }
    return list(found)
