"""What the ops accept: every wrong shape, dtype, device and layout is an error that carries the values."""

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from . import layout, reference, tuning
from .codebooks import CODEBOOKS
from .reference import BITS, Weight

LAYOUTS = ("portable", "tiles", "cpu_int4")
TENSORS = ("qweight", "scales", "zeros", "scales_absmax", "scales_offset", "scales_map", "g_idx")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def has_triton() -> bool:
    """Whether triton is installed (it is not imported)."""
    return find_spec("triton") is not None


def portable(
    fmt: str, shape: tuple[int, int], qweight: Tensor, scales: Tensor, **rest: Tensor | None
) -> Weight:
    """A checked portable weight."""
    if fmt not in BITS:
        raise ValueError(f"format must be one of {', '.join(BITS)}, got {fmt!r}")
    (n, k), bits = shape, BITS[fmt]
    expect("qweight", qweight, torch.uint8, (n, (k * bits + 7) // 8), fmt, shape)
    if scales.ndim != 2 or scales.shape[0] != n or scales.shape[1] < 1:
        raise ValueError(
            f"scales of a {fmt} weight {list(shape)} must be [{n}, groups], got {list(scales.shape)}"
        )
    groups = scales.shape[1]
    if rest.get("g_idx") is not None:
        expect("g_idx", rest["g_idx"], torch.int32, (k,), fmt, shape)
    elif k % groups:
        raise ValueError(
            f"{groups} groups do not divide K = {k}: scales must be [N, K / group], or give g_idx"
        )
    if rest.get("zeros") is not None:
        if fmt in CODEBOOKS:
            raise ValueError(f"{fmt} has no zero points, got zeros {list(rest['zeros'].shape)}")  # type: ignore[union-attr]
        expect("zeros", rest["zeros"], torch.uint8, (n, (groups * bits + 7) // 8), fmt, shape)
    _check_scales(scales, groups, rest, fmt, shape)
    for name, tensor in rest.items():
        if tensor is not None and tensor.device != qweight.device:
            raise ValueError(f"qweight is on {qweight.device}, {name} on {tensor.device}: move them together")
    if scales.device != qweight.device:
        raise ValueError(f"qweight is on {qweight.device}, scales on {scales.device}: move them together")
    return Weight(fmt, (n, k), qweight, scales, **rest)


def _check_scales(
    scales: Tensor, groups: int, rest: Mapping[str, Tensor | None], fmt: str, shape: tuple[int, int]
) -> None:
    """Floating point; or codes, with all that undoes them."""
    double = {"scales_absmax": (-(-shape[0] * groups // reference.SCALE_BLOCK),), "scales_offset": (1,)}
    double["scales_map"] = (256,)
    if scales.dtype == torch.uint8:
        for name, size in double.items():
            expect(name, rest.get(name), torch.float32, size, fmt, shape)
        return
    if scales.dtype not in FLOATS:
        raise TypeError(
            f"scales must be floating point, or uint8 with double quantization, got {scales.dtype}"
        )
    extra = [name for name in double if rest.get(name) is not None]
    if extra:
        raise ValueError(f"{', '.join(extra)} are for scales in uint8 codes, got scales in {scales.dtype}")


def expect(name: str, t: Tensor | None, dtype: torch.dtype, shape: tuple, fmt: str, weight: tuple) -> None:
    if t is None:
        raise ValueError(
            f"a {fmt} weight {list(weight)} with these scales needs {name}: {dtype} {list(shape)}"
        )
    if t.dtype != dtype:
        raise TypeError(f"{name} of a {fmt} weight {list(weight)} must be {dtype}, got {t.dtype}")
    if tuple(t.shape) != shape:
        raise ValueError(
            f"{name} of a {fmt} weight {list(weight)} must be {list(shape)}, got {list(t.shape)}"
        )
    if not t.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {list(t.stride())}: call .contiguous() once at load"
        )


def check_product(
    x: Tensor, fmt: str, n: int, k: int, layout_name: str, impl: str, t: dict[str, Tensor | None]
) -> None:
    if layout_name not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout_name!r}")
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl must be auto, reference or triton, got {impl!r}")
    if x.ndim < 1 or x.dtype not in FLOATS:
        raise TypeError(f"x must be a floating point tensor [..., K], got {x.dtype} {list(x.shape)}")
    qweight, scales, bias = t["qweight"], t["scales"], t["bias"]
    assert qweight is not None and scales is not None
    for name, tensor in t.items():
        if tensor is not None:
            same_device(x, tensor, name)
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must be [{n}], got {list(bias.shape)}")
    if layout_name == "portable":
        rest = {name: t[name] for name in TENSORS[2:]}
        portable(fmt, (n, k), qweight, scales, **rest)
        return
    size = layout.tiles_bytes(fmt, n, k) if layout_name == "tiles" else n * k // 2
    if qweight.dtype != torch.uint8 or qweight.numel() != size or not qweight.is_contiguous():
        raise ValueError(
            f"x [..., {k}] and N = {n} ask for {size} contiguous bytes of {fmt} codes in {layout_name}, "
            f"got {qweight.dtype} {list(qweight.shape)}"
        )
    # cpu_int4 keeps pairs of scale and offset
    groups = scales.shape[0] if scales.ndim == (3 if layout_name == "cpu_int4" else 2) else 0
    if groups < 1 or k % groups or scales.shape[1] != n or not scales.is_contiguous():
        raise ValueError(
            f"scales in layout {layout_name} must be contiguous [groups, {n}], got {list(scales.shape)}"
        )
    zeros = t.get("zeros")
    if zeros is not None and fmt in CODEBOOKS:
        raise ValueError(f"{fmt} has no zero points, got zeros {list(zeros.shape)}")
    if zeros is not None:
        kind = torch.uint8 if layout_name == "tiles" else torch.float32
        expect("zeros", zeros, kind, (groups, n), fmt, (n, k))
    if t.get("g_idx") is not None:
        raise ValueError(f"layout {layout_name} has no g_idx: pack with layout_name='portable'")
    if layout_name == "tiles":
        _check_scales(scales, groups, t, fmt, (n, k))
    if layout_name == "cpu_int4" and x.dtype != torch.bfloat16:
        raise TypeError(
            f"layout cpu_int4 is for bfloat16 activations, got {x.dtype}: pack with layout_name='portable'"
        )
    if layout_name == "cpu_int4" and impl != "auto":
        raise ValueError(f"layout cpu_int4 has one implementation, torch's: impl must be auto, got {impl!r}")
    if layout_name == "tiles" and not tuning.group_fits(0 if groups == 1 else k // groups):
        raise ValueError(f"tiles take groups of 16, 32, a multiple of 64, or a whole row, got {k // groups}")


def runs_triton(impl: str, layout_name: str, x: Tensor) -> bool:
    """Whether the Triton kernel is to run; says why where it was asked for and cannot."""
    if impl == "reference" or layout_name != "tiles":
        if impl == "triton":
            raise ValueError(
                f"impl='triton' reads layout tiles, got {layout_name}: pack with layout_name='tiles'"
            )
        return False
    if impl == "auto":
        return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and has_triton()
    if not has_triton():
        raise ValueError("impl='triton' needs triton: pip install triton")
    if not x.is_cuda:
        from .launch import interpreting

        if not interpreting():
            raise ValueError(
                f"impl='triton' needs a GPU tensor (or TRITON_INTERPRET=1), got one on {x.device}"
            )
    if x.dtype == torch.float64:
        raise TypeError("impl='triton' takes float16, bfloat16 or float32, got float64")
    return True


def same_device(x: Tensor, tensor: Tensor, name: str = "qweight") -> None:
    """Also called where only shapes are worked out: beside a meta tensor the real op would never be asked."""
    if tensor.device != x.device:
        raise ValueError(f"x is on {x.device}, {name} on {tensor.device}: move the module and x together")


def hold(right: Tensor, message: str, values: Tensor) -> None:
    """An error with the values on a CPU; on a GPU and in a compiled graph an assertion on the device, since
    reading them would stall it."""
    if torch.compiler.is_compiling() or values.device.type != "cpu":
        torch._assert_async(right, message)
    elif not bool(right):
        shown = values.tolist() if values.numel() <= 16 else f"{values.flatten()[:16].tolist()} and more"
        raise ValueError(f"{message}, got {shown}")
