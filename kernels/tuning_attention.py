"""Launch configurations of attention as data, by architecture and head_dim. Asks no GPU anything.

Those of sm_90 and sm_80 compile without spills (kernels/compile.py); none has been timed on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionConfig:
    """BM rows (query positions times the query heads of a KV head) by BN keys a tile."""

    bm: int
    bn: int
    warps: int
    stages: int


@dataclass(frozen=True)
class AttentionConfigs:
    """What the three kernels are launched with: dq walks over keys, dkdv over rows."""

    forward: AttentionConfig
    dq: AttentionConfig
    dkdv: AttentionConfig


# head_dim is padded to a power of two, whose entry serves where there is none of its own
_TABLE: dict[int, dict[int, AttentionConfigs]] = {
    90: {
        64: AttentionConfigs(
            AttentionConfig(128, 128, 8, 2), AttentionConfig(128, 64, 8, 2), AttentionConfig(64, 128, 8, 2)
        ),
        # under triton 3.6 forward with 128 keys a tile spills, and dkdv too (between its loops)
        128: AttentionConfigs(
            AttentionConfig(128, 64, 8, 3), AttentionConfig(128, 64, 8, 2), AttentionConfig(32, 64, 8, 2)
        ),
        96: AttentionConfigs(
            AttentionConfig(128, 64, 8, 3), AttentionConfig(128, 64, 8, 2), AttentionConfig(32, 64, 8, 2)
        ),
        256: AttentionConfigs(
            AttentionConfig(128, 32, 8, 2), AttentionConfig(32, 32, 4, 1), AttentionConfig(32, 32, 8, 1)
        ),
    },
    # sized for the 99 KiB of shared memory of sm_86 and sm_89
    80: {
        64: AttentionConfigs(
            AttentionConfig(128, 64, 8, 3), AttentionConfig(64, 32, 4, 2), AttentionConfig(32, 64, 4, 2)
        ),
        128: AttentionConfigs(
            AttentionConfig(128, 32, 8, 3), AttentionConfig(32, 32, 4, 2), AttentionConfig(32, 64, 8, 2)
        ),
        256: AttentionConfigs(
            AttentionConfig(64, 32, 8, 2), AttentionConfig(32, 32, 4, 1), AttentionConfig(32, 32, 8, 1)
        ),
    },
}
# float32 takes twice the shared memory, and no tensor core: small tiles
_FLOAT32 = AttentionConfigs(*(AttentionConfig(32, 32, 4, 1),) * 3)

# keys and values of heads that run side by side should stay in half of an L2 cache of 50 MB
SHARED_KEYS_BYTES = 24 << 20


def configs(arch: int, head_dim: int, itemsize: int) -> AttentionConfigs:
    """For a GPU of compute capability ``arch`` (90 for sm_90) and elements of ``itemsize`` bytes."""
    if itemsize > 2:
        return _FLOAT32
    table = _TABLE[90 if arch in (90, 100, 103) else 80]
    return table.get(head_dim) or table[max(64, 1 << (head_dim - 1).bit_length())]


def heads_per_group(pairs: int, keys_in_sight: int, head_dim: int, itemsize: int) -> int:
    """How many KV heads (over batch and heads) run side by side, for a row that sees ``keys_in_sight`` keys."""
    return max(1, min(pairs, SHARED_KEYS_BYTES // max(2 * keys_in_sight * head_dim * itemsize, 1)))
