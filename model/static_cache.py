"""The static rolling cache: rings that are allocated once, for a batch whose rows may be anywhere in their texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ..kernels.ops import decode_attention, rope_cache_write
from .rope import head_dim_of
from .static_layer import Rows, StaticLayer


class StaticRollingCache(Cache):
    """A ring for each layer and a position for each row, all on the device; made once, never moved, never grown.

    What a CUDA graph needs: no shape, address or branch depends on how far a text has come. Two ways to use it, which
    may follow one another:

    * by the decode loop: :meth:`advance`, then for each layer :meth:`extend` (a chunk of a prompt) or :meth:`step` (the
      next token, or a few). Rows go on independently; :meth:`reset` gives a row to another text.
    * as ``past_key_values`` of any transformers model, where all rows have seen the same number of columns, padding
      included. It reads the position from the device once a forward pass.

    Args:
        config: of a decoder with one kind of attention in all layers.
        batch_size: rows.
        length: positions a row may reach. Needed where there is no sliding window; with a window it only saves memory,
            where it is the smaller one.
        spare: slots beyond the window. With S of them a :meth:`step` takes up to S + 1 tokens, and up to S of them
            can be taken back (:meth:`retract`).
        dtype: of the keys and values that come.
        int8: store codes with one fp32 scale a token and head: 1.03 bytes a value at a head of 128.

    Tensors:
        seen: int32 [B], positions written by each row, padding included.
        start: int32 [B], the first position that counts: what left padding takes.
        layers[i].keys, values: [B, KV, slots, head_dim], position p in slot p % slots;
        layers[i].key_scales, value_scales: fp32 [B, KV, slots], with int8.

    Raises:
        ValueError: no bound for the length, or attention that differs between the layers.
    """

    layers: list[StaticLayer]  # type: ignore[assignment]

    def __init__(
        self,
        config: PreTrainedConfig,
        batch_size: int,
        *,
        length: int | None = None,
        spare: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        int8: bool = False,
    ) -> None:
        config = config.get_text_config(decoder=True)
        for name, value, least in (("batch_size", batch_size, 1), ("length", length, 1), ("spare", spare, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        kinds = set(getattr(config, "layer_types", None) or ())
        if len(kinds) > 1 or kinds - {"sliding_attention", "full_attention"}:
            raise ValueError(
                f"a StaticRollingCache needs the same attention in every layer, full or sliding; config.layer_types "
                f"has {sorted(kinds)}; use a DynamicCache"
            )
        window = None if kinds == {"full_attention"} else getattr(config, "sliding_window", None)
        if window is None and length is None:
            raise ValueError("this model has no sliding window, so the cache needs a bound: give length=")
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.rows = Rows(batch_size, window, length, spare, torch.device(device))
        shape = (batch_size, heads, self.rows.slots, head_dim_of(config))  # type: ignore[arg-type]
        rings = [StaticLayer(i, self.rows, shape, dtype, int8) for i in range(config.num_hidden_layers)]
        super().__init__(layers=list(rings))

    @property
    def seen(self) -> Tensor:
        return self.rows.seen

    @property
    def start(self) -> Tensor:
        return self.rows.start

    @property
    def slots(self) -> int:
        """Positions that the ring of a row holds."""
        return self.rows.slots

    @property
    def limit(self) -> int | None:
        """Positions that a row may reach; None where the ring rolls on for ever."""
        return self.rows.limit

    @property
    def nbytes(self) -> int:
        """Bytes of everything on the device, the same from the first token on."""
        rows = self.rows.seen.nbytes + self.rows.start.nbytes + self.rows.high.nbytes
        return rows + sum(layer.nbytes for layer in self.layers)

    # the decode loop

    def advance(self, count: int | Tensor = 1) -> Tensor:
        """Count ``count`` new positions in every row -> the position of the first, int32 [B], for the layers to write.

        Where ``count`` [B] is 0 the row rests: its position is -1, and nothing is written. The caller sees to it that
        no row comes beyond :attr:`limit`; to ask the device would cost more than the step.
        """
        if isinstance(count, int):
            positions = self.rows.seen.clone()
        else:
            positions = torch.where(count > 0, self.rows.seen, -1)
        self.rows.seen += count
        return positions

    def retract(self, count: int | Tensor) -> None:
        """Take the last ``count`` positions back, [B] or of every row: of those of the last step, all but one."""
        self.rows.note_highest()
        self.rows.seen -= count

    def step(
        self,
        layer_idx: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        *,
        scale: float | None = None,
        batch_invariant: bool = False,
        impl: str = "auto",
    ) -> Tensor:
        """Rotate, write and attend: one new token a row, or up to ``spare`` + 1.

        Args:
            q: [B, T, H, D]; k, v: [B, T, KV, D]; not rotated.
            cos, sin: [B or 1, T, D], as MistralRotaryEmbedding returns them.
            positions: what :meth:`advance` returned.
        Returns:
            the context [B, T, H, D].
        """
        ring = self.layers[layer_idx]
        q, _ = rope_cache_write(q, k, v, cos, sin, positions, **ring.tensors, impl=impl)
        return self.attend(layer_idx, q, scale=scale, batch_invariant=batch_invariant, impl=impl)

    def attend(
        self,
        layer_idx: int,
        q: Tensor,
        *,
        scale: float | None = None,
        batch_invariant: bool = False,
        impl: str = "auto",
    ) -> Tensor:
        """Attention of the newest positions, which are in the ring: rotated q [B, T, H, D] -> the context."""
        rows = self.rows
        return decode_attention(
            q, **self.layers[layer_idx].tensors, seen=rows.seen, start=rows.start, window=rows.reach, scale=scale,
            impl=impl, batch_invariant=batch_invariant,
        )  # fmt: skip

    def extend(
        self,
        layer_idx: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        past: int,
        *,
        impl: str = "auto",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rotate and write a chunk of a prompt, of any length, and give back what its queries may look at.

        Args:
            q, k, v, cos, sin, positions: as for :meth:`step`.
            past: the most positions that any row had before this chunk; 0 for a first chunk, which then copies nothing.
        Returns:
            q [B, T, H, D], rotated; keys and values [B, R + T, KV, D] in the order of their positions, the chunk's own
            last, R = min(past, window - 1); and int32 [B], the first of them that counts in each row: as
            ``sliding_attention`` takes them, with ``starts``.
        """
        ring = self.layers[layer_idx]
        reach = past if self.rows.reach is None else min(past, self.rows.reach - 1)
        first = torch.where(positions < 0, 0, reach - positions + self.rows.start)
        first = first.clamp_(0, reach + k.shape[1]).to(torch.int32)
        old = ring.before(positions, reach) if reach else None
        q, k = rope_cache_write(q, k, v, cos, sin, positions, **ring.tensors, impl=impl)
        if old is not None:
            k, v = torch.cat((old[0], k), dim=1), torch.cat((old[1], v), dim=1)
        return q, k, v, first

    def pad_left(self, attention_mask: Tensor) -> None:
        """Leave the padding before each prompt out of account: ``attention_mask`` [B, T], 0 = padding, as transformers
        has it, of a batch that starts at position 0.

        Raises:
            ValueError: not one mask a row.
        """
        if attention_mask.ndim != 2 or attention_mask.shape[0] != self.rows.batch_size:
            raise ValueError(
                f"attention_mask must be [{self.rows.batch_size}, T], got {list(attention_mask.shape)}"
            )
        padding = (attention_mask != 0).cumsum(dim=1) == 0
        self.rows.start.copy_(padding.sum(dim=1))

    def reset(self, rows: Any = None) -> None:
        """Forget all rows, or only these (an int, a list, a tensor of indices or a mask [B]).

        The rings stay as they are: what lies in a slot that a row has not written since is never looked at.
        """
        for t in (self.rows.seen, self.rows.start, self.rows.high):
            t[... if rows is None else rows] = 0

    # a Cache of transformers

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions (a number <= 0, as everywhere in transformers).

        Raises:
            ValueError: the number is positive, or more than was seen.
            RuntimeError: positions that are needed again have left the ring.
        """
        self.rows.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row ``beam_idx[b]`` was, in place."""
        index = beam_idx.to(self.rows.seen.device)
        tensors = [t for layer in self.layers for t in layer.tensors.values()]
        for t in (self.rows.seen, self.rows.start, self.rows.high, *tensors):
            t.copy_(t.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse_other_batch()

    def batch_select_indices(self, indices: Tensor) -> None:
        self._refuse_other_batch()

    def _refuse_other_batch(self) -> None:
        raise ValueError(
            f"this cache was made for {self.rows.batch_size} rows and keeps them; make one of the final size, or use "
            "a RollingCache"
        )
