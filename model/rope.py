"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): dimension i turns with i + head_dim / 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

CosSin = tuple[Tensor, Tensor]


class MistralRotaryEmbedding(nn.Module):
    """Angles of the rotation, for every type of `config.rope_parameters` that transformers knows.

    Buffers, none of them saved: `inv_freq` [head_dim / 2], fp32, and `original_inv_freq`, the same before any
    rescaling by the length (types `dynamic` and `longrope`). transformers recomputes both, by these names,
    after a load through the meta device.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.config = config
        # read by transformers' length-dependent types
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type: str = rope_parameters_of(config)["rope_type"]
        if self.rope_type != "default" and self.rope_type not in ROPE_INIT_FUNCTIONS:
            known = ["default", *sorted(ROPE_INIT_FUNCTIONS)]
            raise ValueError(
                f"config.rope_parameters['rope_type'] is {self.rope_type!r}, expected one of {known}; "
                "correct it in config.json"
            )
        frequencies: Callable[[MistralConfig], tuple[Tensor, float]] = (
            self.compute_default_rope_parameters
            if self.rope_type == "default"
            else ROPE_INIT_FUNCTIONS[self.rope_type]
        )
        inv_freq, self.attention_scaling = frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MistralConfig, **_: object) -> tuple[Tensor, float]:
        """Unscaled RoPE: `theta ** (-2 i / head_dim)` for each pair i, and the factor 1 on cos and sin."""
        head_dim = head_dim_of(config)
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return 1.0 / (rope_parameters_of(config)["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> CosSin:
        """Cosine and sine, each [B, T, head_dim] in the dtype of `x`, at `position_ids` [B, T].

        `x` gives only dtype and device. Angles are taken in fp32: bf16 cannot tell positions past 256 apart.
        """
        inv_freq = self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def head_dim_of(config: MistralConfig) -> int:
    """Width of one attention head: `config.head_dim`, by default hidden_size / num_attention_heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_parameters_of(config: MistralConfig) -> dict[str, Any]:
    """`config.rope_parameters`, which transformers fills in for every configuration it makes."""
    if config.rope_parameters is None:
        raise ValueError("config.rope_parameters is None, expected at least rope_type and rope_theta")
    return dict(config.rope_parameters)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads `x` [B, H, T, head_dim] by `cos` and `sin`, each [B or 1, T, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
