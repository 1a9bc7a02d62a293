"""One layer of the static rolling cache, and the positions that all its layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..kernels.decode_reference import dequantize
from ..kernels.fused_reference import quantize


class Rows:
    """How far each row has come, and what that means for rings of this size.

    seen, start: see StaticRollingCache. high: int32 [B], the most positions that a row had when some were taken back;
    what they overwrote is gone.
    """

    def __init__(
        self, batch_size: int, window: int | None, length: int | None, spare: int, device: torch.device
    ) -> None:
        if window is not None and window < 1:
            raise ValueError(f"sliding_window is {window}, expected at least 1")
        rolls = window is not None and (length is None or length > window)
        self.batch_size = batch_size
        self.window = window
        # the window that a ring has to cut out; a text that ends before it needs none
        self.reach = window if rolls else None
        self.limit = None if rolls else length
        self.slots: int = window + spare if rolls else length  # type: ignore[assignment, operator]
        self.seen, self.start, self.high = torch.zeros(3, batch_size, dtype=torch.int32, device=device)
        self.before = 0

    def note_highest(self) -> None:
        torch.maximum(self.high, self.seen, out=self.high)

    def count(self) -> int:
        """Positions seen, where all rows agree; asks the device.

        Raises:
            ValueError: they do not.
        """
        counts = self.seen.tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"the rows have seen {counts} positions; transformers counts one number for all, so rows of different "
                "lengths go by advance(), extend() and step()"
            )
        return counts[0]

    def begin(self, new: int) -> None:
        """A forward pass of transformers that brings ``new`` positions; its first layer counts them for all."""
        self.before = self.count()
        if self.limit is not None and self.before + new > self.limit:
            raise ValueError(
                f"{new} positions after {self.before} go beyond the {self.limit} that this cache was made for; "
                "make it with a larger length="
            )
        self.seen += new

    def crop(self, tokens_to_remove: int) -> None:
        seen = self.count()
        if not -seen <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop({tokens_to_remove}): expected 0 or a negative number of at most the {seen} positions seen"
            )
        length = seen + tokens_to_remove
        oldest = max(seen, int(self.high.max())) - self.slots
        needed = 0 if self.reach is None else max(length - self.reach + 1, 0)
        if needed < oldest:
            raise RuntimeError(
                f"crop({tokens_to_remove}): positions from {needed} on are needed again, but the ring of {self.slots} "
                f"starts at {oldest}; make the cache with spare={self.slots - (self.reach or 0) + oldest - needed}"
            )
        self.note_highest()
        self.seen += tokens_to_remove


class StaticLayer(CacheLayerMixin):
    """The ring of one layer: keys, values [B, KV, slots, head_dim], with int8 also their scales."""

    # positions are counted on the device, but transformers is told them as Python ints
    is_compileable = False
    is_croppable = True

    keys: Tensor
    values: Tensor

    def __init__(
        self, index: int, rows: Rows, shape: tuple[int, int, int, int], dtype: torch.dtype, int8: bool
    ) -> None:
        super().__init__()
        device = rows.seen.device
        self.index, self.rows = index, rows
        self.dtype, self.device = dtype, device
        self.batch_size = shape[0]
        self.is_sliding = rows.window is not None
        stored = torch.int8 if int8 else dtype
        # zeros, not empty: what was never written must still be a number
        self.keys, self.values = (torch.zeros(shape, dtype=stored, device=device) for _ in range(2))
        self.key_scales, self.value_scales = (
            torch.zeros(shape[:3], dtype=torch.float32, device=device) if int8 else None for _ in range(2)
        )
        self.is_initialized = True

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the ring, by the names that the kernels give them."""
        names = ("keys", "values", "key_scales", "value_scales")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def before(self, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, count, KV, head_dim] of the ``count`` positions before ``positions`` [B], in order.

        What lies before position 0 is something finite.
        """
        steps = torch.arange(-count, 0, device=positions.device)
        slot = (positions.long()[:, None] + steps) % self.rows.slots
        row = torch.arange(slot.shape[0], device=slot.device)[:, None]
        found = []
        for ring, scales in ((self.keys, self.key_scales), (self.values, self.value_scales)):
            found.append(
                dequantize(ring[row, :, slot], None if scales is None else scales[row, :, slot], self.dtype)
            )
        return found[0], found[1]

    # a cache layer of transformers

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: check that states [B, KV, any, head_dim] are what the ring was made for."""
        shape = self.keys.shape
        for states in (key_states, value_states):
            if (*states.shape[:2], states.shape[3]) != (*shape[:2], shape[3]) or states.dtype != self.dtype:
                raise ValueError(
                    f"the ring was made for [{shape[0]}, {shape[1]}, any, {shape[3]}] (batch, heads, positions, "
                    f"head_dim) in {self.dtype}, got {list(states.shape)} in {states.dtype}; make a new cache"
                )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in T new positions of every row.

        Args:
            key_states, value_states: [B, KV, T, head_dim], T of any size, also longer than the window.
        Returns:
            keys and values [B, KV, min(seen, window - 1) + T, head_dim] in the order of their positions, the new ones
            last and as they came. Never views of the ring.
        Raises:
            ValueError: other shapes or another dtype than the ring's, rows of different lengths, or more positions than
                the cache was made for.
        """
        self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        if self.index == 0:
            self.rows.begin(new)
        seen = self.rows.before
        reach = self._reach(seen)
        out = []
        rings = ((self.keys, self.key_scales, key_states), (self.values, self.value_scales, value_states))
        for ring, scales, states in rings:
            old = [dequantize(part, s, self.dtype) for part, s in _span(ring, scales, seen - reach, reach)]
            out.append(torch.cat((*old, states), dim=2) if old else states)
        with torch.no_grad():
            for ring, scales, states in rings:
                kept = states[:, :, max(0, new - self.rows.slots) :]
                _write(ring, scales, seen + new - kept.shape[2], kept)
        return out[0], out[1]

    def _reach(self, seen: int) -> int:
        return seen if self.rows.window is None else min(seen, self.rows.window - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys an update of ``query_length`` tokens would return, and the position of the first."""
        seen = self.rows.count()
        reach = self._reach(seen)
        return reach + query_length, seen - reach

    def get_seq_length(self) -> int:
        """Positions seen, which goes on counting when the ring is full."""
        return self.rows.count()

    def get_max_length(self) -> int:
        """Positions held at most."""
        return self.rows.slots if self.rows.reach is None else self.rows.reach


def _span(ring: Tensor, scales: Tensor | None, start: int, count: int) -> list[tuple[Tensor, Tensor | None]]:
    """Positions start .. start+count-1 of a ring [B, KV, W, head_dim], count <= W, as views, in order."""
    slots = ring.shape[2]
    first = start % slots
    spans = [(first, min(first + count, slots)), (0, first + count - slots)]
    return [(ring[:, :, a:b], None if scales is None else scales[:, :, a:b]) for a, b in spans if b > a]


def _write(ring: Tensor, scales: Tensor | None, start: int, states: Tensor) -> None:
    """``states`` [B, KV, count, head_dim], count <= W, into positions start .. start+count-1."""
    done = 0
    for part, part_scales in _span(ring, scales, start, states.shape[2]):
        now = states[:, :, done : done + part.shape[2]]
        done += part.shape[2]
        if part_scales is None:
            part.copy_(now)
        else:
            codes, scale = quantize(now)
            part.copy_(codes)
            part_scales.copy_(scale)
