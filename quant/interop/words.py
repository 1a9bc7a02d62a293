"""32-bit words over the byte streams of :mod:`brise.quant.packing`: both are little-endian, so a view is enough."""

from __future__ import annotations

import torch
from torch import Tensor


def to_words(packed: Tensor) -> Tensor:
    """uint8 [R, B] -> int32 [R, ceil(B / 4)]; what the last word has too much is zero."""
    short = -packed.shape[-1] % 4
    padded = torch.nn.functional.pad(packed, (0, short)) if short else packed
    # flat first: a dimension of size 1 may have any stride and still count as contiguous
    return padded.reshape(-1).contiguous().view(torch.int32).view(*packed.shape[:-1], -1)


def to_bytes(words: Tensor, width: int) -> Tensor:
    """Inverse of :func:`to_words`: int32 [R, W] -> uint8 [R, width].

    Raises:
        ValueError: other than int32, or not the words that ``width`` bytes take.
    """
    if words.dtype != torch.int32 or words.shape[-1] != -(-width // 4):
        raise ValueError(
            f"expected int32 words [..., {-(-width // 4)}], got {words.dtype} {list(words.shape)}"
        )
    flat = words.reshape(-1).contiguous().view(torch.uint8)
    return flat.view(*words.shape[:-1], -1)[..., :width].contiguous()
