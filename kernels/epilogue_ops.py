"""The ops ``brise::matmul_residual``, ``matmul_swiglu`` and ``matmul_rope_cache_write``: checks, fakes, choice.

For decode steps, so few tokens, tiled weights, no bias and no gradient. A norm between two of them costs no launch:
:class:`HalfNormed` is what the one hands to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import epilogue_reference as reference
from .checks import FLOATS, TENSORS, check_product, runs_triton, same_device
from .decode_ops import check_positions, check_ring
from .epilogue_reference import SUM_BLOCK
from .weights import PackedWeight, dense

# rows of a tile: gate and up, and the halves of a head, must begin with one
_TILE_ROWS = 16


@dataclass(frozen=True)
class HalfNormed:
    """A stream h [M, N] on its way through a norm: times the norm's weight, not yet divided by its root.

    values: h * weight, [M, N]. sums: fp32 [ceil(N / 64), M], the squares of h over each 64 channels.
    """

    values: Tensor
    sums: Tensor


def matmul_residual(
    x: Tensor,
    w: PackedWeight,
    residual: Tensor,
    norm: Tensor | None = None,
    *,
    impl: str = "auto",
    batch_invariant: bool = False,
) -> tuple[Tensor, HalfNormed | None]:
    """residual + x @ W^T in one launch, and half of the norm that follows.

    Args:
        x: [M, K]; residual: [M, N], of x's dtype.
        w: in layout tiles.
        norm: the weight [N] of the norm.
        batch_invariant: a row's bits do not depend on the other rows.
    Returns:
        h [M, N], and with ``norm`` what the next product takes in place of an x. Half-normed values are as large as the
        stream: not for fp16, where they may overflow.
    Raises:
        ValueError, TypeError: shapes, dtypes, devices or a layout that do not fit.
    """
    h, values, sums = torch.ops.brise.matmul_residual(
        x, *_tensors(w), residual, norm, w.format, impl, batch_invariant
    )
    return h, None if norm is None else HalfNormed(values, sums)


def matmul_swiglu(
    x: Tensor | HalfNormed,
    w: PackedWeight,
    eps: float = 0.0,
    *,
    impl: str = "auto",
    batch_invariant: bool = False,
) -> Tensor:
    """silu(gate) * up -> [M, N / 2], in one launch; W [N, K] is the gate's rows, then up's, each a multiple of 16.

    Args:
        x: [M, K], or half-normed, then with the norm's ``eps``.
    """
    values, sums = _cut(x)
    return torch.ops.brise.matmul_swiglu(
        values, *_tensors(w), sums, eps, w.shape[0], w.format, impl, batch_invariant
    )


def matmul_rope_cache_write(
    x: Tensor | HalfNormed,
    w: PackedWeight,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float = 0.0,
    *,
    impl: str = "auto",
    batch_invariant: bool = False,
) -> Tensor:
    """Queries, keys and values of new tokens in one launch: rotated, and the keys and values in the ring.

    Args:
        x: [B * T, K], or half-normed, then with the norm's ``eps``.
        w: H heads of queries, KV of keys, KV of values, each D rows, D a multiple of 32.
        cos, sin: [B or 1, T, D], of x's dtype.
        positions: int32 or int64 [B], of the first of T <= W neighbouring tokens; negative: the row writes nothing.
        keys, values: the rings [B, KV, W, D], of x's dtype, changed in place as by ``rope_cache_write``. Not int8:
            its scale is that of a whole head, which may lie in two programs.
    Returns:
        q [B, T, H, D].
    """
    x, sums = _cut(x)
    q = torch.ops.brise.matmul_rope_cache_write(
        x,
        *_tensors(w),
        sums,
        eps,
        cos,
        sin,
        positions,
        keys,
        values,
        w.shape[0],
        w.format,
        impl,
        batch_invariant,
    )
    return q.view(positions.shape[0], cos.shape[1], *q.shape[1:])


def _cut(x: Tensor | HalfNormed) -> tuple[Tensor, Tensor | None]:
    return (x.values, x.sums) if isinstance(x, HalfNormed) else (x, None)


def _tensors(w: PackedWeight) -> tuple[Tensor | None, ...]:
    if w.layout != "tiles":
        raise ValueError(f"needs a weight in layout tiles, got {w.layout}: pack with layout_name='tiles'")
    return tuple(map(w.tensors.get, TENSORS[:6]))


def _check(
    x: Tensor, t: tuple[Tensor | None, ...], n: int, fmt: str, impl: str, sums: Tensor | None = None
) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must be [M, K], got {list(x.shape)}")
    tensors = dict(zip(TENSORS, t))
    check_product(x, fmt, n, x.shape[1], "tiles", impl, tensors | {"bias": None})
    if sums is None:
        return
    shape = (-(-x.shape[1] // SUM_BLOCK), x.shape[0])
    if tuple(sums.shape) != shape or not sums.is_contiguous():
        raise ValueError(
            f"sums of x {list(x.shape)} must be contiguous {list(shape)}, got {list(sums.shape)} with strides "
            f"{list(sums.stride())}"
        )
    if sums.dtype != _sum_dtype(x.dtype):
        raise TypeError(f"sums must be {_sum_dtype(x.dtype)}, got {sums.dtype}")
    same_device(x, sums, "sums")


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(x: Tensor, t: tuple[Tensor | None, ...], n: int, fmt: str, batch_invariant: bool) -> Tensor:
    """What the reference adds its epilogue to."""
    return reference.product(x, dense(fmt, "tiles", (n, x.shape[1]), x.dtype, *t), batch_invariant)


def _check_residual(x: Tensor, residual: Tensor, norm: Tensor | None) -> None:
    if residual.ndim != 2 or residual.shape[0] != x.shape[0] or residual.dtype != x.dtype:
        raise ValueError(
            f"residual must be {x.dtype} [{x.shape[0]}, N], got {residual.dtype} {list(residual.shape)}"
        )
    same_device(x, residual, "residual")
    if norm is not None:
        if norm.shape != residual.shape[1:] or norm.dtype not in FLOATS or not norm.is_contiguous():
            raise ValueError(
                f"norm must be floating point, contiguous [{residual.shape[1]}], got {norm.dtype} {list(norm.shape)}"
            )
        same_device(x, norm, "norm")


@torch.library.custom_op("brise::matmul_residual", mutates_args=())
def _residual(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scales_absmax: Tensor | None,
    scales_offset: Tensor | None,
    scales_map: Tensor | None,
    residual: Tensor,
    norm: Tensor | None,
    fmt: str,
    impl: str,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    t = (qweight, scales, zeros, scales_absmax, scales_offset, scales_map)
    _check_residual(x, residual, norm)
    n = residual.shape[1]
    _check(x, t, n, fmt, impl)
    if runs_triton(impl, "tiles", x):
        from . import epilogue_launch

        return epilogue_launch.residual(x, fmt, n, t, residual, norm, batch_invariant)
    return reference.residual(_product(x, t, n, fmt, batch_invariant), residual, norm)


@_residual.register_fake
def _(x, qweight, scales, zeros, absmax, offset, scales_map, residual, norm, fmt, impl, batch_invariant):
    _check_residual(x, residual, norm)
    m, n = residual.shape
    shapes = ((0,), (0,)) if norm is None else ((m, n), (-(-n // SUM_BLOCK), m))
    return (
        x.new_empty(m, n),
        x.new_empty(shapes[0]),
        x.new_empty(shapes[1], dtype=_sum_dtype(x.dtype)),
    )


def _check_swiglu(n: int) -> None:
    if n % (2 * _TILE_ROWS) or n < 1:
        raise ValueError(f"gate and up must each have a multiple of {_TILE_ROWS} rows, got {n} in all")


@torch.library.custom_op("brise::matmul_swiglu", mutates_args=())
def _swiglu(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scales_absmax: Tensor | None,
    scales_offset: Tensor | None,
    scales_map: Tensor | None,
    sums: Tensor | None,
    eps: float,
    n: int,
    fmt: str,
    impl: str,
    batch_invariant: bool,
) -> Tensor:
    t = (qweight, scales, zeros, scales_absmax, scales_offset, scales_map)
    _check_swiglu(n)
    _check(x, t, n, fmt, impl, sums)
    if runs_triton(impl, "tiles", x):
        from . import epilogue_launch

        return epilogue_launch.swiglu(x, fmt, n, t, sums, eps, batch_invariant)
    y = _product(x, t, n, fmt, batch_invariant)
    return reference.swiglu(reference.rooted(y, sums, x.shape[1], eps))


@_swiglu.register_fake
def _(x, qweight, scales, zeros, absmax, offset, scales_map, sums, eps, n, fmt, impl, batch_invariant):
    _check_swiglu(n)
    same_device(x, qweight)
    return x.new_empty(x.shape[0], n // 2)


def _check_rope(x, n: int, cos, sin, positions, keys, values) -> int:
    """Query heads."""
    if cos.ndim != 3 or cos.shape != sin.shape or cos.dtype != x.dtype or sin.dtype != x.dtype:
        raise ValueError(
            f"cos and sin must be {x.dtype} [B or 1, T, D], got {cos.dtype} {list(cos.shape)} and {sin.dtype} "
            f"{list(sin.shape)}"
        )
    tokens, width = cos.shape[1:]
    if width < 32 or width % 32:
        raise ValueError(f"heads must be a multiple of 32 wide, got cos {list(cos.shape)}")
    batch = positions.shape[0] if positions.ndim == 1 else -1
    if batch * tokens != x.shape[0] or tokens < 1 or cos.shape[0] not in (1, batch):
        raise ValueError(
            f"x [B * T, K], cos [B or 1, T, D] and positions [B] must fit, got {list(x.shape)}, {list(cos.shape)} and "
            f"{list(positions.shape)}"
        )
    for name, t in (("cos", cos), ("sin", sin)):
        same_device(x, t, name)
    check_positions("positions", positions, (batch,), x.device)
    check_ring(keys, values, None, None, batch, width, x.dtype, x.device)
    if tokens > keys.shape[2]:
        raise ValueError(
            f"{tokens} tokens do not fit into a ring of {keys.shape[2]} slots: read them as a prompt"
        )
    heads = n // width - 2 * keys.shape[1]
    if n % width or heads < 1:
        raise ValueError(
            f"W must hold H + 2 * {keys.shape[1]} heads of {width} rows, for a ring {list(keys.shape)}, got {n} rows"
        )
    return heads


@torch.library.custom_op("brise::matmul_rope_cache_write", mutates_args=("keys", "values"))
def _rope(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scales_absmax: Tensor | None,
    scales_offset: Tensor | None,
    scales_map: Tensor | None,
    sums: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    n: int,
    fmt: str,
    impl: str,
    batch_invariant: bool,
) -> Tensor:
    t = (qweight, scales, zeros, scales_absmax, scales_offset, scales_map)
    _check(x, t, n, fmt, impl, sums)
    heads = _check_rope(x, n, cos, sin, positions, keys, values)
    if runs_triton(impl, "tiles", x):
        from . import epilogue_launch

        return epilogue_launch.rope_cache_write(
            x, fmt, n, t, sums, eps, cos, sin, positions, keys, values, batch_invariant
        )
    if not x.shape[0]:
        return x.new_empty(0, heads, cos.shape[2])
    y = reference.rooted(_product(x, t, n, fmt, batch_invariant), sums, x.shape[1], eps)
    return reference.rope_cache_write(y, cos, sin, positions, keys, values)


@_rope.register_fake
def _(
    x, qweight, scales, zeros, absmax, offset, scales_map, sums, eps, cos, sin, positions, keys, values, n, fmt,
    impl, batch_invariant,
):  # fmt: skip
    heads = _check_rope(x, n, cos, sin, positions, keys, values)
    return x.new_empty(x.shape[0], heads, cos.shape[2])
