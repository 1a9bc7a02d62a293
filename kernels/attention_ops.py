"""Sliding-window attention as a torch custom op: checked, with fakes and gradients to q, k and v.

``impl`` chooses who computes: ``auto`` (Triton for half precision on a GPU, else block by block in torch),
``reference`` (the plain oracle) or ``triton``. Importing this module neither needs triton nor asks for a
device.
"""

from typing import Any

import torch
from torch import Tensor

from . import attention_blocks as blocks
from . import attention_reference as reference
from .attention_bounds import key_bounds
from .attention_checks import (
    check_bounds,
    check_ends_of_bounds,
    check_offset,
    check_options,
    check_sequences,
    check_states,
    check_window,
    runs_triton,
)


def sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    offset: int | Tensor | None = None,
    bounds: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(q k^T * scale) v over the keys each query may see; never touches a block of keys that none may.

    Query s stands at position p = s + offset among the keys. It sees key t iff t is a real key of its sequence,
    and with ``causal`` t <= p, and with a window p - window < t: W keys with the query's own. One that sees no
    key gives 0 and takes no gradient.

    Args:
        q: [B, S, H, D]; k, v: [B, T, KV, D], H a multiple of KV, one dtype (fp16, bf16, fp32, fp64). Any strides;
            where the last is not 1 a copy is made.
        window: at least 1, None for no limit.
        scale: D ** -0.5 by default.
        starts: integer [B], the first real key of each sequence (left padding); 0 by default.
        lengths: integer [B], how many real keys each has from there on (right padding); all by default.
        cu_seqlens: integer [sequences + 1], for a batch of one row that holds several sequences one after the
            other: where each begins, and where the last ends. Sequences may be empty.
        cu_seqlens_k: the same among the keys, where they are not those of the queries; the last query of a
            sequence then stands at its last key.
        offset: T - S by default, so that the last query stands at the last key; an int, or [B].
        bounds: int32 [B or 1, 2, S] in place of window, causal and all of the above: the first key each query
            sees, and the one behind the last, both in 0 .. T (:func:`.attention_bounds.key_bounds`).
    Returns:
        [B, S, H, D], contiguous, in q's dtype. What lies in padding on either side is never looked at; on a GPU, keys
        between two packed sequences that no query sees must be finite.

    Raises:
        ValueError, TypeError: arguments that do not fit. Values of tensors on a GPU are asserted there.
    """
    check_states(q, k, v)
    width = check_window(window)
    given: dict[str, Tensor | int | None] = {
        "starts": starts,
        "lengths": lengths,
        "cu_seqlens": cu_seqlens,
        "cu_seqlens_k": cu_seqlens_k,
        "offset": offset,
    }
    used = {name: value for name, value in given.items() if value is not None}
    if bounds is not None and (used or window is not None):
        extra = ", ".join(["window"] * (window is not None) + list(used))
        raise ValueError(f"bounds say all: leave out {extra}")
    check_options(width, causal or bounds is not None, _scale(q, scale), impl)
    check_sequences(q, k.shape[1], given)
    shift = k.shape[1] - q.shape[1]
    if offset is not None and not isinstance(offset, Tensor):
        shift = offset
    if bounds is None and any(isinstance(value, Tensor) for value in used.values()):
        bounds = key_bounds(q.shape[1], k.shape[1], device=q.device, window=window, causal=causal, **given)  # type: ignore[arg-type]
    elif bounds is not None:
        check_bounds(bounds, q)
        check_ends_of_bounds(bounds, k.shape[1])
    if bounds is not None:
        width, causal, shift = 0, False, 0
    op = torch.ops.brise.sliding_attention
    return op(q, k, v, bounds, width, causal, shift, _scale(q, scale), impl)[0]


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _bounds_of(q: Tensor, k: Tensor, bounds: Tensor | None, window: int, causal: bool, offset: int) -> Tensor:
    if bounds is not None:
        return bounds
    return key_bounds(
        q.shape[1], k.shape[1], device=q.device, window=window or None, causal=causal, offset=offset
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    window: int,
    causal: bool,
    offset: int,
    *options: Any,
) -> None:
    check_states(q, k, v)
    check_options(window, causal or bounds is not None, *options)
    check_offset(offset)
    if bounds is not None:
        check_bounds(bounds, q)


def _rows(x: Tensor) -> Tensor:
    """The kernels walk along head_dim in steps of 1, and inside a block of up to 256 positions in 32-bit numbers;
    every other stride is free."""
    near = x.stride(1) < 1 << 23 or x.shape[1] == 1
    return x if near and (x.stride(-1) == 1 or x.shape[-1] == 1) else x.contiguous()


@torch.library.custom_op("brise::sliding_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    window: int,
    causal: bool,
    offset: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """out [B, S, H, D] and lse [B, S, H]; window 0 is none."""
    _check(q, k, v, bounds, window, causal, offset, scale, impl)
    if runs_triton(impl, q, k):
        from . import attention_launch as launch

        seen = None if bounds is None else bounds.contiguous()
        return launch.forward(_rows(q), _rows(k), _rows(v), seen, window, causal, offset, scale)
    seen = _bounds_of(q, k, bounds, window, causal, offset)
    # under autocast the products inside would be taken in another dtype than was asked for
    with torch.autocast(q.device.type, enabled=False):
        if impl == "reference":
            out, lse = reference.attention(q, k, v, reference.visible_in(seen, k.shape[1]), scale)
            return out.contiguous(), lse.contiguous()
        return blocks.forward(q, k, v, seen, scale)


@torch.library.custom_op("brise::sliding_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    window: int,
    causal: bool,
    offset: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, bounds, window, causal, offset, scale, impl)
    if runs_triton(impl, q, k):
        from . import attention_launch as launch

        seen = None if bounds is None else bounds.contiguous()
        return launch.backward(
            _rows(dout), None if dlse is None else dlse.contiguous(), _rows(q), _rows(k), _rows(v),
            out.contiguous(), lse.contiguous(), seen, window, causal, offset, scale,
        )  # fmt: skip
    seen = _bounds_of(q, k, bounds, window, causal, offset)
    with torch.autocast(q.device.type, enabled=False):
        if impl == "reference":
            visible = reference.visible_in(seen, k.shape[1])
            dq, dk, dv = reference.attention_backward(dout, dlse, q, k, v, visible, scale)
        else:
            dq, dk, dv = blocks.backward(dout, dlse, q, k, v, out, lse, seen, scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_forward.register_fake
def _(q, k, v, bounds, window, causal, offset, scale, impl):
    check_states(q, k, v)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)


@_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, bounds, window, causal, offset, scale, impl):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, *options = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, bounds = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 9
    given = torch.zeros_like(out) if dout is None else dout
    grads = torch.ops.brise.sliding_attention_backward(given, dlse, q, k, v, out, lse, bounds, *ctx.options)
    return (*grads, *(None,) * 6)


_forward.register_autograd(_gradient, setup_context=_setup)
