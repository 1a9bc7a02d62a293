"""The products with quantized weights as torch custom ops: checked, with fakes and gradients to x.

``impl`` chooses who computes: ``auto`` (by device and layout), ``reference`` (the plain oracle) or
``triton``. Importing this module neither needs triton nor asks for a device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# by their own names, as this is asked at every product: between two others what a name leads to is out of the caches
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import cpu, reference, tuning
from .checks import FLOATS, TENSORS, check_product, portable, runs_triton, same_device
from .cpu_direct import Direct
from .reference import BITS
from .weights import PackedWeight, dense, weight_of


def quant_matmul(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None = None,
    *,
    impl: str = "auto",
    batch_invariant: bool = False,
) -> Tensor:
    """x [..., K] @ W^T (+ bias [N]) -> [..., N] in x's dtype, with a gradient to x (and to the bias),
    and in forward mode a tangent.

    Args:
        batch_invariant: a row's bits do not depend on the other rows.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    t = tuple(map(w.tensors.get, TENSORS))
    if needs_no_op(x, bias, t):
        return _product(w.format, x, t, bias, w.shape[0], w.layout, impl, batch_invariant)
    if forward_ad._current_level >= 0:
        # torch's custom ops would drop a tangent without a word; that of a product is the product of it
        x, along = forward_ad.unpack_dual(x)
        bias, shift = (None, None) if bias is None else forward_ad.unpack_dual(bias)
        if along is not None or shift is not None:
            along = torch.zeros_like(x) if along is None else along
            options: dict[str, Any] = {"impl": impl, "batch_invariant": batch_invariant}
            moved = quant_matmul(along, w, shift, **options)
            return forward_ad.make_dual(quant_matmul(x, w, bias, **options), moved)
    op = getattr(torch.ops.brise, f"{w.format}_matmul")
    return op(x, *t, bias, w.shape[0], w.layout, impl, batch_invariant)


def needs_no_op(x: Tensor, bias: Tensor | None, t: Sequence[Tensor | None] = ()) -> bool:
    """Whether nobody looks at the op: no gradient, no compiler, no mode. Its dispatch takes as long as a small product
    on a CPU."""
    # asked first: of what comes after, a compiler can make nothing
    if is_compiling() or not x.is_cpu or type(x) is not Tensor:
        return False
    if _len_torch_dispatch_stack() or _is_tracing() or forward_ad._current_level >= 0:
        return False
    if peek_interpreter_stack() is not None:  # of torch.func
        return False
    if not torch.is_grad_enabled():
        return True
    return not (x.requires_grad or any(a is not None and a.requires_grad for a in (bias, *t)))


def direct(w: PackedWeight, dtype: torch.dtype) -> Direct | None:
    """The product of few rows of ``dtype`` on a CPU with nothing in between; None where no compiled code takes it."""
    if w.layout != "portable" or not w.tensors["qweight"].is_cpu:
        return None
    return Direct.of(weight_of(w.format, w.layout, w.shape, tuple(map(w.tensors.get, TENSORS))), dtype)


def _product(
    fmt: str, x: Tensor, t: tuple[Tensor | None, ...], bias, n, layout_name, impl, invariant
) -> Tensor:
    k = x.shape[-1]
    check_product(x, fmt, n, k, layout_name, impl, dict(zip((*TENSORS, "bias"), (*t, bias))))
    rows = x.reshape(-1, k)
    if runs_triton(impl, layout_name, x):
        from . import launch

        most = tuning.crossover(fmt, launch.architecture(x.device))
        if impl == "auto" and not invariant and rows.shape[0] > most:
            full = dense(fmt, layout_name, (n, k), x.dtype, *t)
            out = torch.nn.functional.linear(rows, full, None if bias is None else bias.to(x.dtype))
        else:
            assert t[0] is not None and t[1] is not None
            out = launch.matmul(rows, fmt, n, t[0], t[1], t[2], t[3], t[4], t[5], bias, invariant)
    elif layout_name == "cpu_int4":
        assert t[0] is not None and t[1] is not None
        out = cpu.matmul_int4pack(rows, t[0], t[1], t[2], bias, invariant)
    elif impl == "reference" and not invariant:
        out = reference.matmul(rows, weight_of(fmt, layout_name, (n, k), t), bias)
    elif x.is_cpu:
        out = cpu.matmul(rows, weight_of(fmt, layout_name, (n, k), t), bias, invariant)
    else:
        full = dense(fmt, layout_name, (n, k), x.dtype, *t)
        added = None if bias is None else bias.to(x.dtype)
        parts = [
            torch.nn.functional.linear(row, full, added)
            for row in rows.split(1 if invariant else max(1, rows.shape[0]))
        ]
        out = torch.cat(parts)
    return out.view(*x.shape[:-1], n)


def _product_backward(
    fmt: str, grad: Tensor, t: tuple[Tensor | None, ...], k: int, layout_name: str
) -> Tensor:
    n = grad.shape[-1]
    rows = grad.reshape(-1, n)
    if layout_name == "cpu_int4":
        # the product with a unit matrix decodes it, a block of input channels at a time
        out = torch.empty(rows.shape[0], k, dtype=grad.dtype, device=grad.device)
        assert t[0] is not None and t[1] is not None
        for start in range(0, k, 512):
            unit = torch.zeros(min(512, k - start), k, dtype=torch.bfloat16)
            unit[:, start : start + 512].fill_diagonal_(1)
            out[:, start : start + 512] = rows @ cpu.matmul_int4pack(unit, t[0], t[1], t[2], None, False).T
    elif grad.is_cuda:
        out = rows @ dense(fmt, layout_name, (n, k), grad.dtype, *t)
    else:
        out = cpu.matmul_backward(rows, weight_of(fmt, layout_name, (n, k), t))
    return out.view(*grad.shape[:-1], k)


