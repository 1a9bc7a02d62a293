"""The GPU benchmark's cases of sliding-window attention, forward and backward, of Mistral-7B's heads.

In float64 a whole result would not fit: a few queries are checked on the way forward, and on the way back a few
neighbouring queries and keys of the first KV head, with all that has a share in them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import attention_reference as reference
from ..kernels.attention_bounds import key_bounds
from ..kernels.attention_ops import sliding_attention
from ..kernels.budget import relative_error
from .gpu_protocol import Call, Case, Goal, Problem, Side

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 32, 8, 128, 4096
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
BACKWARD_LENGTHS = (4096, 8192, 32768)
# compiling FlexAttention takes as long as measuring ten other cases
FLEX_LENGTHS = (8192, 32768)
# queries, or neighbouring queries and keys, that are checked
SAMPLES = 16
State = tuple[Tensor, Tensor, Tensor]


def cases() -> list[Case]:
    out = []
    for length in LENGTHS:
        goal = Goal(None, 450, 600, "TFLOP/s", higher=True) if length >= 8192 else None
        out.append(attention_case(length, "bfloat16", goal, priority=1 if length == 8192 else 3))
    beside = Goal(None, 1.25, 1.25, "x flex", higher=True)
    out.append(attention_case(8192, "float16", beside, priority=2))
    for length in BACKWARD_LENGTHS:
        goal = Goal(None, 330, 480, "TFLOP/s", higher=True) if length >= 8192 else None
        out.append(backward_case(length, "bfloat16", goal, priority=2 if length == 8192 else 4))
    return out


def attention_case(
    length: int, dtype: str, goal: Goal | None = None, priority: int = 9, **shape: int
) -> Case:
    labels = {"pass": "forward", "dtype": dtype, "length": length, **sizes(**shape)}
    make = functools.partial(make_forward, length, getattr(torch, dtype), sizes(**shape))
    return Case("attention", f"forward {dtype} s{length}", labels, make, goal, priority)


def backward_case(length: int, dtype: str, goal: Goal | None = None, priority: int = 9, **shape: int) -> Case:
    labels = {"pass": "backward", "dtype": dtype, "length": length, **sizes(**shape)}
    make = functools.partial(make_backward, length, getattr(torch, dtype), sizes(**shape))
    return Case("attention", f"backward {dtype} s{length}", labels, make, goal, priority)


def sizes(**changes: int) -> dict[str, int]:
    return {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "window": WINDOW} | changes


def pairs(length: int, window: int) -> int:
    """Query and key pairs that are looked at: the triangle that begins the band, then the band."""
    edge = min(length, window)
    return edge * (edge + 1) // 2 + max(0, length - window) * window


def make_state(length: int, dtype: torch.dtype, shape: dict[str, int], device: torch.device) -> State:
    """q [1, S, H, D] and k, v [1, S, KV, D], random."""
    generator = torch.Generator(device).manual_seed(0)
    heads = (shape["heads"], shape["kv_heads"], shape["kv_heads"])
    q, k, v = (
        torch.randn(1, length, h, shape["head_dim"], generator=generator, device=device).to(dtype)
        for h in heads
    )
    return q, k, v


def make_forward(length: int, dtype: torch.dtype, shape: dict[str, int], device: torch.device) -> Problem:
    q, k, v = make_state(length, dtype, shape, device)
    window, scale = shape["window"], shape["head_dim"] ** -0.5
    rows = torch.linspace(0, length - 1, min(SAMPLES, length), device=device).long()
    key = torch.arange(length, device=device)
    seen = ((key <= rows[:, None]) & (key > rows[:, None] - window))[None]

    def some(kind: torch.dtype) -> Tensor:
        return reference.attention(q[:, rows].to(kind), k.to(kind), v.to(kind), seen, scale)[0]

    exact = some(torch.float64)
    problem = Problem(
        {"ours": Side([lambda: sliding_attention(q, k, v, window=window)])},
        exact,
        pick=lambda out: out[:, rows],
        allowed=max(2 * relative_error(some(dtype), exact), torch.finfo(dtype).eps / 2),
        flops=4.0 * pairs(length, window) * shape["heads"] * shape["head_dim"],
        nbytes=float(2 * q.nbytes + k.nbytes + v.nbytes),
    )
    add_peer(problem, "flash", lambda: [lambda: flash(q, k, v, window)[0]])
    if length <= window:
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]
        product: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
        options = {"is_causal": True, "enable_gqa": True}
        problem.sides["sdpa"] = Side([lambda: product(*heads_first, **options).transpose(1, 2)])
    if length in FLEX_LENGTHS:
        add_peer(problem, "flex", lambda: [flex(q, k, v, window)])
    return problem


def make_backward(length: int, dtype: torch.dtype, shape: dict[str, int], device: torch.device) -> Problem:
    q, k, v = make_state(length, dtype, shape, device)
    window, scale = shape["window"], shape["head_dim"] ** -0.5
    dout = torch.randn(q.shape, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)
    options = (window, True, 0, scale, "auto")
    out, lse = torch.ops.brise.sliding_attention(q, k, v, None, *options)
    group = shape["heads"] // shape["kv_heads"]
    # the first checked query and key, the first key that any query from there on sees, the end of who sees that key
    at = length // 2
    first, end = max(0, at - window), min(length, at + SAMPLES + window)
    bounds = key_bounds(end - at, end - first, device=device, window=window, causal=True, offset=at - first)
    seen = reference.visible_in(bounds, end - first)
    last = min(at + SAMPLES, length)

    def pick(grads: State) -> Tensor:
        dq, dk, dv = grads
        some = (dq[:, at:last, :group], dk[:, at:last, :1], dv[:, at:last, :1])
        return torch.cat([t.double().flatten() / n for t, n in zip(some, norms)])

    def some(kind: torch.dtype) -> State:
        part = (dout[:, at:end, :group], q[:, at:end, :group], k[:, first:end, :1], v[:, first:end, :1])
        d, *state = (t.to(kind) for t in part)
        x, y, z = state
        dq, dk, dv = reference.attention_backward(d, None, x, y, z, seen, scale)
        count = last - at
        return dq[:, :count], dk[:, at - first :][:, :count], dv[:, at - first :][:, :count]

    def weighed(grads: State) -> Tensor:
        return torch.cat([t.double().flatten() / n for t, n in zip(grads, norms)])

    norms = [1.0, 1.0, 1.0]
    true = some(torch.float64)
    norms = [float(t.norm()) for t in true]
    exact = weighed(true)
    backward = torch.ops.brise.sliding_attention_backward
    problem = Problem(
        {"ours": Side([lambda: backward(dout, None, q, k, v, out, lse, None, *options)])},
        exact,
        pick=pick,
        allowed=max(2 * relative_error(weighed(some(dtype)), exact), torch.finfo(dtype).eps / 2),
        flops=10.0 * pairs(length, window) * shape["heads"] * shape["head_dim"],
        nbytes=float(4 * q.nbytes + 2 * k.nbytes + 2 * v.nbytes),
    )
    add_peer(problem, "flash", lambda: [flash_backward(dout, q, k, v, window)])
    return problem


def add_peer(problem: Problem, name: str, calls: Callable[[], list[Call]]) -> None:
    """A side that may not be there: then the row says why."""
    try:
        problem.sides[name] = Side(calls())
    except (RuntimeError, TypeError, ValueError, AssertionError, ImportError) as error:
        problem.missing[name] = f"{type(error).__name__}: {error}"[:300]


def flash(q: Tensor, k: Tensor, v: Tensor, window: int) -> Any:
    """torch's own FlashAttention-2 with a window: (out, logsumexp, state of its generator, ...)."""
    length = q.shape[1]
    return torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        None,
        None,
        length,
        length,
        0.0,
        True,
        False,
        window_size_left=window - 1,
        window_size_right=0,
    )


def flash_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int) -> Call:
    length = q.shape[1]
    out, lse, state, unused, _ = flash(q, k, v, window)
    return lambda: torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, None, None, length, length, 0.0, True, state, unused,
        window_size_left=window - 1, window_size_right=0,
    )  # fmt: skip


def flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Call:
    """FlexAttention, compiled, with its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    length = q.shape[1]
    mask = create_block_mask(seen, None, None, length, length, device=str(q.device))
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    heads_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    return lambda: compiled(*heads_first, block_mask=mask, enable_gqa=True).transpose(1, 2)
