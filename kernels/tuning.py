"""Launch configurations as data: which block sizes, by architecture, op and number of tokens. Asks no GPU
anything.

Every entry compiles for sm_80 and sm_90 without spills (kernels/compile.py); none has been timed on a GPU
yet, so the crossovers to dequantize + library product are estimates, marked as such.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MatmulConfig:
    """BN output channels by BM tokens a program, BK input channels a step."""

    bm: int
    bn: int = 64
    bk: int = 128
    warps: int = 4
    stages: int = 3


# tokens up to which an entry serves; the last serves all
MATMUL: tuple[tuple[int, MatmulConfig], ...] = (
    (16, MatmulConfig(16)),
    (32, MatmulConfig(32)),
    (1 << 62, MatmulConfig(64)),
)
# one configuration whatever the number of tokens, so that a row never depends on its neighbours
MATMUL_INVARIANT = MatmulConfig(16)
INT8_DYNAMIC: tuple[tuple[int, MatmulConfig], ...] = (
    (16, MatmulConfig(16)),
    (64, MatmulConfig(64)),
    (1 << 62, MatmulConfig(128, bn=128, warps=8)),
)
# two accumulators: wider blocks than these spill
INT8_OUTLIERS: tuple[tuple[int, MatmulConfig], ...] = (
    (16, MatmulConfig(16)),
    (1 << 62, MatmulConfig(32, bn=128, warps=8)),
)

# tokens above which dequantize + library product is used; estimates (no GPU has timed them)
CROSSOVER = {"int4": 256, "nf4": 128, "fp4": 128, "int8": 256, "int3": 64, "int2": 64}

# multiprocessors assumed where the device does not say (an H100 or H200 has 132)
MULTIPROCESSORS = 132
MAX_SPLIT = 8


def by_tokens(table: tuple[tuple[int, MatmulConfig], ...], tokens: int) -> MatmulConfig:
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
