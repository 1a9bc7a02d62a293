"""A decode step in five launches a layer, for blocks whose projections are all read by the Triton kernels:

1. norm, q, k and v, their rotation and the write into the ring;
2. attention over the ring;
3. the output projection and the residual;
4. norm, gate and up, SwiGLU;
5. the down projection and the residual.

The norms in 1 and 4 are begun by the product before (kernels/matmul_epilogue.py). That leaves a stream times a weight
in memory that is not normalised. fp16 ends at 65504, and the stream of a Mistral has single channels of hundreds, times
weights that may be large as well: in fp16 each norm is a launch of its own, so a layer takes seven. An int8 ring wants
the scales of whole heads, which no one program of the product holds: the first norm, product and rotation are then
three launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import tuning
from ..kernels.ops import (
    HalfNormed,
    PackedWeight,
    has_triton,
    matmul_residual,
    matmul_rope_cache_write,
    matmul_swiglu,
    quant_matmul,
    rms_norm,
)
from .decode_attend import Attention, StepAttention

if TYPE_CHECKING:
    from .decode_step import DecodeModel, LayerWeights

# widest unit that must not be cut: half a head is whole tiles of 16 rows
_HEAD_UNIT = 32
# dtypes in which a stream times a norm's weight can be held
_WIDE = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class FusedLayer:
    """One block; norms are vectors [D]."""

    attention_norm: Tensor
    qkv: PackedWeight
    o: PackedWeight
    mlp_norm: Tensor
    gate_up: PackedWeight
    down: PackedWeight


class FusedStep:
    """The blocks of a model, for steps.

    Args:
        rows: above which the launches on their own are the better way.
        invariant: no row depends, in any bit, on the others; nor then on how many there are, so there is no such limit.

    Attributes:
        impl: of the ops.
    """

    def __init__(self, layers: Sequence[FusedLayer], eps: float, rows: int, invariant: bool) -> None:
        self.layers, self.eps, self.rows, self.invariant = layers, eps, rows, invariant
        self.impl = "auto"
        self.half_norms = layers[0].attention_norm.dtype in _WIDE

    def takes(self, attend: Attention, rows: int) -> bool:
        """Whether this is a step of so few rows."""
        return isinstance(attend, StepAttention) and (self.invariant or rows <= self.rows)

    def hidden(self, x: Tensor, attend: StepAttention) -> Tensor:
        """Embedded tokens [B, T, D] -> hidden states [B, T, D] before the last norm."""
        h = x.flatten(0, 1)
        into: Tensor | HalfNormed = self._norm(h, self.layers[0].attention_norm)
        how: dict[str, Any] = {"impl": self.impl, "batch_invariant": self.invariant}
        for i, w in enumerate(self.layers):
            context = self._attend(i, into, attend)
            h, half = matmul_residual(context, w.o, h, w.mlp_norm if self.half_norms else None, **how)
            gated = matmul_swiglu(
                self._norm(h, w.mlp_norm) if half is None else half, w.gate_up, self.eps, **how
            )
            following = self.layers[i + 1].attention_norm if i + 1 < len(self.layers) else None
            begun = following if self.half_norms and not self._int8(attend) else None
            h, half = matmul_residual(gated, w.down, h, begun, **how)
            if half is not None:
                into = half
            elif following is not None:
                into = self._norm(h, following)
        return h.view(x.shape)

    def _norm(self, h: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(h, weight, self.eps, impl=self.impl)[0]

    @staticmethod
    def _int8(attend: StepAttention) -> bool:
        return attend.cache.layers[0].key_scales is not None

    def _attend(self, i: int, x: Tensor | HalfNormed, attend: StepAttention) -> Tensor:
        """-> [B * T, H * head_dim]."""
        cache, (cos, sin) = attend.cache, attend.turn
        how: dict[str, Any] = {"impl": self.impl, "batch_invariant": self.invariant}
        qkv = self.layers[i].qkv
        if isinstance(x, Tensor) and self._int8(attend):
            y = quant_matmul(x, qkv, **how)
            q, k, v = attend.heads.cut(y.view(cos.shape[0], cos.shape[1], -1))
            return cache.step(i, q, k, v, cos, sin, attend.positions, **how).flatten(2).flatten(0, 1)
        ring = cache.layers[i]
        q = matmul_rope_cache_write(
            x, qkv, cos, sin, attend.positions, ring.keys, ring.values, self.eps, **how
        )
        return cache.attend(i, q, **how).flatten(2).flatten(0, 1)


def fused_step(model: DecodeModel, fused: bool | None) -> FusedStep | None:
    """What runs a model's steps, or None where the launches on their own do.

    Args:
        fused: True: wherever the weights allow it; False: never; None: on a GPU, for as many rows as the tables say.
    Raises:
        ValueError: ``fused`` is True, and the weights do not allow it.
    """
    if fused is False or not model.steps:
        return None
    if fused is None and not (model.device.type == "cuda" and has_triton() and tuning.STEP_ROWS > 0):
        return None
    made = _layers(model)
    if isinstance(made, str):
        if fused:
            raise ValueError(f"this model's steps cannot be fused: {made}; leave fused away")
        return None
    return FusedStep(made, model.eps, tuning.ALL if fused else tuning.STEP_ROWS, model.invariant)


def _layers(model: DecodeModel) -> list[FusedLayer] | str:
    """The blocks, or why they cannot be fused, in words."""
    if not model.silu:
        return f"{model.config.hidden_act} is no silu"
    if model.heads.width % _HEAD_UNIT:
        return f"heads of {model.heads.width} are no multiples of {_HEAD_UNIT}"
    layers: list[FusedLayer] = []
    for w in model.steps:
        made = _layer(w, model.dtype)
        if isinstance(made, str):
            return made
        layers.append(made)
    return layers


def _layer(w: LayerWeights, dtype: torch.dtype) -> FusedLayer | str:
    packed: list[PackedWeight] = []
    for projection in (w.qkv, w.o, w.gate_up, w.down):
        layer = projection.whole
        if layer is None or layer.bias is not None:
            return projection.separate or "not all projections are quantized and without bias"
        weight = layer.packed(dtype)
        if weight.layout != "tiles":
            return f"{weight.format} is in layout {weight.layout}"
        packed.append(weight)
    for norm in (w.attention_norm, w.mlp_norm):
        if norm.dtype != dtype:
            return f"norms of {norm.dtype} beside activations of {dtype}"
    qkv, o, gate_up, down = packed
    return FusedLayer(w.attention_norm, qkv, o, w.mlp_norm, gate_up, down)
