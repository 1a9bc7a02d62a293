"""The compiled product of few rows on a CPU, for a layer that multiplies by one weight again and again."""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from . import cpu, native
from .reference import Weight


class Direct:
    """All that :func:`.cpu.matmul` asks of a weight, asked once: at one row, asking takes as long as the product does.

    Args:
        w: checked (:func:`.checks.portable`); its tensors are held, and read at every product.
    """

    def __init__(self, w: Weight, compiled: CDLL) -> None:
        self.compiled, self.shape = compiled, w.shape
        # numbers of x up to which it is the faster way
        self.most = {dtype: cpu.few_rows(w, dtype, compiled) * w.shape[1] for dtype in native.DTYPES}
        self.weight = native.stored(w)
        self.described = native.described(self.weight)
        names = ("qweight", "scales", "zeros", "scales_absmax", "scales_offset", "scales_map")
        held = {name: getattr(self.weight, name) for name in names}
        self.places = [(name, t.data_ptr()) for name, t in held.items() if t is not None]

    @classmethod
    def of(cls, w: Weight, dtype: torch.dtype) -> Direct | None:
        """None where the compiled code does not take this weight as it is stored, or activations of ``dtype``."""
        compiled = cpu.compiled_for(w, dtype)
        return None if compiled is None or native.stored(w) is not w else cls(w, compiled)

    def takes(self, x: Tensor, batch_invariant: bool) -> bool:
        """Whether it is for these rows [..., K]; else the way is :func:`.cpu.matmul`'s."""
        most = self.most.get(x.dtype)
        return (
            most is not None and native.active() is self.compiled and (batch_invariant or x.numel() <= most)
        )

    def __call__(self, x: Tensor, bias: Tensor | None, batch_invariant: bool) -> Tensor:
        """x [..., K] on the CPU @ W^T (+ bias [N]) -> [..., N] in x's dtype, the bits of :func:`.cpu.matmul`."""
        return native.multiply(x, self.described, self.shape, bias, self.compiled, batch_invariant)
