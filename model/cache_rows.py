"""Some rows of a static cache as a cache of their own, over the same storage."""

from __future__ import annotations

import copy

from .static_cache import StaticRollingCache
from .static_layer import Rows, StaticLayer


def rows_of(cache: StaticRollingCache, start: int, stop: int) -> StaticRollingCache:
    """Rows start .. stop - 1: what is written to either is seen in both."""
    part = copy.copy(cache)
    part.rows = _slice(cache.rows, start, stop)
    part.layers = []
    for layer in cache.layers:
        view: StaticLayer = copy.copy(layer)
        view.rows, view.batch_size = part.rows, stop - start
        for name, t in layer.tensors.items():
            setattr(view, name, t[start:stop])
        part.layers.append(view)
    return part


def _slice(rows: Rows, start: int, stop: int) -> Rows:
    part = copy.copy(rows)
    part.batch_size = stop - start
    part.seen, part.start, part.high = (t[start:stop] for t in (rows.seen, rows.start, rows.high))
    return part


def move_row(cache: StaticRollingCache, source: int, target: int) -> None:
    """Copy all that row ``source`` holds to row ``target``."""
    tensors = [t for layer in cache.layers for t in layer.tensors.values()]
    for t in (cache.rows.seen, cache.rows.start, cache.rows.high, *tensors):
        t[target].copy_(t[source])
