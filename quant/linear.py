"""QuantLinear and QuantEmbedding: modules whose weight is a QuantizedTensor.

Their buffers carry exactly the names of :func:`brise.quant.tensor.layout`, so a state dict is what goes to disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.checks import TENSORS
from ..kernels.cpu import INT4PACK_ROWS
from ..kernels.ops import Direct, PackedWeight, direct, needs_no_op, pack_weight, quant_matmul, unpack_weight
from .config import QuantSpec
from .double_quant import dynamic_map
from .formats import FORMATS, IMPORTED
from .packing import unpack_codes
from .tensor import Params, QuantizedTensor, layout

# prefix of the buffers that hold a weight in the layout of the kernels; they are never saved
_PACKED = "packed_"


class _Quantized(nn.Module):
    """Holds the tensors of one quantized weight of ``shape`` (N, K) as buffers."""

    def __init__(
        self, spec: QuantSpec, shape: tuple[int, int], device: torch.device | str | None = None
    ) -> None:
        nn.Module.__init__(
            self
        )  # not the next in line, which in a QuantLinear is nn.Linear and would make a weight
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


@torch.compiler.assume_constant_result
def _exporting() -> bool:
    """Asked outside the trace: inside, torch 2.11 answers True under ``torch.compile`` as well."""
    return torch.compiler.is_exporting()


class QuantLinear(_Quantized, nn.Linear):
    """y = x W^T + b with a quantized W [out_features, in_features]; a drop-in for nn.Linear in the forward pass.

    The products are those of :mod:`brise.kernels.ops`. Before the first one (and the first after a move) the
    weight is re-packed into the layout that is fastest for its device and the dtype of x. What is saved is always
    the portable form, to the bit. On a GPU the packed form takes its place in memory, and ``quantized()`` and
    ``state_dict()`` undo it. A CPU multiplies by the stored form; torch's packed int4, for bf16 where there is no C
    compiler, cannot be undone and lies beside it, half a byte a weight more. A stored tensor is replaced by
    assigning it: one that is changed in place after a product is not seen.

    The gradient flows to x; the codes are fixed. So adapters train on top. It is an nn.Linear, as peft adapts no other,
    whose ``weight`` is None: a dense copy is never made unasked. So peft cannot merge an adapter into it.

    Attributes:
        batch_invariant: a row of y does not depend, in any bit, on the other rows of x; see :func:`batch_invariant`.
        tied: the stored tensors are those of an embedding as well, which reads them as they are: they stay.
        layout: of the packed form, one of :data:`brise.kernels.checks.LAYOUTS`; "portable" where there is none.
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
        self.register_parameter("weight", None)
        # a parameter stays the one it is, with what transformers notes on it: else it would be made anew there
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
        self.register_parameter("bias", bias)
        self.batch_invariant = False
        self.tied = False
        self.layout = "portable"
        self._prepared: tuple[torch.dtype, ...] = ()
        self._direct: Direct | None = None
        for name in TENSORS:
            self.register_buffer(_PACKED + name, None, persistent=False)

    @classmethod
    def from_quantized(cls, q: QuantizedTensor, bias: Tensor | None = None) -> QuantLinear:
        module = cls(q.spec, q.shape[1], q.shape[0], bias, device="meta")
        module.set_quantized(q)
        return module

    def quantized(self) -> QuantizedTensor:
        """The weight as a record. It shares this module's storage, but where that holds the packed form only."""
        if self._buffers["qweight"] is not None:
            return super().quantized()
        return QuantizedTensor(self.spec, self.shape, unpack_weight(self._weight(self.layout)))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] of any float dtype -> [..., out_features] of the same dtype (autocast's under it)."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected an input [..., {self.in_features}], got {list(x.shape)}")
        bias = self.bias
        if needs_no_op(x, bias) and self._multiplies_directly(x, bias):
            assert self._direct is not None
            return self._direct(x, bias, self.batch_invariant)
        if self.spec.format in IMPORTED:  # no kernel knows those
            weight = self.quantized().dequantize(x.dtype)
            return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if _exporting():
            if x.dtype not in self._prepared:
                raise RuntimeError(
                    f"call prepare({x.dtype}) on every QuantLinear before the model is exported"
                )
        # a compiler must not look whether it has been done: its guards would fail as soon as it is
        elif torch.compiler.is_compiling() or x.dtype not in self._prepared:
            self.prepare(x.dtype)
        layout = self.layout
        if layout == "cpu_int4" and not self._takes_int4pack(x):
            layout = "portable"
        return quant_matmul(x, self._weight(layout), bias, batch_invariant=self.batch_invariant)

    @torch.compiler.assume_constant_result
    def prepare(self, dtype: torch.dtype) -> bool:
        """Pack the weight for activations of ``dtype``, where that has not been done; always True.

        ``forward`` calls it. Under ``torch.compile`` it runs while the graph is made, not in the graph.
        """
        if dtype not in self._prepared:
            if self.layout == "portable":
                # packed tensors outlive the mode they are made in: those of inference mode could not be trained on
                with torch.inference_mode(False), torch.no_grad():
                    self._pack(dtype)
            self._prepared = (*self._prepared, dtype)
        return True

    def _multiplies_directly(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether the way without checks is open: it was made, and for the tensors that are here now."""
        direct, buffers = self._direct, self._buffers
        if direct is None or not direct.takes(x, self.batch_invariant) or torch.is_autocast_enabled("cpu"):
            return False
        for name, place in direct.places:
            tensor = buffers.get(_PACKED + name if name == "scales_map" else name)
            if tensor is None or tensor.data_ptr() != place or tensor.requires_grad:
                return False
        return bias is None or (bias.is_cpu and bias.shape == self.shape[:1])

    def __getstate__(self) -> dict[str, Any]:
        """Without what points into this process's memory; a copy makes its own."""
        return {**self.__dict__, "_direct": None, "_prepared": ()}

    def packed(self, dtype: torch.dtype) -> PackedWeight:
        """The weight as it multiplies activations of ``dtype``, made ready; it shares this module's storage."""
        self.prepare(dtype)
        return self._weight(self.layout)

    def _pack(self, dtype: torch.dtype) -> None:
        stored = super().quantized().tensors
        # a copy: a buffer can be changed from outside, the table of all formats must not be
        scales_map = dynamic_map(stored["scales"].device).clone() if self.spec.double_quant else None
        packed = pack_weight(stored, self.spec.format, self.shape, dtype, scales_map=scales_map)
        self.layout = packed.layout
        for name in TENSORS:
            if packed.layout != "portable" or name == "scales_map":
                self._buffers[_PACKED + name] = packed.tensors.get(name)
        self._direct = direct(packed, dtype)
        if packed.layout == "tiles" and not self.tied:
            for name in stored:
                self._buffers[name] = None

    def release(self) -> None:
        """Go back to the portable form alone; the next product packs anew."""
        if self.layout != "portable" and self._buffers["qweight"] is None:
            for name, tensor in self.quantized().tensors.items():
                self._buffers[name] = tensor
        for name in TENSORS:
            self._buffers[_PACKED + name] = None
        self.layout, self._prepared, self._direct = "portable", (), None

    def _weight(self, layout: str) -> PackedWeight:
        tensors = {}
        for name in TENSORS:
            prefix = _PACKED if layout != "portable" or name == "scales_map" else ""
            # not getattr, which takes a module as long as a small product takes
            tensor = self._buffers.get(prefix + name)
            if tensor is not None:
                tensors[name] = tensor
        return PackedWeight(self.spec.format, self.shape, layout, tensors)

    def _takes_int4pack(self, x: Tensor) -> bool:
        """Whether torch's packed product is the one for x: few rows, and no gradient, which it has only slowly."""
        if x.dtype != torch.bfloat16 or (x.requires_grad and torch.is_grad_enabled()):
            return False
        # how many rows there are must not choose the way where no row may depend on the others
        return self.batch_invariant or x.numel() <= INT4PACK_ROWS * self.in_features

    def __setattr__(self, name: str, value: Any) -> None:
        if name in TENSORS and "_prepared" in self.__dict__:
            self.release()
        super().__setattr__(name, value)

    def _apply(self, fn, recurse=True):
        self.release()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._buffers["qweight"] is None:
            for name, tensor in self.quantized().tensors.items():
                if name not in self._non_persistent_buffers_set:
                    destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args, **kwargs):
        self.release()
        super()._load_from_state_dict(*args, **kwargs)


@contextmanager
def batch_invariant(model: nn.Module) -> Iterator[None]:
    """Within it no row of a quantized product depends, in any bit, on the other rows of its batch.

    The same prompt gives the same logits alone and in a batch, as far as the quantized layers go. It costs speed:
    rows are multiplied one by one on a CPU, in one fixed order of summation on a GPU.
    """
    modules = [module for module in model.modules() if isinstance(module, QuantLinear)]
    before = [module.batch_invariant for module in modules]
    try:
        for module in modules:
            module.batch_invariant = True
        yield
    finally:
        for module, value in zip(modules, before):
            module.batch_invariant = value


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

    def lookup(self, ids: Tensor) -> Tensor:
        """As :meth:`forward` for ids that are known to be in the table; asks the device for nothing (CUDA graphs)."""
        return self._rows(ids.flatten()).to(self.dtype).view(*ids.shape, self.embedding_dim)

    def _rows(self, rows: Tensor) -> Tensor:
        """Decode the rows [R] named: fp32 [R, embedding_dim]."""
        q = self.quantized()
        fmt = FORMATS[q.spec.format]
        params = q.params()
        taken = Params(params.scale[rows], None if params.zero is None else params.zero[rows], params.g_idx)
        codes = unpack_codes(q.tensors["qweight"][rows], fmt.bits, q.shape[1])
        scale, zero = taken.per_channel(q.shape[1])
        return fmt.decode(codes, scale, zero)
