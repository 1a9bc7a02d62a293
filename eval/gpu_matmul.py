"""The GPU benchmark's cases of the dequant-matmul: Mistral-7B's Linear layers, from one token to 8192."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.budget import relative_error
from ..quant.config import QuantSpec
from ..quant.double_quant import dynamic_map
from ..quant.rtn import rtn
from ..quant.tensor import QuantizedTensor
from .gpu_protocol import Case, Goal, Problem, Side, copies_for
from .timing import bitsandbytes_module

# (N, K) of attention's output, qkv, gate with up, down, and the head
SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (32000, 4096))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 512, 1024, 2048, 4096, 8192)
DTYPES = ("float16", "bfloat16")
SPECS = {
    "int4": QuantSpec(format="int4", group_size=128),
    "int4-asym": QuantSpec(format="int4", group_size=128, symmetric=False),
    "nf4": QuantSpec(format="nf4"),
    "int8": QuantSpec(format="int8", group_size=None),
}
# by (format, N, K, tokens); microseconds, but for long prompts, where the dense product is the measure
GOALS = {
    ("int4", 28672, 4096, 1): Goal(14.1, 20, 16.5, "us"),
    ("int4", 4096, 14336, 1): Goal(7.0, 11, 9, "us"),
    ("int4", 6144, 4096, 1): Goal(3.0, 6, 4.8, "us"),
    ("int4", 28672, 4096, 64): Goal(19.0, 30, 25, "us"),
    ("nf4", 28672, 4096, 1): Goal(14.5, 26, 20, "us"),
    ("int8", 28672, 4096, 1): Goal(27.3, 34, 30.5, "us"),
}
LONG_PROMPT = 2048
# up to which the price of rows that do not depend on one another is measured
INVARIANT_TOKENS = 64


def cases() -> list[Case]:
    """All of them, the most telling first."""
    out = []
    for name in SPECS:
        for n, k in SHAPES:
            for tokens in TOKENS:
                for dtype in DTYPES:
                    out.append(matmul_case(name, n, k, tokens, dtype))
    return sorted(out, key=lambda case: case.priority)


def matmul_case(name: str, n: int, k: int, tokens: int, dtype: str) -> Case:
    goal = GOALS.get((name, n, k, tokens))
    if goal is None and tokens >= LONG_PROMPT:
        goal = Goal(None, 0.90, 0.96, "x cublas", higher=True)
    labels = {"format": name, "dtype": dtype, "m": tokens, "n": n, "k": k}
    return Case(
        "matmul",
        f"{name} {dtype} m{tokens} {n}x{k}",
        labels,
        functools.partial(make, SPECS[name], n, k, tokens, getattr(torch, dtype)),
        goal,
        _priority(name, n, k, tokens, dtype),
    )


def _priority(name: str, n: int, k: int, tokens: int, dtype: str) -> int:
    """0: decoding with int4; 1: the other goals; 2: int4 at every M; 3: every format at M = 1; 9: the rest."""
    if dtype != "float16":
        return 5 if tokens in (1, 16) and name != "int4-asym" else 9
    if name == "int4" and tokens == 1:
        return 0
    if (name, n, k, tokens) in GOALS or (name, n, tokens) == ("int4", 28672, 16):
        return 1
    if name == "int4" and n == 28672:
        return 2
    if tokens == 1:
        return 3
    return 4 if n == 28672 else 9


def make(spec: QuantSpec, n: int, k: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """x [tokens, K] times a random weight [N, K] of this spec, ours and every peer's way."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(n, k, generator=generator, device=device) * 0.02
    x = torch.randn(tokens, k, generator=generator, device=device).to(dtype)
    q = rtn(weight, spec)
    dense = q.dequantize(torch.float64)
    exact = x.double() @ dense.T
    eager = dense.to(dtype)
    allowed = max(2 * relative_error(x @ eager.T, exact), torch.finfo(dtype).eps / 2)
    scales_map = dynamic_map(device) if spec.double_quant else None
    layout = "tiles" if device.type == "cuda" else "portable"
    packed = ops.pack_weight(q.tensors, spec.format, (n, k), dtype, scales_map=scales_map, layout_name=layout)
    copies = [_copy(packed) for _ in range(copies_for(packed.nbytes))]
    del dense
    problem = Problem(
        {"ours": Side([functools.partial(ops.quant_matmul, x, w) for w in copies])},
        exact,
        allowed=allowed,
        flops=2.0 * tokens * n * k,
        nbytes=float(packed.nbytes + x.nbytes + tokens * n * dtype.itemsize),
    )
    if packed.layout == "tiles":
        fused = [functools.partial(ops.quant_matmul, x, w, impl="triton") for w in copies]
        problem.sides["fused"] = Side(fused)
    if 1 < tokens <= INVARIANT_TOKENS:
        alone = [functools.partial(ops.quant_matmul, x, w, batch_invariant=True) for w in copies]
        problem.sides["batch-invariant"] = Side(alone)
    problem.sides["dequantize+cublas"] = Side([functools.partial(_decode_first, x, w) for w in copies])
    plain = [eager.clone() for _ in range(copies_for(eager.nbytes))]
    problem.sides["cublas"] = Side([functools.partial(torch.nn.functional.linear, x, w) for w in plain])
    for name, peer in PEERS.items():
        try:
            calls = peer(x, weight, q)
        except ImportError as error:
            problem.missing[name] = str(error)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            # somebody else's library, of a version we have not seen: the row goes on without it and says so
            problem.missing[name] = f"{type(error).__name__}: {error}"[:300]
        else:
            if calls is not None:
                problem.sides[name] = Side(calls)
    return problem


