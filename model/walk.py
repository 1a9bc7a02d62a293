"""A decoder block, one group of Linear layers at a time.

GPTQ runs each block once: it needs the input of q, k and v before they run, quantizes them, runs them as they
then are, has the input of o, and so on. The four groups are `STAGES`, in the order in which they run; between
two of them every module of the block may be replaced.

    context = walk_context(config, rotary_emb, length=T, dtype=h.dtype, device=h.device)
    walk = BlockWalk(layer, context)
    x = walk.attention_input(h)        # shared input of q, k, v
    c = walk.attend(x)                 # input of o
    h = walk.after_attention(h, c)
    x = walk.mlp_input(h)              # shared input of gate, up
    u = walk.mlp_hidden(x)             # input of down
    h = walk.after_mlp(h, u)           # equal to layer(h, ...) to the bit
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import MistralConfig

from .attention import attention_mask_for
from .blocks import MistralDecoderLayer
from .rope import CosSin, MistralRotaryEmbedding

STAGES: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Paths inside a block of the Linear layers that share an input, in the order in which they run."""


@dataclass(frozen=True)
class WalkContext:
    """What every block of a model needs besides the hidden states, the same for all windows of one length."""

    length: int
    position_embeddings: CosSin
    attention_mask: Any

    @property
    def device(self) -> torch.device:
        """Where the blocks run."""
        return self.position_embeddings[0].device


def walk_context(
    config: MistralConfig,
    rotary_emb: MistralRotaryEmbedding,
    length: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> WalkContext:
    """Positions 0..length-1, nothing padded, causal within `config.sliding_window`; serves any batch size.

    Make it once per length and keep it. Costs one [length, head_dim] pair and, where the implementation wants
    it (eager; sdpa when the window is shorter than the text), one [1, 1, length, length] mask.
    Raises:
        ValueError: `length` is not positive, or `config` names no attention implementation (a model built
            from it sets one; without, the mask would be dropped in silence).
    """
    if length < 1:
        raise ValueError(f"length is {length}, expected at least 1 token")
    if config._attn_implementation is None:
        raise ValueError(
            "config names no attention implementation; set config._attn_implementation = 'sdpa', or take the "
            "config of a model"
        )
    like = torch.empty((1, length, 0), dtype=dtype, device=device)
    positions = torch.arange(length, device=device).unsqueeze(0)
    mask = attention_mask_for(config, like, None, None, None)
    return WalkContext(length, rotary_emb(like, positions), mask)


class BlockWalk:
    """The steps of `layer.forward`, apart. Holds no state of its own: any step may be repeated.

    Shapes: hidden states [B, T, D] with T = `context.length`; F = intermediate_size; H * hd = query heads x
    head_dim.
    """

    stages = STAGES

    def __init__(self, layer: MistralDecoderLayer, context: WalkContext) -> None:
        self.layer = layer
        self.context = context

    def attention_input(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> normed [B, T, D], the input that q_proj, k_proj and v_proj share."""
        if hidden.ndim != 3 or hidden.shape[1] != self.context.length:
            raise ValueError(
                f"hidden states are {tuple(hidden.shape)}, expected [batch, {self.context.length}, width]; "
                "make a walk_context for this length"
            )
        return self.layer.input_layernorm(hidden)

    def attend(self, normed: Tensor) -> Tensor:
        """normed [B, T, D] -> context [B, T, H * hd], the input of o_proj; runs q, k and v."""
        context, _ = self.layer.self_attn.attend(
            normed, self.context.position_embeddings, self.context.attention_mask
        )
        return context

    def after_attention(self, hidden: Tensor, context: Tensor) -> Tensor:
        """hidden + o_proj(context): [B, T, D]."""
        return hidden + self.layer.self_attn.o_proj(context)

    def mlp_input(self, hidden: Tensor) -> Tensor:
        """[B, T, D] after attention -> normed [B, T, D], the input that gate_proj and up_proj share."""
        return self.layer.post_attention_layernorm(hidden)

    def mlp_hidden(self, normed: Tensor) -> Tensor:
        """normed [B, T, D] -> act(gate) * up [B, T, F], the input of down_proj."""
        return self.layer.mlp.inner(normed)

    def after_mlp(self, hidden: Tensor, inner: Tensor) -> Tensor:
        """hidden + down_proj(inner): [B, T, D], the block's output."""
        return hidden + self.layer.mlp.down_proj(inner)
