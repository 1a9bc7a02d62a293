"""The error budget of a kernel: twice the error that eager code of the same precision makes, both against
float64.

The rule of flash-attention's and attention-gym's tests: no tolerance is chosen by hand, so none can be
widened.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact||, in float64; nan where anything is nan."""
    difference = (out.detach().double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp_min(torch.finfo(torch.float64).tiny))


def check_budget(
    out: Tensor, eager: Tensor, exact: Tensor, what: str = "kernel", factor: float = 2.0
) -> float:
    """Return the error of ``out``; raise AssertionError if it exceeds ``factor`` times that of ``eager``.

    One rounding of the output is always allowed, as eager code may by chance be exact.
    """
    if out.shape != exact.shape:
        raise AssertionError(f"{what}: expected shape {list(exact.shape)}, got {list(out.shape)}")
    if not exact.numel():
        return 0.0
    error, allowed = relative_error(out, exact), factor * relative_error(eager, exact)
    allowed = max(allowed, torch.finfo(out.dtype).eps / 2)
    if not error <= allowed:
        raise AssertionError(f"{what}: relative error {error:.3g} exceeds the budget {allowed:.3g}")
    return error