def _define(fmt: str) -> None:
    """Register ``brise::<fmt>_matmul`` and its gradient to x."""

    @torch.library.custom_op(f"brise::{fmt}_matmul", mutates_args=())
    def matmul(
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        scales_absmax: Tensor | None,
        scales_offset: Tensor | None,
        scales_map: Tensor | None,
        g_idx: Tensor | None,
        bias: Tensor | None,
        n: int,
        layout_name: str,
        impl: str,
        batch_invariant: bool,
    ) -> Tensor:
        t = (qweight, scales, zeros, scales_absmax, scales_offset, scales_map, g_idx)
        return _product(fmt, x, t, bias, n, layout_name, impl, batch_invariant)

    @torch.library.custom_op(f"brise::{fmt}_matmul_backward", mutates_args=())
    def backward(
        grad: Tensor,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        scales_absmax: Tensor | None,
        scales_offset: Tensor | None,
        scales_map: Tensor | None,
        g_idx: Tensor | None,
        k: int,
        layout_name: str,
    ) -> Tensor:
        t = (qweight, scales, zeros, scales_absmax, scales_offset, scales_map, g_idx)
        return _product_backward(fmt, grad, t, k, layout_name)

    @matmul.register_fake
    def _(
        x,
        qweight,
        scales,
        zeros,
        absmax,
        offset,
        scales_map,
        g_idx,
        bias,
        n,
        layout_name,
        impl,
        batch_invariant,
    ):
        same_device(x, qweight)
        return x.new_empty((*x.shape[:-1], n))

    @backward.register_fake
    def _(grad, qweight, scales, zeros, absmax, offset, scales_map, g_idx, k, layout_name):
        return grad.new_empty((*grad.shape[:-1], k))

    def setup(ctx, inputs, output):
        asking = [name for name, asks in zip(TENSORS, ctx.needs_input_grad[1:8]) if asks]
        if asking:
            raise ValueError(
                f"{fmt}_matmul has gradients to x and to the bias, none to {', '.join(asking)} of the weight: detach() "
                "them, or train what is dequantized"
            )
        ctx.save_for_backward(*inputs[1:8])
        ctx.k, ctx.layout_name = inputs[0].shape[-1], inputs[10]
        ctx.bias_dtype = None if inputs[8] is None else inputs[8].dtype

    def gradient(ctx, grad):
        op = getattr(torch.ops.brise, f"{fmt}_matmul_backward")
        dx = op(grad, *ctx.saved_tensors, ctx.k, ctx.layout_name) if ctx.needs_input_grad[0] else None
        db = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[8] else None
        return (dx, *(None,) * 7, db, *(None,) * 4)

    matmul.register_autograd(gradient, setup_context=setup)


for _fmt in BITS:
    _define(_fmt)


@torch.library.custom_op("brise::int8_dynamic_matmul", mutates_args=())
def _int8_dynamic(
    x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, threshold: float, impl: str
) -> Tensor:
    if x.dtype not in FLOATS[:3]:
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    k = x.shape[-1]
    w = portable("int8", (qweight.shape[0], k), qweight, scales)
    if w.groups != 1:
        raise ValueError(
            f"int8 activations need one scale a row: scales [{w.shape[0]}, 1], got {list(scales.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (w.shape[0],):
        raise ValueError(f"bias must be [{w.shape[0]}], got {list(bias.shape)}")
    same_device(x, qweight)
    if k > (2**31 - 1) // (127 * 128):
        raise ValueError(f"K must be at most {(2**31 - 1) // (127 * 128)} for int32 sums, got {k}")
    rows = x.reshape(-1, k)
    if runs_triton(impl, "tiles", x):
        from . import launch

        outlier = reference.outlier_columns(rows, threshold).to(torch.uint8) if threshold > 0 else None
        out = launch.int8_dynamic_matmul(rows, qweight, reference.scales(w)[:, 0].contiguous(), outlier, bias)
    elif impl == "auto" and x.device.type == "cpu":
        out = cpu.int8_dynamic_matmul(rows, w, bias, threshold)
    else:
        out = reference.int8_dynamic_matmul(rows, w, bias, threshold)
    return out.view(*x.shape[:-1], w.shape[0])


@_int8_dynamic.register_fake
def _(x, qweight, scales, bias, threshold, impl):
    same_device(x, qweight)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def int8_dynamic_matmul(
    x: Tensor, w: PackedWeight, bias: Tensor | None = None, *, threshold: float = 0.0, impl: str = "auto"
) -> Tensor:
    """x [..., K] rounded to int8 a token, times int8 W^T -> [..., N] in x's dtype (no gradient).

    Args:
        w: int8, per channel, symmetric, in layout portable.
        threshold: input channels with an activation this large in any row stay in floating point (LLM.int8
            uses 6.0;
            0: none). Which they are depends on the whole batch.
    """
    if w.format != "int8" or w.layout != "portable" or len(w.tensors) != 2:
        got = f"{w.format} in layout {w.layout} with {', '.join(w.tensors)}"
        raise ValueError(f"needs a portable int8 weight with qweight and float scales only, got {got}")
    return torch.ops.brise.int8_dynamic_matmul(
        x, w.tensors["qweight"], w.tensors["scales"], bias, threshold, impl
    )
