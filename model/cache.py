"""The rolling cache: keys and values of the last W positions, W the sliding window, and never more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin


class RollingLayer(CacheLayerMixin):
    """One layer's ring of W slots; position p lives in slot `p % W`.

    Tensors, allocated at the first update and kept from then on:
        keys, values: [B, KV, W, head_dim], in the dtype of the states. Keys come rotated by their absolute
            position, so nothing but `cumulative_length`, the positions seen, says what a slot holds.

    A query at position p needs the keys p-W+1 .. p, so a full ring holds one position more than the next
    query needs, and the last token can be taken back. To take back more (assisted generation rolls back the
    tokens it rejects), `activate_past_recording` keeps what is pushed out of the ring until the next `crop`.

    The ring is always written in place; gradients go through it.
    """

    is_sliding = True
    is_croppable = True
    # positions are counted in a Python int, and the keys returned grow until the window is full
    is_compileable = False

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, sliding_window: int) -> None:
        super().__init__()
        if sliding_window < 1:
            raise ValueError(f"sliding_window is {sliding_window}, expected at least 1")
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False
        self._oldest = 0  # lowest position the ring still holds
        self._evicted: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the ring for states like these: [B, KV, any, head_dim], their dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = _ring(key_states, self.sliding_window)
        self.values = _ring(value_states, self.sliding_window)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in T new positions.

        Args:
            key_states, value_states: [B, KV, T, head_dim], T of any size, also longer than the window.
        Returns:
            keys and values [B, KV, min(seen, W - 1) + T, head_dim] in the order of their positions, the new
            ones last: all that any of the T queries may look at, as `get_mask_sizes` said. Never views of
            the ring.
        Raises:
            ValueError: the batch, the heads or their width changed.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states)
        new, seen = key_states.shape[-2], self.cumulative_length
        reach = min(seen, self.sliding_window - 1)
        old_keys, old_values = self._states()
        full = (
            _join(*_span(old_keys, seen - reach, reach), key_states),
            _join(*_span(old_values, seen - reach, reach), value_states),
        )
        oldest = max(self._oldest, seen + new - self.sliding_window)
        if self.record_past:
            self._keep_evicted(key_states, value_states, oldest)
        else:
            self._evicted = None
        start = max(seen, oldest)
        self.keys = _write(old_keys, start, key_states[..., start - seen :, :])
        self.values = _write(old_values, start, value_states[..., start - seen :, :])
        self.cumulative_length, self._oldest = seen + new, oldest
        return full

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys an update of `query_length` tokens would return, and the position of the first."""
        reach = min(self.cumulative_length, self.sliding_window - 1)
        return reach + query_length, self.cumulative_length - reach

    def get_seq_length(self) -> int:
        """Positions seen, which goes on counting when the ring is full."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """Positions held at most: the window."""
        return self.sliding_window

    def activate_past_recording(self) -> None:
        """From now on keep what leaves the ring until the next `crop`, so that `crop` can bring it back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions (a number <= 0, as everywhere in transformers).

        Raises:
            ValueError: the number is positive, or more than was seen.
            RuntimeError: positions that are needed again have left the ring and were not recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): expected 0 or a negative number, the tokens to take off the end"
            )
        count, seen = -tokens_to_remove, self.cumulative_length
        if count > seen:
            raise ValueError(f"crop({tokens_to_remove}): the cache holds only {seen} positions")
        if not self.is_initialized:
            return
        length = seen - count
        needed = max(length - self.sliding_window + 1, 0)
        recorded = 0 if self._evicted is None else self._evicted[0].shape[-2]
        if needed < self._oldest - recorded:
            raise RuntimeError(
                f"crop({tokens_to_remove}): positions from {needed} on are needed again, but the ring of "
                f"{self.sliding_window} starts at {self._oldest}, and {recorded} before it were recorded; "
                "call activate_past_recording() before generating, or use a DynamicCache"
            )
        # one position more than is needed, where it is there, so that the ring is as full as it was
        oldest = max(min(length - self.sliding_window, self._oldest), self._oldest - recorded, 0)
        if self._evicted is not None and oldest < self._oldest:
            first = recorded - (self._oldest - oldest)
            until = first + min(self._oldest, length) - oldest
            keys, values = self._states()
            self.keys = _write(keys, oldest, self._evicted[0][..., first:until, :])
            self.values = _write(values, oldest, self._evicted[1][..., first:until, :])
        self.cumulative_length, self._oldest = length, oldest
        self._evicted = None

    def reset(self) -> None:
        """Forget everything, keep the allocation."""
        if self.is_initialized:
            # detached: the graph of what was forgotten must not be reached from what comes
            self.keys, self.values = (ring.detach().zero_() for ring in self._states())
        self.cumulative_length, self._oldest, self._evicted = 0, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order; a boolean mask [B] keeps the rows where it is True."""
        self._map(lambda x: x[indices.to(x.device)])

    def _states(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _map(self, function: Any) -> None:
        if not self.is_initialized:
            return
        keys, values = self._states()
        self.keys, self.values = function(keys), function(values)
        if self._evicted is not None:
            self._evicted = function(self._evicted[0]), function(self._evicted[1])

    def _check(self, key_states: Tensor) -> None:
        ring = self._states()[0]
        if ring.shape[:2] != key_states.shape[:2] or ring.shape[-1] != key_states.shape[-1]:
            raise ValueError(
                f"the ring was made for [{ring.shape[0]}, {ring.shape[1]}, any, {ring.shape[-1]}] "
                f"(batch, heads, positions, head_dim), got {list(key_states.shape)}; make a new RollingCache"
            )

    def _keep_evicted(self, key_states: Tensor, value_states: Tensor, oldest: int) -> None:
        """Before new states are written: note the positions that will be gone, those below `oldest`."""
        seen = self.cumulative_length
        from_ring = min(oldest, seen) - self._oldest
        from_new = max(oldest - seen, 0)
        gone = []
        for i, (ring, states) in enumerate(zip(self._states(), (key_states, value_states))):
            before = () if self._evicted is None else (self._evicted[i],)
            gone.append(_join(*before, *_span(ring, self._oldest, from_ring), states[..., :from_new, :]))
        self._evicted = gone[0], gone[1]


class RollingCache(Cache):
    """A ring of `config.sliding_window` positions for each layer, to be passed as `past_key_values`.

    Same logits as a full cache, to rounding; memory is `nbytes` from the first token on, however long the
    text. Works wherever transformers takes a Cache: padding on either side, prefill in chunks of any length,
    beams, assisted generation.

    Raises:
        ValueError: the configuration has no sliding window, or not the same one in every layer.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        config = config.get_text_config(decoder=True)
        window = getattr(config, "sliding_window", None)
        if window is None:
            raise ValueError(
                "a RollingCache needs config.sliding_window, which is None: every position stays visible, so "
                "nothing may roll off; use a DynamicCache or a StaticCache"
            )
        kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
        if kinds != {"sliding_attention"}:
            raise ValueError(
                f"a RollingCache needs sliding attention in every layer, config.layer_types has "
                f"{sorted(kinds)}; use a DynamicCache"
            )
        self.rings = [RollingLayer(window) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=list(self.rings))

    @property
    def nbytes(self) -> int:
        """Bytes of all rings; 0 before the first update."""
        return sum(x.nbytes for ring in self.rings for x in (ring.keys, ring.values) if x is not None)


def _ring(states: Tensor, window: int) -> Tensor:
    batch, heads, _, width = states.shape
    return states.new_zeros((batch, heads, window, width))


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]


def _span(ring: Tensor, start: int, count: int) -> tuple[Tensor, ...]:
    """Positions start .. start+count-1 of a ring [B, KV, W, head_dim], count <= W, as views, in order."""
    window = ring.shape[-2]
    first = start % window
    parts = (ring[..., first : first + count, :], ring[..., : max(first + count - window, 0), :])
    return tuple(part for part in parts if part.shape[-2])


def _write(ring: Tensor, start: int, states: Tensor) -> Tensor:
    """The ring with `states` [B, KV, count, head_dim], count <= W, at positions start .. start+count-1."""
    window, count = ring.shape[-2], states.shape[-2]
    first = start % window
    until_end = min(count, window - first)
    ring[..., first : first + until_end, :] = states[..., :until_end, :]
    ring[..., : count - until_end, :] = states[..., until_end:, :]
    return ring
