"""Launch configurations of decode attention and of the fused kernels, as data; none has been timed on a GPU yet.

How the keys are split depends on the size of the ring and of the window and on nothing else. So a row's bits depend
neither on the other rows of its batch nor on the padding before it.
"""

from __future__ import annotations

from dataclasses import dataclass

# keys of one program where there are few; 256 keys of a 4096 window are a program for each of 132 multiprocessors at
# batch 1 with 8 KV heads
CHUNK = 256
MAX_SPLITS = 32
# rows of the query tile at most; a KV head with more query rows takes several programs
MAX_ROWS = 64
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class DecodeConfig:
    """BN keys a step."""

    bn: int
    warps: int = 4
    stages: int = 3


def decode_config(head_dim: int, element_size: int, tile: int) -> DecodeConfig:
    """By the size of a key in q's dtype and the rows of the query tile: what fits the registers without spills, and
    an A100's shared memory with three steps in flight."""
    if element_size == 4:
        # fp32 has no matrix instruction: its tiles lie in registers
        return DecodeConfig(bn=16, warps=8, stages=2)
    return DecodeConfig(bn=32 if head_dim > 128 else 64, warps=4 if tile == 16 else 8)


def chunk_of(span: int) -> int:
    """Keys of one split, a multiple of every BN, when at most ``span`` keys are visible."""
    chunk = CHUNK
    while span > chunk * MAX_SPLITS:
        chunk *= 2
    return chunk


def splits_of(span: int, queries: int) -> int:
    """Splits that ``queries`` neighbouring queries can touch: chunks start at multiples from the row's start."""
    return -(-(span + queries - 1) // chunk_of(span)) + 1


def rows_of(rows: int, element_size: int) -> int:
    """Rows of the query tile for ``rows`` query heads: a power of two from 16, the narrowest matrix product, on."""
    tile = 16
    while element_size < 4 and tile < min(rows, MAX_ROWS):
        tile *= 2
    return tile


# elements of a program of the fused kernels, as a power of two
NORM_BLOCK = 8192
SWIGLU_BLOCK = 1024
ROPE_BLOCK = 512


def norm_warps(block: int) -> int:
    """16 elements a thread at most; one warp where the row is short."""
    return max(1, min(16, block // 512))
