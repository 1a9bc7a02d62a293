"""One decoder block: pre-norm attention and a gated MLP, each beside a residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import MistralAttention
from .linear import make_linear
from .rope import CosSin


class MistralRMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467), the mean taken in fp32.

    The weight [D] multiplies after the cast back to the input's dtype: fp32 weight, fp32 output.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class MistralMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` (SwiGLU, Shazeer 2020, arXiv:2002.05202), width D -> F -> D."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.gate_proj = make_linear(config.hidden_size, config.intermediate_size)
        self.up_proj = make_linear(config.hidden_size, config.intermediate_size)
        self.down_proj = make_linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def inner(self, x: Tensor) -> Tensor:
        """The input of `down_proj`: [B, T, D] -> [B, T, F]."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.down_proj(self.inner(x))


class MistralDecoderLayer(GradientCheckpointingLayer):
    """Block `layer_idx`; `model/walk.py` takes the same steps one at a time."""

    def __init__(self, config: MistralConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = MistralAttention(config, layer_idx)
        self.mlp = MistralMLP(config)
        self.input_layernorm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: CosSin | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D].

        `position_ids` and the remaining keywords reach the attention implementation untouched (flash
        attention finds packed texts by them). Gradient checkpointing hands `past_key_values=None`, hence no
        cache of its own here.
        """
        if position_embeddings is None:
            raise ValueError(
                "a decoder layer needs position_embeddings=(cos, sin), as MistralRotaryEmbedding returns"
            )
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
