"""The ops ``brise::rms_norm``, ``add_rms_norm``, ``swiglu``, ``rope_cache_write``: checks, fakes, gradients, choice."""

import math

import torch
from torch import Tensor

from . import fused_cpu, fused_reference
from .checks import FLOATS
from .decode_ops import check_positions, check_ring, uses_triton
from .tuning_decode import MAX_HEAD_DIM


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x (+ residual), and that sum, which is the next residual; gradients to all three tensors.

    As transformers' MistralRMSNorm: the mean and the root in fp32, rounded to x's dtype, then times the weight.

    Args:
        x, residual: [..., D], of one dtype.
        weight: [D]; fp32 beside 16-bit activations gives an fp32 norm.
    Returns:
        the norm [..., D], and x + residual in x's dtype; without a residual that is x itself.
    """
    if residual is None:
        return torch.ops.brise.rms_norm(x, weight, eps, impl), x
    return torch.ops.brise.add_rms_norm(x, residual, weight, eps, impl)


def swiglu(gate: Tensor, up: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up -> [..., I], with gradients. One tensor [..., 2I] holds the gate, then up, side by side."""
    if up is None:
        if gate.ndim < 1 or gate.shape[-1] % 2:
            raise ValueError(f"gate and up side by side must be [..., 2I], got {list(gate.shape)}")
        gate, up = gate.chunk(2, dim=-1)
    return torch.ops.brise.swiglu(gate, up, impl)


