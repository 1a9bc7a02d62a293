"""Weights x window x cache: quality and memory of a model under other windows and a KV cache of lower precision.

The window is the model's own rule (W keys, the query's own among them) with another W. The cache is simulated: keys
(rotated, as they are stored) and values are rounded to what the cache would hold before attention reads them, so the
quality is that of such a cache, and the bytes are counted; nothing is said of its speed.

=============  ======================================================================================================
``model``      what the model computes in; nothing is rounded
``bfloat16``   16 bits. ``float16`` likewise
``float8``     e4m3, without scales, saturating at 448
``int8``       a scale and a least value in fp16 for each 64 channels of a head of a token. ``int4`` likewise
=============  ======================================================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..model.checkpoint import load_model
from .evaluate import measure_checkpoint, row_key
from .record import Row, Variant
from .scoring import Predictions, score
from .setting import Setting, without_timing

Progress = Callable[[str, int, int], None]
GROUP = 64
_BITS = {"bfloat16": 16, "float16": 16, "float8": 8, "int8": 8, "int4": 4}
PRECISIONS = ("model", *_BITS)


class RoundedCache(DynamicCache):
    """A cache that gives back what one of lower precision would hold."""

    def __init__(self, precision: str, config: Any) -> None:
        super().__init__(config=config)
        self.precision = precision

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Round [B, KV, T, head_dim], keep them, and return all that attention may read."""
        keys, values = (round_states(states, self.precision) for states in (key_states, value_states))
        out: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return out


def round_states(states: Tensor, precision: str) -> Tensor:
    """States [..., head_dim] as a cache of ``precision`` gives them back, in their own dtype.

    Raises:
        ValueError: a precision that is none of :data:`PRECISIONS`.
    """
    if precision == "model":
        return states
    if precision in ("bfloat16", "float16"):
        return states.to(getattr(torch, precision)).to(states.dtype)
    if precision == "float8":
        return states.clamp(-448, 448).to(torch.float8_e4m3fn).to(states.dtype)
    if precision not in _BITS:
        raise ValueError(f"expected a cache of {', '.join(PRECISIONS)}, got {precision!r}")
    steps = 2 ** _BITS[precision] - 1
    parts = []
    for group in states.float().split(GROUP, dim=-1):
        low = group.amin(-1, keepdim=True).half().float()
        scale = ((group.amax(-1, keepdim=True) - low) / steps).half().float()
        # a group of one value, or of steps below fp16's least, is its least value
        codes = ((group - low) / scale.where(scale > 0, torch.ones_like(scale))).round().clamp(0, steps)
        parts.append(low + codes * scale)
    return torch.cat(parts, dim=-1).to(states.dtype)


def variant_bytes(config: Any, length: int, precision: str, dtype: torch.dtype, window: int | None) -> int:
    """Bytes of the cache of one text of ``length`` tokens, scales included; ``window`` None is the config's own."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own = config.sliding_window if window is None else window
    held = length if own is None else min(length, own)
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads * held
    if precision == "model":
        return int(heads * width * dtype.itemsize)
    scales = 4 * -(-width // GROUP) if precision.startswith("int") else 0
    return int(heads * (width * _BITS[precision] // 8 + scales))


def set_window(model: nn.Module, window: int | None) -> None:
    """Give a model of ours in memory another sliding window."""
    for module in [model, *model.modules()]:
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "sliding_window"):
            config.sliding_window = window


def measure_surface(
    folder: Path,
    setting: Setting,
    baseline: Predictions | None,
    windows: Sequence[int | None],
    precisions: Sequence[str],
    *,
    name: str | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Rows of one checkpoint under every window and every precision of the cache.

    Args:
        windows: None is the model's own.
        baseline: what all are compared with: the unquantized model with its own window and cache.

    Raises:
        ValueError: a window below 1, or no such precision.
    """
    for precision in precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"expected a cache of {', '.join(PRECISIONS)}, got {precision!r}")
    if any(window is not None and window < 1 for window in windows):
        raise ValueError(f"expected windows of at least 1 token, got {list(windows)}")
    plain = measure_checkpoint(folder, without_timing(setting), baseline, name=name)
    model = load_model(folder, dtype=setting.dtype, device=str(setting.device))
    own = model.config.sliding_window
    rows = []
    for window in windows:
        set_window(model, own if window is None else window)
        for precision in precisions:
            rows.append(_row(plain, model, setting, baseline, window, precision))
            if progress is not None:
                progress("surface", len(rows), len(windows) * len(precisions))
    return rows


def _row(
    plain: Row,
    model: Any,
    setting: Setting,
    baseline: Predictions | None,
    window: int | None,
    precision: str,
) -> Row:
    cache = None if precision == "model" else lambda: RoundedCache(precision, model.config)
    scores = score(model, setting.windows, baseline, batch=setting.batch, cache=cache)
    length = plain.protocol.length
    size = variant_bytes(model.config, length, precision, setting.dtype, None)
    return dataclasses.replace(
        plain,
        key=row_key(plain.protocol, plain.key, window, precision),
        name=f"{plain.name} w={window or 'own'} kv={precision}",
        perplexity=scores.perplexity,
        relative=scores.relative,
        divergence=scores.divergence,
        words=scores.words,
        sums=scores.sums,
        memory=dataclasses.replace(plain.memory, kv_cache=size),
        variant=Variant(window, precision, size),
    )
