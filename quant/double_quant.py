"""Scales stored as 8-bit codes: the double quantization of QLoRA (arXiv:2305.14314, section 3), as in bitsandbytes.

The mean of all scales is subtracted, the rest is cut into blocks of 256 (row-major over the [N, G] scales), each
divided by its absmax and rounded to the nearest of 256 values of the dynamic map (arXiv:1511.04561).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256


@lru_cache(maxsize=8)
def dynamic_map(device: torch.device) -> Tensor:
    """The signed dynamic 8-bit values: fp32 [256], ascending, from -0.9930 to 1.0.

    Seven decades; the decade 10^-6 has one value a sign, each following decade twice as many, all at the middle
    of even steps from 0.1 to 1. Zero and 1.0 complete the 256.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _nearest_of_bin(device: torch.device) -> Tensor:
    """Code of each of 65536 even bins over [-1, 1]: uint8, the value nearest to the bin's middle.

    bitsandbytes' CPU library looks codes up this way (seen in version 0.50). A ratio close to the border of two
    codes may so get the farther one; checkpoints equal to the bit are worth more here than that last half bin.
    """
    table = dynamic_map(device)
    middles = torch.arange(65536, dtype=torch.float32, device=device) * (2.0 / 65535) - 1
    return torch.bucketize(middles, (table[:-1] + table[1:]) / 2).to(torch.uint8)


def quantize_scales(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 scales [N, G] -> (codes uint8 [N, G], absmax fp32 [ceil(N*G/256)], offset fp32 [1]).

    Raises:
        ValueError: the scales are so large that their mean, or a distance to it, overflows fp32.
    """
    offset = scale.mean()
    flat = (scale - offset).flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError(
            f"scales up to {float(scale.abs().max()):.3g} have a mean beyond float32: "
            "set double_quant to false"
        )
    inverse = torch.where(absmax > 0, 1.0 / absmax, 0)
    # a subnormal absmax has an infinite reciprocal, and 0 * infinity is NaN: bitsandbytes writes code 0 there
    ratio = (blocks * inverse[:, None]).flatten()[: flat.numel()].clamp_(-1, 1).nan_to_num_(nan=-1.0)
    codes = _nearest_of_bin(scale.device)[((ratio + 1) * 32767.5 + 0.5).to(torch.int32)]
    # a block without spread decodes to the offset whatever its codes; bitsandbytes writes 0
    spread = (absmax > 0).repeat_interleave(BLOCK)[: flat.numel()]
    return (codes * spread).view(scale.shape), absmax, offset.reshape(1)


def dequantize_scales(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """Inverse of :func:`quantize_scales` up to rounding: fp32 [N, G]."""
    flat = dynamic_map(codes.device)[codes.flatten().to(torch.int32)]
    per_code = absmax.repeat_interleave(BLOCK)[: flat.numel()]
    return (flat * per_code + offset).view(codes.shape)
