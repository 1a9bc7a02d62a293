"""A whole decode step on a CPU as one call of the compiled code: all blocks of the model for the newest tokens.

Between the operators of a step the memory stands idle, and at batch 1 reading the weights is all the time that a step
has to take; see ``native_step.h``, whose structs are laid out here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import native, reference
from .native_weights import NativeWeight, addresses, described, stored
from .reference import Weight

_FLOATS = ctypes.c_void_p
_SCRATCH = ("qkv", "context", "gate_up", "gated", "branch", "parts", "own")


class _Block(ctypes.Structure):
    _fields_ = [
        ("attention_norm", _FLOATS),
        ("mlp_norm", _FLOATS),
        *((name, NativeWeight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("keys", _FLOATS),
        ("values", _FLOATS),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.POINTER(_Block)),
        *(
            (name, ctypes.c_int64)
            for name in (
                "threads", "layers", "texts", "tokens", "width", "heads", "groups", "head", "inner", "slots", "window",
            )
        ),
        ("eps", ctypes.c_double),
        ("scale", ctypes.c_double),
        *((name, _FLOATS) for name in ("cos", "sin", "first", "seen", "x", *_SCRATCH)),
    ]  # fmt: skip


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _SCRATCH]


@dataclass(frozen=True)
class StepWeight:
    """A weight [N, K] that the step takes: dense fp32, or quantized; it reads the tensors as they are stored."""

    weight: Tensor | Weight

    @classmethod
    def of(cls, weight: Tensor | Weight, library: ctypes.CDLL) -> StepWeight | None:
        """``weight`` as it is; None where the compiled code does not take it."""
        lanes = library.brise_lanes()
        if isinstance(weight, Tensor):
            dense = weight.dtype == torch.float32 and weight.is_contiguous() and weight.is_cpu
            return None if not dense or weight.shape[1] % lanes else cls(weight)
        k = weight.shape[1]
        if weight.g_idx is not None or not weight.qweight.is_cpu or k % lanes:
            return None
        if not native.takes(weight.format, k, weight.groups, library):
            return None
        return cls(stored(weight))

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def bits(self) -> int:
        """Of a code; 32 where it is dense."""
        return 32 if isinstance(self.weight, Tensor) else reference.BITS[self.weight.format]

    def described(self) -> NativeWeight:
        if isinstance(self.weight, Tensor):
            return NativeWeight(
                codes=self.weight.data_ptr(), n=self.shape[0], k=self.shape[1], groups=1, bits=32
            )
        return described(self.weight)


@dataclass(frozen=True)
class StepBlock:
    """One block: norms fp32 [D], and its seven weights."""

    attention_norm: Tensor
    mlp_norm: Tensor
    q: StepWeight
    k: StepWeight
    v: StepWeight
    o: StepWeight
    gate: StepWeight
    up: StepWeight
    down: StepWeight


class NativeStep:
    """The blocks of a model, for tokens that follow what a cache holds; fp32, on a CPU.

    A token's result does not depend, in any bit, on the others, nor on how many threads there are.

    Args:
        blocks: in order; kept alive, as the compiled code reads them.
        heads, groups, head: query heads, KV heads, and the width of each.
        scale: of the scores.
    Raises:
        ValueError: widths that are not whole vectors of ``library``, or weights that do not fit together.
    """

    def __init__(
        self,
        blocks: Sequence[StepBlock],
        heads: int,
        groups: int,
        head: int,
        eps: float,
        scale: float,
        library: ctypes.CDLL,
    ) -> None:
        self.library, self.blocks = library, list(blocks)
        width, inner = blocks[0].o.shape[0], blocks[0].gate.shape[0]
        lanes = library.brise_lanes()
        if any(size % lanes for size in (width, inner, head)):
            raise ValueError(
                f"the compiled step takes widths of whole vectors of {lanes}, got a model of {width}, "
                f"MLPs of {inner} and heads of {head}"
            )
        own, other = (heads * head, width), (groups * head, width)
        expected = {"q": own, "k": other, "v": other, "o": (width, heads * head)}
        expected |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        for i, block in enumerate(blocks):
            for name, shape in expected.items():
                if (found := getattr(block, name).shape) != shape:
                    raise ValueError(f"{name} of block {i} must be {list(shape)}, got {list(found)}")
        self._array = (_Block * len(blocks))(*map(_block, blocks))
        self._fixed = {
            "layers": len(blocks), "width": width, "heads": heads, "groups": groups, "head": head, "inner": inner,
            "eps": eps, "scale": scale,
        }  # fmt: skip

    def __call__(
        self,
        x: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        cos: Tensor,
        sin: Tensor,
        first: Tensor,
        seen: Tensor,
        window: int | None,
    ) -> Tensor:
        """The embedded tokens through all blocks; their keys and values go into the rings.

        Args:
            x: fp32 [B, T, D].
            keys, values: of each layer, fp32 [B, KV, W, head], contiguous; changed in place.
            cos, sin: fp32 [B, T, head].
            first: int32 [B], the position of the first token; -1 where the text rests: nothing is written.
            seen: int32 [B], positions of each text, these tokens included.
            window: as in ``decode_attention``.
        Returns:
            fp32 [B, T, D], before the last norm; of texts that rest, something of no meaning.
        """
        texts, tokens, _ = x.shape
        out = x.clone(memory_format=torch.contiguous_format)
        held = {"cos": cos.contiguous(), "sin": sin.contiguous(), "first": first, "seen": seen, "x": out}
        # a copy of the array, so that two threads of one program may step at once
        blocks = type(self._array)(*self._array)
        for block, k, v in zip(blocks, keys, values, strict=True):
            block.keys, block.values = addresses(k, v)
        step = _Step(
            blocks=blocks,
            threads=torch.get_num_threads(), texts=texts, tokens=tokens, slots=keys[0].shape[2], window=window or 0,
            **self._fixed, **dict(zip(held, addresses(*held.values()))),
        )  # fmt: skip
        sizes = _Sizes()
        self.library.brise_step_sizes(ctypes.byref(step), ctypes.byref(sizes))
        counts = [getattr(sizes, name) for name in _SCRATCH]
        scratch = torch.empty(sum(counts), dtype=torch.float32)
        for name, part in zip(_SCRATCH, scratch.split(counts)):
            setattr(step, name, part.data_ptr())
        self.library.brise_step(ctypes.byref(step))
        return out


def _block(block: StepBlock) -> _Block:
    parts = {
        f.name: part.described()
        for f in fields(block)
        if isinstance(part := getattr(block, f.name), StepWeight)
    }
    norms = addresses(block.attention_norm, block.mlp_norm)
    return _Block(attention_norm=norms[0], mlp_norm=norms[1], **parts)