def rope_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, and write keys and values into the ring, position p into slot ``p % W``; no gradient.

    Args:
        q: [B, T, H, D]; k, v: [B, T, KV, D]; any strides, so the parts of one projection need no copy.
        cos, sin: [B or 1, T, D], of q's dtype, as transformers' rotary embeddings return them at the angles of these
            tokens. They need not be those of ``positions``: padding takes slots but no angles.
        positions: int32 or int64, [B]: of the first of T neighbouring tokens; or [B, T]: of each, none twice.
            Negative: nothing is written for that row, or token.
        keys, values: [B, KV, W, D], of q's dtype or int8; changed in place. Positions W or more behind the newest of
            their row are not written, so T may exceed W.
        key_scales, value_scales: fp32 [B, KV, W], with int8: absmax / 127 of each token and head, written as well.
    Returns:
        q and k rotated, contiguous.
    """
    return torch.ops.brise.rope_cache_write(
        q, k, v, cos, sin, positions, keys, values, key_scales, value_scales, impl
    )


def _check_impl(impl: str) -> None:
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl must be auto, reference or triton, got {impl!r}")


def _check_alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.ndim < 1 or x.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating point tensor [..., D], got {x.dtype} {list(x.shape)}")
    if other.shape != x.shape or other.dtype != x.dtype:
        raise ValueError(
            f"{other_name} must be like {name}, {x.dtype} {list(x.shape)}, got {other.dtype} {list(other.shape)}"
        )
    if other.device != x.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}: move them together")


def _check_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    _check_alike("x", x, "residual", x if residual is None else residual)
    if weight.ndim != 1 or weight.shape[0] != x.shape[-1] or weight.dtype not in FLOATS:
        raise ValueError(
            f"weight must be floating point [{x.shape[-1]}], got {weight.dtype} {list(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"x is on {x.device}, weight on {weight.device}: move them together")


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor]:
    _check_impl(impl)
    _check_norm(x, weight, residual)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    if weight.dtype != torch.float64 and uses_triton(impl, x):
        from . import fused

        return fused.rms_norm(x, residual, weight, eps)
    total = x if residual is None else (x + residual).contiguous()
    on_cpu = impl == "auto" and x.device.type == "cpu"
    norm = fused_cpu.rms_norm if on_cpu else fused_reference.rms_norm
    return norm(total, weight, eps).contiguous(), total


@torch.library.custom_op("brise::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, impl: str) -> Tensor:
    return _norm(x, None, weight, eps, impl)[0]


@torch.library.custom_op("brise::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    return _norm(x, residual, weight, eps, impl)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@_rms_norm.register_fake
def _(x, weight, eps, impl):
    _check_norm(x, weight)
    return _like(x, torch.result_type(x, weight))


@_add_rms_norm.register_fake
def _(x, residual, weight, eps, impl):
    _check_norm(x, weight, residual)
    return _like(x, torch.result_type(x, weight)), _like(x, x.dtype)


def _norm_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.eps = inputs[2]


def _norm_gradient(ctx, grad):
    x, weight = ctx.saved_tensors
    dx, dw = fused_reference.rms_norm_backward(grad, x, weight, ctx.eps)
    return dx.to(x.dtype), dw.to(weight.dtype), None, None


def _add_norm_setup(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2])
    ctx.eps = inputs[3]


def _add_norm_gradient(ctx, grad, grad_sum):
    total, weight = ctx.saved_tensors
    dx, dw = fused_reference.rms_norm_backward(grad, total, weight, ctx.eps)
    dx = (dx + grad_sum).to(total.dtype)
    return dx, dx, dw.to(weight.dtype), None, None


_rms_norm.register_autograd(_norm_gradient, setup_context=_norm_setup)
_add_rms_norm.register_autograd(_add_norm_gradient, setup_context=_add_norm_setup)


@torch.library.custom_op("brise::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor, impl: str) -> Tensor:
    _check_impl(impl)
    _check_alike("gate", gate, "up", up)
    if uses_triton(impl, gate):
        from . import fused

        return fused.swiglu(gate, up)
    return fused_reference.swiglu(gate, up).contiguous()


@_swiglu.register_fake
def _(gate, up, impl):
    _check_alike("gate", gate, "up", up)
    return _like(gate, gate.dtype)


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])


def _swiglu_gradient(ctx, grad):
    return *fused_reference.swiglu_backward(grad, *ctx.saved_tensors), None


_swiglu.register_autograd(_swiglu_gradient, setup_context=_swiglu_setup)


def _check_rope(q, k, v, cos, sin, positions, keys, values, key_scales, value_scales) -> None:
    if (
        q.ndim != 4
        or k.ndim != 4
        or k.shape != v.shape
        or q.shape[:2] != k.shape[:2]
        or q.shape[3] != k.shape[3]
    ):
        raise ValueError(
            f"q must be [B, T, H, D] and k, v [B, T, KV, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    batch, tokens, _, width = q.shape
    if q.dtype not in FLOATS or width % 2 or width < 2:
        raise ValueError(f"q must be floating point with an even D, got {q.dtype} {list(q.shape)}")
    for name, t in (("k", k), ("v", v), ("cos", cos), ("sin", sin)):
        if t.dtype != q.dtype:
            raise TypeError(f"{name} must be of q's dtype {q.dtype}, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"q is on {q.device}, {name} on {t.device}: move them together")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.ndim != 3 or t.shape[0] not in (1, batch) or tuple(t.shape[1:]) != (tokens, width):
            raise ValueError(f"{name} must be [{batch} or 1, {tokens}, {width}], got {list(t.shape)}")
    if cos.shape != sin.shape:
        raise ValueError(f"cos and sin must be alike, got {list(cos.shape)} and {list(sin.shape)}")
    check_positions("positions", positions, (batch,) if positions.ndim == 1 else (batch, tokens), q.device)
    check_ring(keys, values, key_scales, value_scales, batch, width, q.dtype, q.device)
    if keys.shape[1] != k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads, the ring {keys.shape[1]}: {list(keys.shape)}")


@torch.library.custom_op(
    "brise::rope_cache_write", mutates_args=("keys", "values", "key_scales", "value_scales")
)
def _rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    _check_impl(impl)
    arguments = (q, k, v, cos, sin, positions, keys, values, key_scales, value_scales)
    _check_rope(*arguments)
    if q.shape[0] == 0 or q.shape[1] == 0:
        return _like(q, q.dtype), _like(k, k.dtype)
    fits = q.shape[3] <= MAX_HEAD_DIM
    if impl == "triton" and not fits:
        raise ValueError(f"impl='triton' takes heads of at most {MAX_HEAD_DIM}, got q {list(q.shape)}")
    if fits and uses_triton(impl, q):
        from . import fused

        return fused.rope_cache_write(*arguments)
    if impl == "auto" and q.device.type == "cpu":
        return fused_cpu.rope_cache_write(*arguments)
    turned = (
        fused_reference.rotate(q, cos, sin).contiguous(),
        fused_reference.rotate(k, cos, sin).contiguous(),
    )
    fused_reference.cache_write(turned[1], v, positions, keys, values, key_scales, value_scales)
    return turned


@_rope.register_fake
def _(q, k, v, cos, sin, positions, keys, values, key_scales, value_scales, impl):
    _check_rope(q, k, v, cos, sin, positions, keys, values, key_scales, value_scales)
    return _like(q, q.dtype), _like(k, k.dtype)