def _copy(packed: ops.PackedWeight) -> ops.PackedWeight:
    tensors = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    return ops.PackedWeight(packed.format, packed.shape, packed.layout, tensors)


def _decode_first(x: Tensor, w: ops.PackedWeight) -> Tensor:
    return torch.nn.functional.linear(x, ops.dequantize(w, x.dtype))


def _torch_int4(x: Tensor, weight: Tensor, q: QuantizedTensor) -> Sequence[Callable[[], Tensor]] | None:
    """torch's int4 product of a GPU: bf16; it packs the even channel high, and adds scale * (8 - zero)."""
    if q.spec.format != "int4" or x.dtype != torch.bfloat16 or not x.is_cuda:
        return None
    codes, params = q.codes(), q.params()
    zero = torch.full_like(params.scale, 8.0) if params.zero is None else params.zero.float()
    pairs = torch.stack([params.scale.T, (params.scale * (8 - zero)).T], dim=-1).to(torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack(
        ((codes[:, ::2] << 4) | codes[:, 1::2]).contiguous(), 8
    )
    copies = [packed.clone() for _ in range(copies_for(packed.nbytes))]
    group = q.shape[1] // params.scale.shape[1]
    product = torch.ops.aten._weight_int4pack_mm
    return [functools.partial(product, x, w, group, pairs.contiguous()) for w in copies]


def _bitsandbytes(x: Tensor, weight: Tensor, q: QuantizedTensor) -> Sequence[Callable[[], Tensor]] | None:
    """Its 4-bit product on the same codes; its 8-bit layer, which rounds x to int8 as well."""
    if q.spec.format not in ("nf4", "int8") or (q.spec.format == "int8" and x.dtype != torch.float16):
        return None
    bnb = bitsandbytes_module()
    if q.spec.format == "nf4":
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        state.dtype = x.dtype
        copies = [packed.clone() for _ in range(copies_for(packed.nbytes))]
        return [functools.partial(bnb.matmul_4bit, x, w, quant_state=state) for w in copies]
    calls: list[Callable[[], Tensor]] = []
    for _ in range(copies_for(weight.numel())):
        layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.half().cpu(), has_fp16_weights=False, requires_grad=False)
        calls.append(functools.partial(layer.to(x.device).eval(), x))
    return calls


def _gemlite(x: Tensor, weight: Tensor, q: QuantizedTensor) -> Sequence[Callable[[], Tensor]] | None:
    """GemLite's Triton product on the same codes."""
    if q.spec.format != "int4":
        return None
    try:
        from gemlite.core import TORCH_TO_DTYPE, GemLiteLinearTriton
    except ImportError as error:
        raise ImportError("not installed: pip install gemlite") from error
    params = q.params()
    zero = torch.full_like(params.scale, 8.0) if params.zero is None else params.zero.float()
    group = q.shape[1] // params.scale.shape[1]
    kind = TORCH_TO_DTYPE[x.dtype]

    def layer() -> Any:
        made = GemLiteLinearTriton(
            4, group_size=group, in_features=q.shape[1], out_features=q.shape[0], input_dtype=kind,
            output_dtype=kind,
        )  # fmt: skip
        made.pack(q.codes(), params.scale.to(x.dtype), zero.to(x.dtype), None)
        return made

    return [functools.partial(layer(), x) for _ in range(copies_for(weight.numel() // 2))]


PEERS: dict[str, Callable[[Tensor, Tensor, QuantizedTensor], Sequence[Callable[[], Tensor]] | None]] = {
    "torch-int4": _torch_int4,
    "bitsandbytes": _bitsandbytes,
    "gemlite": _gemlite,
}
