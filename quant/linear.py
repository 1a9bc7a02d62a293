"""QuantLinear and QuantEmbedding: modules whose weight is a QuantizedTensor.

Their buffers carry exactly the names of :func:`brise.quant.tensor.layout`, so a state dict is what goes to disk.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import QuantSpec
from .formats import FORMATS
from .packing import unpack_codes
from .tensor import Params, QuantizedTensor, layout


class _Quantized(nn.Module):
    """Holds the tensors of one quantized weight of ``shape`` (N, K) as buffers."""

    def __init__(
        self, spec: QuantSpec, shape: tuple[int, int], device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.shape = shape
        for name, (dtype, size) in layout(spec, shape).items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=device))

    def quantized(self) -> QuantizedTensor:
        """The weight as a record that shares this module's storage."""
        return QuantizedTensor(
            self.spec, self.shape, {n: self.get_buffer(n) for n in layout(self.spec, self.shape)}
        )

    def set_quantized(self, q: QuantizedTensor) -> None:
        """Take over the tensors of ``q``, without a copy.

        Raises:
            ValueError: another spec or shape.
        """
        if q.spec != self.spec or q.shape != self.shape:
            raise ValueError(f"this module holds {self.spec} {self.shape}, got {q.spec} {q.shape}")
        for name, tensor in q.tensors.items():
            setattr(self, name, tensor)

    def _apply(self, fn, recurse=True):
        """Move with ``.to(device)``, but let no ``.to(dtype)`` or ``.half()`` round the stored scales."""
        stored = self.quantized().tensors
        super()._apply(fn, recurse)
        for name, old in stored.items():
            new = self.get_buffer(name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    def extra_repr(self) -> str:
        s = self.spec
        group = "per channel" if s.group_size is None else f"group {s.group_size}"
        dq = ", double quantization" if s.double_quant else ""
        return f"{list(self.shape)}, {s.format}, {group}, {'' if s.symmetric else 'asymmetric, '}{s.algorithm}{dq}"


class QuantLinear(_Quantized):
    """y = x W^T + b with a quantized W [out_features, in_features]; a drop-in for nn.Linear in the forward pass.

    The gradient flows to x (adapters train on top); the codes are fixed.
    """

    def __init__(
        self,
        spec: QuantSpec,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(spec, (out_features, in_features), device)
        self.in_features = in_features
        self.out_features = out_features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)

    @classmethod
    def from_quantized(cls, q: QuantizedTensor, bias: Tensor | None = None) -> QuantLinear:
        module = cls(q.spec, q.shape[1], q.shape[0], bias, device="meta")
        module.set_quantized(q)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] of any float dtype -> [..., out_features] of the same dtype."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected an input [..., {self.in_features}], got {list(x.shape)}")
        weight = self.quantized().dequantize(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


class QuantEmbedding(_Quantized):
    """Rows of a quantized table [num_embeddings, embedding_dim]; only the rows asked for are decoded."""

    def __init__(
        self,
        spec: QuantSpec,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(spec, (num_embeddings, embedding_dim), device)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.dtype = dtype

    @classmethod
    def from_quantized(
        cls, q: QuantizedTensor, dtype: torch.dtype, padding_idx: int | None = None
    ) -> QuantEmbedding:
        """``dtype`` is what the rows are decoded to: the model's."""
        module = cls(q.spec, q.shape[0], q.shape[1], dtype, padding_idx, device="meta")
        module.set_quantized(q)
        return module

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.get_buffer("qweight").device)).dtype
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., embedding_dim] of the module's dtype."""
        rows, index = torch.unique(ids, return_inverse=True)
        if rows.numel() and (int(rows[0]) < 0 or int(rows[-1]) >= self.num_embeddings):
            raise IndexError(
                f"token ids must be 0..{self.num_embeddings - 1}, got {int(rows[0])}..{int(rows[-1])}"
            )
        return nn.functional.embedding(index, self._rows(rows).to(self.dtype))

    def _rows(self, rows: Tensor) -> Tensor:
        """Decode the rows [R] named: fp32 [R, embedding_dim]."""
        q = self.quantized()
        fmt = FORMATS[q.spec.format]
        params = q.params()
        taken = Params(params.scale[rows], None if params.zero is None else params.zero[rows], params.g_idx)
        codes = unpack_codes(q.tensors["qweight"][rows], fmt.bits, q.shape[1])
        scale, zero = taken.per_channel(q.shape[1])
        return fmt.decode(codes, scale, zero)
