"""Tensors that a job copies as they are, looked at on the way: whatever is wrong with one is said, as of any weight."""

from __future__ import annotations

import torch

from .shards import ShardFiles
from .source import Source
from .trouble import Policy, in_words, look_at, nonfinite_weights

_PIECE = 1 << 24


def copy_tensor(source: Source, shards: ShardFiles, name: str, policy: Policy) -> str | None:
    """Copy a tensor piece by piece; returns what is wrong with it in words, None where nothing is.

    A bias of zeros is a good one; of a weight it is said.

    Raises:
        TroubleError: something is wrong with it, and the policy is to fail.
    """
    dtype, shape = source.info(name)
    count = shape[0] if shape else 1
    if not torch.Size(shape).numel():
        return None
    width = torch.Size(shape).numel() // count * dtype.itemsize
    rows = max(1, _PIECE // width)
    infinite, zero = 0, name.endswith(".weight")
    for start in range(0, count, rows):
        piece = source.rows(name, start, min(start + rows, count)).to(dtype)
        kind = look_at(piece) if dtype.is_floating_point else None
        infinite += nonfinite_weights(piece) if kind == "nonfinite" else 0
        zero = zero and kind == "zero"
        data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
        shards.write(name, data, start * width)
    found = "nonfinite" if infinite else "zero" if zero else None
    if found is None:
        return None
    words = in_words(found, infinite)
    policy.decide(name.removesuffix(".weight"), found, words)
    return words
