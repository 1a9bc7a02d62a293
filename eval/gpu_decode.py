"""The GPU benchmark's cases of one decoding step around the matrix products: attention over the ring, and the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import decode_reference, fused_reference
from ..kernels.budget import relative_error
from ..kernels.decode_ops import decode_attention
from ..kernels.fused_ops import rms_norm, swiglu
from .gpu_attention import add_peer
from .gpu_protocol import Call, Case, Goal, Problem, Side, copies_for

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 32, 8, 128, 4096
HIDDEN, INTERMEDIATE = 4096, 14336
BATCHES = (1, 8, 32, 64)
# positions seen; the last has gone round the ring
CONTEXTS = (512, 4096, 5000)
TOKENS = (1, 32, 4096)
EPSILON = 1e-5


def cases() -> list[Case]:
    out = []
    for batch in BATCHES:
        for context in CONTEXTS:
            for int8 in (False, True):
                telling = (batch, context) == (32, 4096)
                goal = Goal(125, 148, 134, "us") if telling and not int8 else None
                out.append(decode_case(batch, context, int8, "bfloat16", goal, 1 if telling else 4))
    for tokens in TOKENS:
        out += [norm_case(tokens, HIDDEN, "bfloat16", 6), swiglu_case(tokens, INTERMEDIATE, "bfloat16", 6)]
    return out


def decode_case(
    batch: int,
    context: int,
    int8: bool,
    dtype: str,
    goal: Goal | None = None,
    priority: int = 9,
    shape: tuple[int, int, int, int] = (HEADS, KV_HEADS, HEAD_DIM, WINDOW),
) -> Case:
    name = f"decode {'int8 cache' if int8 else dtype} b{batch} context {context}"
    labels = {"dtype": dtype, "cache": "int8" if int8 else dtype, "batch": batch, "context": context}
    make = functools.partial(make_decode, batch, context, int8, getattr(torch, dtype), shape)
    return Case("decode", name, labels, make, goal, priority)


def make_decode(
    batch: int,
    context: int,
    int8: bool,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> Problem:
    heads, groups, width, slots = shape
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(batch, heads, width, generator=generator, device=device).to(dtype)
    rings = [
        torch.randn(batch, groups, slots, width, generator=generator, device=device).to(dtype) for _ in "kv"
    ]
    scales: list[Tensor | None] = [None, None]
    if int8:
        coded = [fused_reference.quantize(ring) for ring in rings]
        rings, scales = [codes for codes, _ in coded], [scale for _, scale in coded]
    seen = torch.full((batch,), context, dtype=torch.int32, device=device)

    def plain(kind: torch.dtype) -> Tensor:
        keys, values = (r if int8 else r.to(kind) for r in rings)
        return decode_reference.decode_attention(
            q[:, None].to(kind), keys, values, seen, None, scales[0], scales[1], None, width**-0.5
        )[:, 0]

    exact = plain(torch.float64)
    held = min(context, slots)
    nbytes = sum(r[:, :, :held].numel() * r.element_size() for r in rings)
    copies = [[r.clone() for r in rings] for _ in range(copies_for(nbytes))]
    named: dict[str, Any] = dict(zip(("key_scales", "value_scales"), scales)) if int8 else {}
    problem = Problem(
        {"ours": Side([functools.partial(decode_attention, q, c[0], c[1], seen, **named) for c in copies])},
        exact,
        allowed=max(2 * relative_error(plain(dtype), exact), torch.finfo(dtype).eps / 2),
        flops=4.0 * batch * heads * held * width,
        nbytes=float(nbytes + 2 * q.nbytes),
    )
    if not int8:
        # the order of the keys is of no account to a softmax: what the ring holds is what these look at
        parts = [[r[:, :, :held] for r in c] for c in copies]
        product = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
        sdpa = [lambda k=k, v=v: product(q[:, :, None], k, v)[:, :, 0] for k, v in parts]
        problem.sides["sdpa"] = Side(sdpa)
        add_peer(problem, "flash", lambda: [functools.partial(_flash, q, k, v) for k, v in parts])
    return problem


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.ops.aten._flash_attention_forward(
        q[:, None], k.transpose(1, 2), v.transpose(1, 2), None, None, 1, k.shape[2], 0.0, False, False
    )
    return out[0][:, 0]


def norm_case(tokens: int, width: int, dtype: str, priority: int = 9) -> Case:
    make = functools.partial(make_norm, tokens, width, getattr(torch, dtype))
    return Case(
        "fused",
        f"add + rms_norm {dtype} {tokens}x{width}",
        {"dtype": dtype, "m": tokens},
        make,
        None,
        priority,
    )


def make_norm(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    x, residual = _inputs(tokens, width, dtype, device)
    weight = torch.rand(width, device=device).to(dtype) + 0.5

    def plain(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return fused_reference.rms_norm(total, weight.to(x.dtype), EPSILON), total

    def pick(result: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([t.double().flatten() for t in result])

    # the sum is rounded before its norm is taken: that is the op, not an error of it
    total = (x + residual).double()
    exact = pick((fused_reference.rms_norm(total, weight.double(), EPSILON), total))
    pairs = [(x.clone(), residual.clone()) for _ in range(copies_for(2 * x.nbytes))]
    ours = [functools.partial(rms_norm, a, weight, EPSILON, b) for a, b in pairs]
    eager = [functools.partial(plain, a, b) for a, b in pairs]
    return _elementwise(ours, eager, exact, pick, dtype, 4.0 * x.nbytes)


def swiglu_case(tokens: int, width: int, dtype: str, priority: int = 9) -> Case:
    make = functools.partial(make_swiglu, tokens, width, getattr(torch, dtype))
    return Case(
        "fused", f"swiglu {dtype} {tokens}x{width}", {"dtype": dtype, "m": tokens}, make, None, priority
    )


def make_swiglu(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    both = torch.cat(_inputs(tokens, width, dtype, device), dim=-1)
    copies = [both.clone() for _ in range(copies_for(both.nbytes))]
    exact = fused_reference.swiglu(*both.double().chunk(2, dim=-1))
    ours = [functools.partial(swiglu, c) for c in copies]
    eager = [lambda c=c: fused_reference.swiglu(*c.chunk(2, dim=-1)) for c in copies]
    return _elementwise(ours, eager, exact, lambda out: out, dtype, 1.5 * both.nbytes)


def _inputs(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    one, other = (torch.randn(tokens, width, generator=generator, device=device).to(dtype) for _ in range(2))
    return one, other


def _elementwise(
    ours: Sequence[Call],
    eager: Sequence[Call],
    exact: Tensor,
    pick: Callable[[Any], Tensor],
    dtype: torch.dtype,
    nbytes: float,
) -> Problem:
    allowed = max(2 * relative_error(pick(eager[0]()), exact), torch.finfo(dtype).eps / 2)
    return Problem(
        {"ours": Side(ours), "eager": Side(eager)}, exact, pick=pick, allowed=allowed, nbytes=nbytes
    )
