"""A quantized weight made ready for the products: which layout, how it gets there and back.

* ``portable``: what is on disk, see :mod:`.reference`. Any device; on a CPU decoded block by block.
* ``tiles``: what the Triton kernels read, see :mod:`.layout`. Invertible to the bit.
* ``cpu_int4``: torch's own packed int4 for bf16 activations on a CPU. Not invertible: keep the portable
  tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import cpu, layout, reference, tuning
from .checks import LAYOUTS, TENSORS, has_triton, portable
from .reference import Weight


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] made ready for :func:`quant_matmul`: tensors by name, in one of the layouts."""

    format: str
    shape: tuple[int, int]
    layout: str
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def pack_weight(
    tensors: dict[str, Tensor],
    fmt: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    scales_map: Tensor | None = None,
    layout_name: str = "auto",
) -> PackedWeight:
    """Re-pack a stored weight, once at load, into the layout that is fastest on its device.

    Args:
        tensors: the portable tensors by name, on the device where the products will run.
        fmt: nf4, fp4, int8, int4, int3 or int2.
        shape: (N, K).
        dtype: of the activations that will come.
        scales_map: fp32 [256], the values of double-quantized scale codes; needed only with those.
        layout_name: one of :data:`LAYOUTS`, or ``auto``: tiles on a GPU with triton where the kernels take
            the group
            size, cpu_int4 for int4 and bf16 on a CPU without a C compiler, portable otherwise.

    Raises:
        ValueError, TypeError: tensors that do not fit together, or a layout that cannot hold this weight.
    """
    given = {name: t for name, t in tensors.items() if t is not None}
    if unknown := set(given) - set(TENSORS):
        raise ValueError(f"unknown tensors {sorted(unknown)}; a weight has {', '.join(TENSORS)}")
    if scales_map is not None and "scales_absmax" in given:
        given["scales_map"] = scales_map
    w = portable(fmt, shape, **given)
    group = 0 if w.groups == 1 else shape[1] // w.groups
    tileable = w.g_idx is None and tuning.group_fits(group)
    choice = layout_name
    if choice == "auto":
        choice = "portable"
        if w.qweight.is_cuda and tileable and dtype in (torch.float16, torch.bfloat16) and has_triton():
            choice = "tiles"
        elif w.qweight.is_cpu and dtype == torch.bfloat16 and cpu.can_pack_int4(w) and cpu.has_vectors():
            # as fast as the compiled product, which needs no second copy, but here without a compiler
            choice = "cpu_int4" if cpu.compiled_for(w, dtype) is None else "portable"
    if choice == "portable":
        return PackedWeight(fmt, shape, choice, given)
    if choice == "tiles":
        if not tileable:
            what = "with g_idx" if w.g_idx is not None else f"in groups of {group}"
            raise ValueError(
                f"tiles take groups of 16, 32, a multiple of 64, or a whole row, got a weight {what}"
            )
        return PackedWeight(fmt, shape, choice, layout.tile_weight(w))
    if choice != "cpu_int4":
        raise ValueError(f"layout must be auto or one of {', '.join(LAYOUTS)}, got {choice!r}")
    if not cpu.can_pack_int4(w):
        raise ValueError(
            f"cpu_int4 takes int4, groups of 32 to 256, N a multiple of 64; got {fmt} {list(shape)}"
        )
    codes, pairs, remainder = cpu.pack_int4(w)
    packed = {"qweight": codes, "scales": pairs}
    if w.zeros is not None:
        packed["zeros"] = remainder
    return PackedWeight(fmt, shape, choice, packed)


def unpack_weight(packed: PackedWeight) -> dict[str, Tensor]:
    """The portable tensors of a packed weight, equal to the bit to those it was packed from (without
    ``scales_map``).

    Raises:
        ValueError: the layout is cpu_int4, which cannot be undone.
    """
    if packed.layout == "cpu_int4":
        raise ValueError("cpu_int4 cannot be undone: keep the portable tensors where they have to be saved")
    if packed.layout == "portable":
        return {name: t for name, t in packed.tensors.items() if name != "scales_map"}
    w = layout.untile_weight(packed.tensors, packed.format, packed.shape)
    found = {name: getattr(w, name) for name in TENSORS if name != "scales_map"}
    return {name: t for name, t in found.items() if t is not None}


def dequantize(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The dense weight [N, K] in ``dtype``."""
    if w.layout == "cpu_int4":
        raise ValueError("cpu_int4 cannot be undone: dequantize the portable tensors")
    return dense(w.format, w.layout, w.shape, dtype, *(w.tensors.get(name) for name in TENSORS))


def weight_of(fmt: str, layout_name: str, shape: tuple[int, int], t: tuple[Tensor | None, ...]) -> Weight:
    given = {name: tensor for name, tensor in zip(TENSORS, t) if tensor is not None}
    if layout_name == "tiles":
        return layout.untile_weight(given, fmt, shape)
    return Weight(fmt, shape, **given)  # type: ignore[arg-type]


def dense(
    fmt: str, layout_name: str, shape: tuple[int, int], dtype: torch.dtype, *t: Tensor | None
) -> Tensor:
    if (
        layout_name == "tiles"
        and t[0] is not None
        and t[0].is_cuda
        and dtype != torch.float64
        and has_triton()
    ):
        from . import launch

        assert t[1] is not None
        return launch.dequantize(dtype, fmt, shape, t[0], t[1], t[2], t[3], t[4], t[5])
    return reference.dequantize(weight_of(fmt, layout_name, shape, t), dtype)
