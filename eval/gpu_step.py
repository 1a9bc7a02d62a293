"""The GPU benchmark's cases of whole decode steps: blocks of Mistral-7B in five launches each, beside nine."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from ..kernels import decode_reference, fused_reference
from ..kernels.budget import relative_error
from .gpu_generate import MISTRAL_7B, random_model
from .gpu_matmul import SPECS
from .gpu_protocol import Case, Problem, Side

# blocks of one step: together more than any L2 holds, so that none finds its weights there
LAYERS = 3
# tokens in the ring before the step
CONTEXT = 511


def cases() -> list[Case]:
    """A token of one text and of sixteen; fp16 keeps its norms apart, so it is seven launches beside nine."""
    kinds = [("int4", "bfloat16", 2), ("nf4", "bfloat16", 3), ("int4", "float16", 4)]
    return [step_case(name, batch, dtype, priority) for name, dtype, priority in kinds for batch in (1, 16)]


def step_case(
    name: str, batch: int, dtype: str, priority: int = 9, size: dict[str, Any] | None = None
) -> Case:
    labels = {"format": name, "dtype": dtype, "m": batch, "layers": LAYERS, "context": CONTEXT}
    make = functools.partial(make_step, name, batch, getattr(torch, dtype), size or MISTRAL_7B)
    return Case("step", f"{name} {dtype} m{batch} {LAYERS} blocks", labels, make, None, priority)


@torch.no_grad()
def make_step(
    name: str, batch: int, dtype: torch.dtype, size: dict[str, Any], device: torch.device
) -> Problem:
    from ..model.decode_attend import StepAttention
    from ..model.decode_step import DecodeModel
    from ..model.static_cache import StaticRollingCache

    model: Any = random_model(SPECS[name], dtype, {**size, "num_hidden_layers": LAYERS}, device)
    fused = DecodeModel(model, rows=batch, fused=True)
    separate = copy.copy(fused)
    separate.fused = None
    generator = torch.Generator(device).manual_seed(0)
    cache = StaticRollingCache(model.config, batch, length=CONTEXT + 1, dtype=dtype, device=device)
    for layer in cache.layers:
        for ring in layer.tensors.values():
            ring.normal_(generator=generator)
    cache.seen.fill_(CONTEXT)
    # the step is always the same one: what it writes into the ring is what is there already
    positions = cache.advance(1)
    attend = StepAttention(cache, fused.heads, fused.turn(positions[:, None]), positions, False)
    tokens = torch.randint(size["vocab_size"], (batch, 1), generator=generator, device=device)
    exact, eager = (plain_step(model, tokens, attend, kind) for kind in (torch.float64, dtype))
    weights = sum(t.nbytes for block in model.model.layers for t in block.state_dict().values())
    rings = sum(ring[:, :, : CONTEXT + 1].nbytes for layer in cache.layers for ring in layer.tensors.values())

    def step(made: DecodeModel) -> Tensor:
        with torch.inference_mode():
            return made.hidden(tokens, attend, chunk=False)

    return Problem(
        {
            "fused": Side([functools.partial(step, fused)]),
            "separate": Side([functools.partial(step, separate)]),
        },
        exact,
        pick=lambda hidden: hidden[:, 0],
        allowed=max(2 * relative_error(eager, exact), torch.finfo(dtype).eps / 2),
        nbytes=float(weights + rings),
        tokens=float(batch),
    )


def plain_step(model: Any, tokens: Tensor, attend: Any, dtype: torch.dtype) -> Tensor:
    """The hidden states [B, D] by dense weights and eager code in ``dtype``."""
    config, heads = model.config, attend.heads
    cos, sin = (t.to(dtype) for t in attend.turn)
    h = model.model.embed_tokens(tokens[:, 0]).to(dtype)

    def norm(layer: Any, x: Tensor) -> Tensor:
        return fused_reference.rms_norm(x, layer.weight.to(dtype), config.rms_norm_eps)

    def times(layer: Any, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, layer.quantized().dequantize(dtype))

    for block, ring in zip(model.model.layers, attend.cache.layers):
        a, mlp = block.self_attn, block.mlp
        x = norm(block.input_layernorm, h)
        qkv = torch.cat([times(layer, x) for layer in (a.q_proj, a.k_proj, a.v_proj)], dim=-1)
        q, k, v = heads.cut(qkv[:, None])
        keys, values = (t.to(dtype, copy=True) for t in (ring.keys, ring.values))
        k = fused_reference.rotate(k, cos, sin)
        fused_reference.cache_write(k, v, attend.positions, keys, values, None, None)
        context = decode_reference.decode_attention(
            fused_reference.rotate(q, cos, sin), keys, values, attend.cache.seen, None, None, None,
            attend.cache.rows.reach, heads.width**-0.5,
        )  # fmt: skip
        h = h + times(a.o_proj, context.flatten(1))
        x = norm(block.post_attention_layernorm, h)
        gated = fused_reference.swiglu(times(mlp.gate_proj, x), times(mlp.up_proj, x))
        h = h + times(mlp.down_proj, gated)
    return h
