"""From the portable layout to the one the Triton kernels read, once at load, and back.

The weight is cut into tiles of 16 output by 64 input channels: the A operand of four m16 x k16 matrix
instructions. Lane (g, c) of a warp owns rows g and g + 8 and, of each 16 channels, the pairs 2c, 2c + 1 and
2c + 8, 2c + 9. With n = (tile, bhi 2, g 8) and k = (tile, ks 4, o 2, c 4, blo 2) the stored order is [n
tile, k tile, g, c, ks, o, bhi, blo], so that a lane finds its 32 codes side by side (4 bits: 16 bytes, one
128-bit load) and no code changes lanes. Codes are packed along that order, least significant bits first.
Two exceptions: int4 stores nibble o*2 + bhi + 4*blo, so that one mask yields both halves of a half2; int3
is a plane of the two low bits, then a plane of the high bit.

N is padded to 16 and K to 64 with code 0; scales and zero points are transposed to [G, N], a code a byte,
so that a tile's rows read neighbouring bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .reference import BITS, Weight

TILE_N, TILE_K = 16, 64
_PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
# rows re-ordered at a time, so that the unpacked codes of a large weight never exist at once
_ROWS = 1024


def tiles_shape(n: int, k: int) -> tuple[int, int]:
    """Tiles along N and K."""
    return -(-n // TILE_N), -(-k // TILE_K)


def tiles_bytes(fmt: str, n: int, k: int) -> int:
    """Bytes of the tiled codes."""
    rows, columns = tiles_shape(n, k)
    return rows * columns * TILE_N * TILE_K * BITS[fmt] // 8


def to_tiles(qweight: Tensor, fmt: str, n: int, k: int) -> Tensor:
    """Portable codes uint8 [N, ceil(K*b/8)] -> tiled codes, uint8 [tiles_bytes]."""
    planes: list[list[Tensor]] = [[] for _ in _PLANES[BITS[fmt]]]
    for start in range(0, n, _ROWS):
        codes = reference.unpack_codes(qweight[start : start + _ROWS], BITS[fmt], k)
        codes = torch.nn.functional.pad(codes, (0, -k % TILE_K, 0, -codes.shape[0] % TILE_N))
        tiles = codes.view(-1, 2, 8, codes.shape[1] // TILE_K, 4, 2, 4, 2).permute(0, 3, 2, 6, 4, 5, 1, 7)
        if fmt == "int4":
            tiles = tiles.permute(0, 1, 2, 3, 4, 7, 5, 6)
        tiles = tiles.reshape(-1, 32)
        shift = 0
        for plane, bits in zip(planes, _PLANES[BITS[fmt]]):
            plane.append(_pack((tiles >> shift) & ((1 << bits) - 1), bits))
            shift += bits
    return torch.cat([part for plane in planes for part in plane])


def from_tiles(tiles: Tensor, fmt: str, n: int, k: int) -> Tensor:
    """Inverse of :func:`to_tiles`."""
    rows, columns = tiles_shape(n, k)
    codes = torch.zeros(rows * columns * 32, 32, dtype=torch.uint8, device=tiles.device)
    start = shift = 0
    for bits in _PLANES[BITS[fmt]]:
        size = codes.numel() * bits // 8
        plane = tiles[start : start + size].view(-1, 1) >> (
            torch.arange(8 // bits, device=tiles.device) * bits
        ).to(torch.uint8)
        codes |= ((plane & ((1 << bits) - 1)) << shift).view(codes.shape)
        start, shift = start + size, shift + bits
    split = codes.view(rows, columns, 8, 4, 4, 2, 2, 2)
    if fmt == "int4":
        split = split.permute(0, 1, 2, 3, 4, 6, 7, 5)
    dense = split.permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(rows * TILE_N, columns * TILE_K)[:n, :k]
    return _pack_stream(dense, BITS[fmt])


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., 32] -> their bit stream uint8 [-1], ``bits`` a divisor of 8."""
    parts = codes.reshape(-1, 8 // bits)
    out = parts[:, 0].clone()
    for i in range(1, 8 // bits):
        out |= parts[:, i] << (bits * i)
    return out


def _pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [R, L] -> dense bit stream a row, uint8 [R, ceil(L*bits/8)]."""
    length = codes.shape[1]
    planes = (codes[:, :, None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    stream = torch.nn.functional.pad(planes.flatten(1), (0, -length * bits % 8))
    return _pack(stream, 1).view(codes.shape[0], -1)


def tile_weight(w: Weight) -> dict[str, Tensor]:
    """The tensors of a weight in the kernels' layout: qweight tiled, scales [G, N], zeros uint8 [G, N]."""
    n, k = w.shape
    out = {"qweight": to_tiles(w.qweight, w.format, n, k), "scales": w.scales.T.contiguous()}
    if w.zeros is not None:
        out["zeros"] = reference.unpack_codes(w.zeros, BITS[w.format], w.groups).T.contiguous()
    for name in ("scales_absmax", "scales_offset", "scales_map"):
        if (tensor := getattr(w, name)) is not None:
            out[name] = tensor
    return out


def untile_weight(tensors: dict[str, Tensor], fmt: str, shape: tuple[int, int]) -> Weight:
    """Inverse of :func:`tile_weight`, to the bit."""
    rest = {name: t for name, t in tensors.items() if name.startswith("scales_")}
    zeros = _pack_stream(tensors["zeros"].T, BITS[fmt]) if "zeros" in tensors else None
    qweight = from_tiles(tensors["qweight"], fmt, *shape)
    return Weight(fmt, shape, qweight, tensors["scales"].T.contiguous(), zeros, **rest)
