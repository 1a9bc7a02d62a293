"""Bit order, defined once: codes of b bits form a dense little-endian bit stream along the last axis.

Code ``i`` of a row occupies bits ``i*b .. i*b + b - 1`` of that row's stream, least significant first; byte ``j``
holds stream bits ``8j .. 8j + 7``. For 4 bits the even code is therefore the low nibble, and 3-bit codes
straddle bytes with no padding between them. Every row starts on a byte of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., L] below ``2**bits`` into uint8 bytes [..., ceil(L * bits / 8)].

    Raises:
        TypeError: the codes are not uint8.
        ValueError: ``bits`` is outside 1..8, or a code needs more bits than that.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    if bits == 8:
        return codes.contiguous()
    count = codes.shape[-1]
    per_byte = 8 // bits
    if 8 % bits == 0:
        codes = _pad_to(codes, per_byte)
        out = codes[..., 0::per_byte].clone()
        for i in range(1, per_byte):
            out |= codes[..., i::per_byte] << (bits * i)
        return out
    # 8 codes of b bits fill exactly b bytes, for any b
    eights = _pad_to(codes, 8).unflatten(-1, (-1, 8)).to(torch.int64)
    words = (eights << (torch.arange(8, device=codes.device) * bits)).sum(-1, keepdim=True)
    packed = (words >> (torch.arange(bits, device=codes.device) * 8)) & 0xFF
    return packed.to(torch.uint8).flatten(-2)[..., : packed_width(count, bits)].contiguous()


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_codes`: uint8 [..., ceil(count * bits / 8)] -> uint8 codes [..., count].

    Raises:
        TypeError: ``packed`` is not uint8.
        ValueError: its last axis is not what ``count`` codes of ``bits`` bits take.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed codes must be uint8, got {packed.dtype}")
    if packed.shape[-1] != packed_width(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_width(count, bits)} bytes a row, got {packed.shape[-1]}"
        )
    if bits == 8:
        return packed
    if 8 % bits == 0:
        per_byte, mask = 8 // bits, (1 << bits) - 1
        out = packed.new_empty((*packed.shape[:-1], packed.shape[-1] * per_byte))
        for i in range(per_byte):
            out[..., i::per_byte] = (packed >> (bits * i)) & mask
        return out[..., :count]
    groups = _pad_to(packed, bits).unflatten(-1, (-1, bits)).to(torch.int64)
    words = (groups << (torch.arange(bits, device=packed.device) * 8)).sum(-1, keepdim=True)
    codes = (words >> (torch.arange(8, device=packed.device) * bits)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count].contiguous()


def _pad_to(x: Tensor, multiple: int) -> Tensor:
    short = -x.shape[-1] % multiple
    return torch.nn.functional.pad(x, (0, short)) if short else x


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1..8, got {bits}")
