"""The dense layers as the decode step multiplies by them: q, k and v as one product, gate and up as one.

Made when a model is loaded, from the separate layers that its checkpoint has. Where it can be done without a second
copy, the separate layers become views of the whole, so that ``state_dict`` and transformers' ``generate`` go on as
before; the whole is no module of the model and is never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..kernels import native
from ..quant.formats import IMPORTED
from ..quant.fuse import fuse, why_not
from ..quant.linear import QuantLinear

# rows up to which the compiled product, which reads weights as they are stored, is taken before oneDNN's, which reads a
# copy in blocks (in turns, AVX-512, two threads, 3072 x 576: 0.81 of its time at 8 rows, 1.10 at 16, 1.39 at 32): at 16
# it loses a tenth, and saves the copy
FEW_ROWS = 16
# rows from which on a copy in blocks wins over a transposed one, where nothing can be compiled
_BLOCKED_ROWS = 2


class Projection:
    """x [R, K] -> [R, N], N the rows of all its layers together.

    Attributes:
        separate: why the layers are multiplied one by one; None where they are one.
        nbytes: of what was stored a second time.
        whole: the quantized layer that is multiplied by, where it is one.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        separate: str | None = None,
        nbytes: int = 0,
        whole: QuantLinear | None = None,
    ) -> None:
        self.product = product
        self.separate = separate
        self.nbytes = nbytes
        self.whole = whole

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x)


class RowByRow:
    """A product whose rows do not depend, in any bit, on the others: each is computed alone."""

    def __init__(self, product: Callable[[Tensor], Tensor]) -> None:
        self.product = product

    def __call__(self, x: Tensor) -> Tensor:
        # a copy, as a library may add in another order where the row lies at another alignment
        return torch.cat([self.product(row.clone()) for row in x.split(1)])


def project(
    owner: nn.Module, names: Sequence[str], *, rows: int, dtype: torch.dtype, repack: bool, invariant: bool
) -> tuple[Projection, Projection]:
    """The layers ``names`` of ``owner``, which share their input, as one product.

    Args:
        rows: that are multiplied at once in a decode step.
        dtype: of the activations.
        repack: on a CPU, copy dense weights into the layout that is fastest there.
        invariant: see :class:`RowByRow`.
    Returns:
        the product for decode steps and that for prompts; the same one unless ``invariant``.
    """
    layers = [owner.get_submodule(name) for name in names]
    if all(type(layer) is nn.Linear and layer.bias is None for layer in layers):
        steps, prompts = _dense(layers, rows, repack)  # type: ignore[arg-type]
    elif all(isinstance(layer, QuantLinear) for layer in layers):
        return _quantized(owner, names, layers, dtype, invariant)  # type: ignore[arg-type]
    else:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        steps = prompts = Projection(
            _one_by_one([_left_usable(layer) for layer in layers]),
            f"{kinds} are no plain or quantized layers without bias",
        )
    if not invariant:
        return steps, prompts
    return Projection(RowByRow(steps.product), steps.separate, steps.nbytes), prompts


def _left_usable(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Called outside of inference mode: what it keeps of a call, as bitsandbytes' layers do that re-pack themselves,
    must serve whoever trains the model afterwards."""

    def product(x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return layer(x)

    return product


def _one_by_one(products: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    if len(products) == 1:
        return products[0]
    return lambda x: torch.cat([product(x) for product in products], dim=-1)


def _dense(layers: list[nn.Linear], rows: int, repack: bool) -> tuple[Projection, Projection]:
    """The products for steps of ``rows`` rows and for prompts; the layers become views of the whole."""
    weights = [layer.weight.detach() for layer in layers]
    whole = weights[0] if len(weights) == 1 else torch.cat(weights)
    if len(weights) > 1:
        for layer, part in zip(layers, whole.split([w.shape[0] for w in weights])):
            layer.weight = nn.Parameter(part, requires_grad=layer.weight.requires_grad)
    prompts = Projection(lambda x: nn.functional.linear(x, whole))
    if whole.is_cpu and whole.dtype == torch.float32:
        return _fp32_steps(whole, rows, repack) or prompts, prompts
    return prompts, prompts


def _fp32_steps(whole: Tensor, rows: int, repack: bool) -> Projection | None:
    """What is faster for ``rows`` rows on a CPU than torch's product with fp32 weights as they are stored."""
    library = native.active()
    if rows <= FEW_ROWS and library is not None and whole.shape[1] % library.brise_lanes() == 0:
        return Projection(lambda x: native.dense(x, whole, library))
    if not repack:
        return None
    if rows >= _BLOCKED_ROWS and torch.backends.mkldnn.is_available():
        blocked = torch.ops.mkldnn._reorder_linear_weight(whole.contiguous(), rows)
        linear = torch.ops.mkldnn._linear_pointwise.default
        return Projection(lambda x: linear(x, blocked, None, "none", [], ""), nbytes=whole.nbytes)
    turned = whole.t().contiguous()
    return Projection(lambda x: torch.mm(x, turned), nbytes=whole.nbytes)


def _quantized(
    owner: nn.Module, names: Sequence[str], layers: list[QuantLinear], dtype: torch.dtype, invariant: bool
) -> tuple[Projection, Projection]:
    separate = None
    wholes = layers
    if len(layers) > 1:
        separate = why_not(layers)
        if separate is None:
            whole, parts = fuse(layers, dtype)
            for name, part in zip(names, parts):
                parent, _, leaf = name.rpartition(".")
                setattr(owner.get_submodule(parent), leaf, part)
            wholes = [whole]

    def products(fixed: bool) -> list[Callable[[Tensor], Tensor]]:
        return [_product(layer, fixed) for layer in wholes]

    one = wholes[0] if len(wholes) == 1 else None
    prompts = Projection(_one_by_one(products(False)), separate, whole=one)
    return (Projection(_one_by_one(products(True)), separate, whole=one) if invariant else prompts), prompts


def _product(layer: QuantLinear, invariant: bool) -> Callable[[Tensor], Tensor]:
    """The layer's own product, under the one or the other promise."""
    if invariant and layer.spec.format in IMPORTED:  # decoded whole, and multiplied as if it were dense
        return RowByRow(layer)

    def product(x: Tensor) -> Tensor:
        before = layer.batch_invariant
        layer.batch_invariant = invariant or before
        try:
            return layer(x)
        finally:
            layer.batch_invariant = before

    return product
