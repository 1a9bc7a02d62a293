"""Grouped-query attention with a sliding window, dispatched by name.

`config._attn_implementation` names the kernel: `eager` is here, `sdpa`, `flash_attention_2`, `flex_attention`
and the rest are found in transformers' ALL_ATTENTION_FUNCTIONS, `brise` among them (attention_brise.py). A
further one is a function registered there (and in ALL_MASK_ATTENTION_FUNCTIONS, which decides what mask it is
handed); nothing here changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .linear import make_linear
from .rope import CosSin, apply_rotary, head_dim_of


def attention_mask_for(
    config: MistralConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None,
) -> Any:
    """The mask one layer is handed, in the form the configured implementation wants.

    A key is kept iff `query - config.sliding_window < key <= query` (W keys with the query's own) and it is
    not padding.

    Args:
        inputs_embeds: [B, T, D], read for its shape, dtype and device only.
        attention_mask: [B, keys], 1 = keep; or a finished mask [B, 1 or H, T, keys], returned as is; or None.
        past_key_values: the cache says how many keys, from which position on, its layers will return.
        position_ids: [B, T]; with neither mask nor cache, a jump in them means packed texts.
    Returns:
        eager: additive [B, 1, T, keys]. sdpa: boolean, True = keep, or None for "plainly causal". flash: [B,
        keys] or None. flex: a BlockMask. brise: bounds. One that registered no mask: None.
    """
    build = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
    return build(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    """[B, KV, S, head_dim] -> [B, KV * groups, S, head_dim], each KV head `groups` times in a row."""
    if groups == 1:
        return x
    batch, heads, length, width = x.shape
    return (
        x[:, :, None]
        .expand(batch, heads, groups, length, width)
        .reshape(batch, heads * groups, length, width)
    )


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out; the only implementation here that can return its weights.

    Args:
        query: [B, H, T, head_dim]; key, value: [B, KV, S, head_dim].
        attention_mask: additive in the dtype of the query, or boolean with True = keep; [B, 1 or H, T, S].
    Returns:
        context [B, T, H, head_dim], weights [B, H, T, S]; the softmax is taken in fp32.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class MistralAttention(nn.Module):
    """H query heads over KV key/value heads, H a multiple of KV; no biases."""

    def __init__(self, config: MistralConfig, layer_idx: int) -> None:
        super().__init__()
        if config.num_attention_heads % config.num_key_value_heads:
            raise ValueError(
                f"config.num_attention_heads is {config.num_attention_heads}, expected a multiple of "
                f"config.num_key_value_heads = {config.num_key_value_heads}"
            )
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = head_dim_of(config)
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width, query_width = config.hidden_size, config.num_attention_heads * self.head_dim
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = make_linear(width, query_width)
        self.k_proj = make_linear(width, key_width)
        self.v_proj = make_linear(width, key_width)
        self.o_proj = make_linear(query_width, width)

    def attend(
        self,
        hidden_states: Tensor,
        position_embeddings: CosSin,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Everything before `o_proj`: projections, rotation, cache, attention.

        Args:
            hidden_states: normed input [B, T, D].
            position_embeddings: cos and sin, each [B or 1, T, head_dim].
            attention_mask: what `attention_mask_for` returned.
            kwargs: handed on to the attention implementation.
        Returns:
            context [B, T, H * head_dim], and the weights [B, H, T, S] where the implementation has them.
        """
        batch_and_length = hidden_states.shape[:-1]
        # -1, not the head count: under tensor parallelism a rank holds only some of the heads
        heads = (*batch_and_length, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        cos, sin = position_embeddings
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, weights = implementation(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window,
            **kwargs,
        )
        return context.reshape(*batch_and_length, -1).contiguous(), weights

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: CosSin,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`attend`, then `o_proj`: [B, T, D], and the weights where there are any."""
        context, weights = self.attend(
            hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
        return self.o_proj(context), weights
