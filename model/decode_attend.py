"""The three ways in which the decode loop attends, each made once a forward pass and asked once a layer.

* a chunk of a prompt: :class:`ChunkAttention`, and of several, :class:`PackedAttention`;
* the newest token of each row, or a few, by the ops of kernels/: :class:`StepAttention`;
* the same on a CPU with floating-point rings, where the cost of calling operators would be a good part of the step:
  :class:`LeanAttention`. What is the same in all layers is worked out once, and a layer takes eight operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..kernels.attention_ops import sliding_attention
from ..kernels.decode_ops import decode_attention
from ..kernels.decode_reference import visible
from .rope import CosSin
from .static_cache import StaticRollingCache


class Attention(Protocol):
    """Rotation, cache and attention of layer ``i``."""

    def __call__(self, i: int, qkv: Tensor) -> Tensor:
        """qkv [B, T, (H + 2 KV) * head_dim], not rotated -> context [B, T, H * head_dim]."""
        ...


class Heads:
    """How one row of qkv is cut: ``queries`` heads, then ``groups`` heads of keys, then of values, each ``width``."""

    def __init__(self, queries: int, groups: int, width: int) -> None:
        self.queries, self.groups, self.width = queries, groups, width

    def cut(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, H, head_dim] and twice [B, T, KV, head_dim], views."""
        heads = qkv.unflatten(-1, (-1, self.width))
        return heads.split([self.queries, self.groups, self.groups], dim=2)  # type: ignore[return-value]


class ChunkAttention:
    """A chunk of a prompt, whose rows have ``past`` positions already."""

    def __init__(
        self, cache: StaticRollingCache, heads: Heads, turn: CosSin, positions: Tensor, past: int
    ) -> None:
        self.cache, self.heads, self.turn = cache, heads, turn
        self.positions, self.past = positions, past

    def __call__(self, i: int, qkv: Tensor) -> Tensor:
        q, k, v = self.heads.cut(qkv)
        q, keys, values, _ = self.cache.extend(i, q, k, v, *self.turn, self.positions, self.past)
        window = self.cache.rows.reach
        if q.is_cpu and self.past == 0 and (window is None or q.shape[1] <= window):
            # torch's own is faster where it can be had: it knows no window, and no keys before the first query
            found = nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                is_causal=True,
                enable_gqa=True,
            )
            return found.transpose(1, 2).flatten(2)
        return sliding_attention(q, keys, values, window=window).flatten(2)


class PackedAttention:
    """Chunks of several prompts one after the other, ``lengths`` tokens each."""

    def __init__(self, parts: Sequence[ChunkAttention], lengths: Sequence[int]) -> None:
        self.parts, self.lengths = parts, list(lengths)

    def __call__(self, i: int, qkv: Tensor) -> Tensor:
        """qkv [1, sum of the lengths, ...]."""
        cut = qkv.split(self.lengths, dim=1)
        return torch.cat([part(i, piece) for part, piece in zip(self.parts, cut)], dim=1)


class StepAttention:
    """The newest tokens by the ops; ``positions`` [B], -1 for rows that rest."""

    def __init__(
        self, cache: StaticRollingCache, heads: Heads, turn: CosSin, positions: Tensor, invariant: bool
    ) -> None:
        self.cache, self.heads, self.turn = cache, heads, turn
        self.positions, self.invariant = positions, invariant

    def __call__(self, i: int, qkv: Tensor) -> Tensor:
        q, k, v = self.heads.cut(qkv)
        context = self.cache.step(i, q, k, v, *self.turn, self.positions, batch_invariant=self.invariant)
        return context.flatten(2)


class LeanAttention:
    """The newest tokens on a CPU; the cache has counted them (``advance``)."""

    def __init__(self, cache: StaticRollingCache, heads: Heads, turn: CosSin, positions: Tensor) -> None:
        self.cache, self.heads = cache, heads
        cos, sin = turn
        half = heads.width // 2
        self.tokens = cos.shape[1]
        # [B, T, 1, head_dim]; turning by half the width brings the second half in front, which takes the minus
        self.cos = cos[:, :, None]
        self.sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)[:, :, None]
        self._place(positions)

    def _place(self, positions: Tensor) -> None:
        rows, slots = self.cache.rows, self.cache.slots
        seen = rows.seen.tolist()
        first = positions.tolist()
        self.used = max(1, min(slots, max(seen)))
        self.slot: int | None = None
        if self.tokens == 1 and min(first) >= 0 and len({p % slots for p in first}) == 1:
            self.slot = first[0] % slots
        else:
            at = positions.long()[:, None] + torch.arange(self.tokens)
            writes = (positions >= 0)[:, None].expand_as(at)
            self.row, token = writes.nonzero(as_tuple=True)
            self.token, self.at = token, at[self.row, token] % slots
        alike = all(count == self.used for count in seen) or min(seen) >= slots == self.used
        self.mask: Tensor | None = None
        if not (alike and self.tokens == 1 and (rows.reach is None or rows.reach >= self.used)):
            mask = visible(rows.seen, None, slots, self.tokens, rows.reach)[:, :, : self.used]
            # a row that rests sees nothing, and its softmax would be nan
            mask = mask | ~mask.any(-1, keepdim=True)
            group = self.heads.queries // self.heads.groups
            self.mask = mask[:, None, :, None].expand(-1, 1, -1, group, -1).flatten(2, 3)

    def __call__(self, i: int, qkv: Tensor) -> Tensor:
        h, layer = self.heads, self.cache.layers[i]
        batch, tokens, _ = qkv.shape
        heads = qkv.view(batch, tokens, -1, h.width)
        turning = heads[:, :, : h.queries + h.groups]
        turned = torch.addcmul(turning * self.cos, turning.roll(h.width // 2, -1), self.sin)
        keys, values = turned[:, :, h.queries :], heads[:, :, h.queries + h.groups :]
        if self.slot is not None:
            layer.keys.select(2, self.slot).copy_(keys[:, 0])
            layer.values.select(2, self.slot).copy_(values[:, 0])
        else:
            layer.keys[self.row, :, self.at] = keys[self.row, self.token]
            layer.values[self.row, :, self.at] = values[self.row, self.token]
        # [B, KV, T * G, head_dim]: the query heads of a KV head side by side
        q = turned[:, :, : h.queries].view(batch, tokens, h.groups, -1, h.width).transpose(1, 2).flatten(2, 3)
        found = nn.functional.scaled_dot_product_attention(
            q, layer.keys[:, :, : self.used], layer.values[:, :, : self.used], attn_mask=self.mask
        )
        if self.mask is not None and torch.isnan(found.sum()):
            # zero times nan: a slot that is hidden, as that of a draft which broke, must be left out
            seen, reach = self.cache.rows.seen, self.cache.rows.reach
            apart = decode_attention(
                turned[:, :, : h.queries], layer.keys, layer.values, seen, window=reach, batch_invariant=True
            )
            return apart.flatten(2)
        return found.view(batch, h.groups, tokens, -1, h.width).transpose(1, 2).reshape(batch, tokens, -1)
