"""Round to nearest: each weight becomes the nearest value of its group's grid, whatever the others do."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import QuantSpec
from .formats import FORMATS
from .scales import choose_params, stored_params
from .tensor import QuantizedTensor, groups_per_row


def rtn(w: Tensor, spec: QuantSpec, hessian: Tensor | None = None) -> QuantizedTensor:
    """Quantize a weight [N, K] of any float dtype; ``hessian`` [K, K] only where ``spec.scale`` asks for it."""
    fmt = FORMATS[spec.format]
    groups = groups_per_row(spec, (w.shape[0], w.shape[1]))
    exact = choose_params(w, spec, hessian)
    used = exact if fmt.codes_from_exact_scale else stored_params(exact, spec)
    grouped = w.to(torch.float32).unflatten(1, (groups, -1))
    zero = None if used.zero is None else used.zero[..., None]
    codes = fmt.encode(grouped, used.scale[..., None], zero).flatten(1)
    return QuantizedTensor.assemble(spec, codes, exact)
