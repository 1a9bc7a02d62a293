"""What attention accepts: every wrong shape, dtype, device or value is an error that carries it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import FLOATS, has_triton, hold, same_device

MAX_HEAD_DIM = 256  # of the Triton kernels
MAX_GROUPS = 32  # query heads a KV head: the rows of their narrowest tile
_MOST = 2**31 - 1


def check_states(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, S, H, D], k and v [B, T, KV, D], one dtype, one device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [batch, positions, heads, head_dim], got {list(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"q is {q.dtype}, {name} is {x.dtype}: cast them to one dtype")
        if x.device != q.device:
            raise ValueError(f"q is on {q.device}, {name} on {x.device}: move them together")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must agree in batch and head_dim, got {list(q.shape)} and {list(k.shape)} "
            "(batch, positions, heads, head_dim)"
        )
    if k.shape[2] < 1 or q.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"the heads of q must be a multiple of k's, got {q.shape[2]} and {k.shape[2]}")
    if q.shape[3] < 1:
        raise ValueError(f"head_dim must be at least 1, got {list(q.shape)}")
    if max(q.shape[1], k.shape[1]) > _MOST // 2:
        raise ValueError(f"at most {_MOST // 2} positions, got {q.shape[1]} queries and {k.shape[1]} keys")


def check_options(window: int, causal: bool, scale: float, impl: str) -> None:
    """window 0 stands for none here."""
    if window < 0:
        raise ValueError(f"window must be at least 1 (the query's own key), or None, got {window}")
    if window and not causal:
        raise ValueError(
            f"a window of {window} counts back from the query, so it needs causal=True; for both directions give bounds"
        )
    if not (0 < scale < math.inf):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl must be auto, reference or triton, got {impl!r}")


def check_offset(offset: int) -> None:
    """The kernels add it to positions in 32 bits."""
    if abs(offset) > _MOST // 2:
        raise ValueError(f"offset must lie within {_MOST // 2} of 0, got {offset}")


def check_bounds(bounds: Tensor, q: Tensor) -> None:
    """int32 [B or 1, 2, S]. Whether they lie in 0 .. T is asked where they are given: see check_ends_of_bounds."""
    # said where it is needed: in a compiled graph it would tie the graph to these sizes
    if bounds.dtype != torch.int32:
        raise TypeError(f"bounds must be int32 {_expected(q)}, got {bounds.dtype} {list(bounds.shape)}")
    if bounds.ndim != 3 or bounds.shape[0] not in (1, q.shape[0]) or bounds.shape[1:] != (2, q.shape[1]):
        raise ValueError(f"bounds must be int32 {_expected(q)}, got {list(bounds.shape)}")
    same_device(q, bounds, "bounds")


def _expected(q: Tensor) -> str:
    return f"[{q.shape[0]} or 1, 2, {q.shape[1]}]"


def _named(count: int, words: str) -> str:
    """A size for a message. In a compiled graph by words: its number would tie the graph to this one length."""
    return words if torch.compiler.is_compiling() else str(count)


def check_ends_of_bounds(bounds: Tensor, keys: int) -> None:
    """What a caller made himself must not lead beyond the keys."""
    right = ((bounds >= 0) & (bounds <= keys)).all()
    hold(right, f"bounds must lie in 0 .. {_named(keys, 'the number of keys')}", bounds)


def check_window(window: int | None) -> int:
    """As the op takes it: 0 for None."""
    if window is None:
        return 0
    if isinstance(window, bool) or not isinstance(window, int | torch.SymInt):
        raise TypeError(f"window must be an int or None, got {type(window).__name__} {window!r}")
    if window < 1:
        raise ValueError(f"window must be at least 1 (the query's own key), or None, got {window}")
    return window


def check_sequences(q: Tensor, keys: int, given: dict[str, Tensor | int | None]) -> None:
    """starts, lengths and offset [B], or cu_seqlens and cu_seqlens_k [sequences + 1], as integers."""
    packed = given.get("cu_seqlens")
    for name, x in given.items():
        if x is None:
            continue
        if name == "offset" and isinstance(x, int | torch.SymInt) and not isinstance(x, bool):
            check_offset(x)
            continue
        if not isinstance(x, Tensor):
            kind = "an int or an integer tensor [batch]" if name == "offset" else "an integer tensor"
            raise TypeError(f"{name} must be {kind}, got {type(x).__name__} {x!r}")
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
        same_device(q, x, name)
        if name.startswith("cu_"):
            if x.ndim != 1 or x.shape[0] < 1:
                raise ValueError(f"{name} must be [sequences + 1], got {list(x.shape)}")
        elif tuple(x.shape) != (q.shape[0],):
            raise ValueError(f"{name} must be [{q.shape[0]}], one a sequence, got {list(x.shape)}")
    if packed is None:
        if given.get("cu_seqlens_k") is not None:
            raise ValueError("cu_seqlens_k needs cu_seqlens, the ends of the sequences among the queries")
        _check_padding(given.get("starts"), given.get("lengths"), keys)
        return
    padding = [name for name in ("starts", "lengths", "offset") if given.get(name) is not None]
    if padding:
        raise ValueError(f"cu_seqlens says where sequences lie: leave out {' and '.join(padding)}")
    if q.shape[0] != 1:
        raise ValueError(
            f"packed sequences are one row, got a batch of {q.shape[0]}: flatten it to [1, B * S]"
        )
    others = given.get("cu_seqlens_k")
    assert isinstance(packed, Tensor)
    if isinstance(others, Tensor) and others.shape != packed.shape:
        raise ValueError(f"cu_seqlens has {packed.shape[0]} entries, cu_seqlens_k {others.shape[0]}")
    _check_ends("cu_seqlens", packed, q.shape[1], "queries")
    _check_ends("cu_seqlens_k", packed if others is None else others, keys, "keys")


def _check_ends(name: str, ends: Tensor | int, count: int, what: str) -> None:
    assert isinstance(ends, Tensor)
    right = (ends[0] == 0) & (ends[-1] == count) & (ends.diff() >= 0).all()
    message = f"{name} must rise from 0 to the {_named(count, 'number of')} {what}"
    if what == "keys":
        message += " (where queries and keys differ in number, give cu_seqlens_k)"
    hold(right, message, ends)


def _check_padding(starts: Tensor | int | None, lengths: Tensor | int | None, keys: int) -> None:
    most = _named(keys, "the number of keys")
    if isinstance(starts, Tensor):
        hold(((starts >= 0) & (starts <= keys)).all(), f"starts must lie in 0 .. {most}", starts)
    if isinstance(lengths, Tensor):
        end = lengths if not isinstance(starts, Tensor) else starts + lengths
        message = f"lengths must be at least 0, and starts + lengths at most {most}"
        hold(((lengths >= 0) & (end <= keys)).all(), message, lengths)


def runs_triton(impl: str, q: Tensor, k: Tensor) -> bool:
    """Whether the Triton kernels are to run; says why where they were asked for and cannot."""
    if impl == "reference":
        return False
    half = q.dtype in (torch.float16, torch.bfloat16)
    if impl == "auto":
        fits = q.shape[3] <= MAX_HEAD_DIM and q.shape[2] <= MAX_GROUPS * k.shape[2]
        return q.is_cuda and half and fits and has_triton()
    if not has_triton():
        raise ValueError("impl='triton' needs triton: pip install triton")
    if not q.is_cuda:
        from .launch import interpreting

        if not interpreting():
            raise ValueError(
                f"impl='triton' needs a GPU tensor (or TRITON_INTERPRET=1), got one on {q.device}"
            )
    if q.dtype == torch.float64:
        raise TypeError("impl='triton' takes float16, bfloat16 or float32, got float64")
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"impl='triton' takes a head_dim up to {MAX_HEAD_DIM}, got {q.shape[3]}")
    return True
