"""The op ``brise::decode_attention``: its checks, its fake, and who computes it."""

import math

import torch
from torch import Tensor

from . import decode_cpu, decode_reference
from .attention_checks import check_window
from .checks import FLOATS, has_triton, hold, runs_triton
from .tuning_decode import MAX_HEAD_DIM

_MOST_SEEN = (1 << 31) - 1


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    *,
    start: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    impl: str = "auto",
    batch_invariant: bool = False,
) -> Tensor:
    """Attention of the newest position of each row over a ring cache; no gradient.

    Position p of a row lies in slot ``p % W``; what else the ring holds is never looked at.

    Args:
        q: [B, H, D], already written to the ring; or [B, T, H, D], the T newest positions (speculative steps).
        keys, values: [B, KV, W, D], of q's dtype, or int8 codes; H is a multiple of KV.
        seen: int32 or int64 [B]: positions each row has written, q's own included; a row with 0 gives zeros. At most
            2^31 - 1 for the kernel, which on a GPU is asserted there, for int64.
        start: int32 or int64 [B]: the first position that counts; left padding lies before it.
        window: keys a query sees with its own; None: all that the ring holds.
        scale: of the scores; D ** -0.5 by default.
        key_scales, value_scales: fp32 [B, KV, W], with int8 codes.
        batch_invariant: a row's bits do not depend on the other rows. The Triton kernel's never do.
    Returns:
        a contiguous tensor of q's shape and dtype.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, a window below 1, or one that the ring cannot
            hold beside the other T - 1 positions.
    """
    if q.ndim not in (3, 4):
        raise ValueError(f"q must be [B, H, D] or [B, T, H, D], got {list(q.shape)}")
    check_window(window)
    factor = max(q.shape[-1], 1) ** -0.5 if scale is None else float(scale)
    out = torch.ops.brise.decode_attention(
        q if q.ndim == 4 else q[:, None], keys, values, seen, start, key_scales, value_scales, window, factor,
        impl, batch_invariant,
    )  # fmt: skip
    return out if q.ndim == 4 else out[:, 0]


def check_ring(
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    batch: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """A ring of ``batch`` rows, or an error that carries its values."""
    if keys.ndim != 4 or keys.shape != values.shape:
        raise ValueError(
            f"keys and values must both be [B, KV, W, D], got {list(keys.shape)} and {list(values.shape)}"
        )
    if keys.shape[0] != batch or keys.shape[3] != width or keys.shape[1] < 1 or keys.shape[2] < 1:
        raise ValueError(f"the ring must be [{batch}, KV, W, {width}], got {list(keys.shape)}")
    for name, ring, scales in (("keys", keys, key_scales), ("values", values, value_scales)):
        if ring.device != device:
            raise ValueError(f"q is on {device}, {name} on {ring.device}: move them together")
        if ring.stride(3) != 1 and width > 1:
            raise ValueError(f"{name} must be contiguous along D, got strides {list(ring.stride())}")
        if ring.dtype == torch.int8:
            if scales is None:
                raise ValueError(f"int8 {name} need their scales: float32 {list(ring.shape[:3])}")
            if scales.dtype != torch.float32:
                raise TypeError(f"scales of the {name} must be torch.float32, got {scales.dtype}")
            if scales.shape != ring.shape[:3] or not scales.is_contiguous():
                raise ValueError(
                    f"scales of the {name} must be contiguous {list(ring.shape[:3])}, got {list(scales.shape)} "
                    f"with strides {list(scales.stride())}"
                )
            if scales.device != device:
                raise ValueError(
                    f"q is on {device}, scales of the {name} on {scales.device}: move them together"
                )
        elif ring.dtype != dtype:
            raise TypeError(
                f"{name} must be of q's dtype {dtype}, or torch.int8 with scales, got {ring.dtype}"
            )
        elif scales is not None:
            raise ValueError(f"scales are for int8 {name}, got {ring.dtype} with scales")
    if keys.dtype != values.dtype:
        raise TypeError(f"keys and values must be of one dtype, got {keys.dtype} and {values.dtype}")


def uses_triton(impl: str, x: Tensor) -> bool:
    """Whether the Triton kernel is to run. fp32 as well: these ops wait for memory, not for matrix instructions."""
    if impl == "auto":
        return x.is_cuda and x.dtype in FLOATS[:3] and has_triton()
    return runs_triton(impl, "tiles", x)


def check_positions(name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be torch.int32 or torch.int64, got {t.dtype}")
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(t.shape)}")
    if t.device != device:
        raise ValueError(f"q is on {device}, {name} on {t.device}: move them together")
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(t.stride())}")


def _check(q, keys, values, seen, start, key_scales, value_scales, window: int | None, scale: float) -> None:
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H, D] with T of at least 1, got {list(q.shape)}")
    if q.dtype not in FLOATS:
        raise TypeError(f"q must be floating point, got {q.dtype}")
    batch, queries, heads, width = q.shape
    check_ring(keys, values, key_scales, value_scales, batch, width, q.dtype, q.device)
    groups, slots = keys.shape[1:3]
    if heads % groups or heads < 1 or width < 1:
        raise ValueError(f"H must be a multiple of KV = {groups}, got q {list(q.shape)}")
    check_positions("seen", seen, (batch,), q.device)
    if start is not None:
        check_positions("start", start, (batch,), q.device)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None for all that the ring holds, got {window}")
    if window is not None and window + queries - 1 > slots:
        raise ValueError(
            f"a window of {window} and {queries} queries need {window + queries - 1} slots, the ring has {slots}: "
            "make it larger, or give window=None where no more positions than slots are ever written"
        )


@torch.library.custom_op("brise::decode_attention", mutates_args=())
def _decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    start: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    window: int | None,
    scale: float,
    impl: str,
    batch_invariant: bool,
) -> Tensor:
    _check(q, keys, values, seen, start, key_scales, value_scales, window, scale)
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl must be auto, reference or triton, got {impl!r}")
    arguments = (q, keys, values, seen, start, key_scales, value_scales, window, scale)
    if q.numel() == 0:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    fits = q.shape[3] <= MAX_HEAD_DIM
    if impl == "triton" and not fits:
        raise ValueError(f"impl='triton' takes heads of at most {MAX_HEAD_DIM}, got q {list(q.shape)}")
    if fits and uses_triton(impl, q):
        from . import decode

        for name, t in (("seen", seen), ("start", start)):
            if t is not None and t.dtype == torch.int64:
                # the kernel counts in 32 bits
                hold((t <= _MOST_SEEN).all(), f"{name} must be at most {_MOST_SEEN}", t)
        return decode.decode_attention(*arguments)
    # under autocast the products inside would be taken in another dtype than was asked for
    with torch.autocast(q.device.type, enabled=False):
        if impl == "auto" and q.device.type == "cpu":
            return decode_cpu.decode_attention(*arguments, batch_invariant)
        if not batch_invariant:
            return decode_reference.decode_attention(*arguments)
        rows = []
        for b in range(q.shape[0]):
            row = [None if t is None else t[b : b + 1] for t in arguments[:7]]
            rows.append(decode_reference.decode_attention(*row, window, scale))  # type: ignore[arg-type, call-arg]
        return torch.cat(rows)


@_decode.register_fake
def _(q, keys, values, seen, start, key_scales, value_scales, window, scale, impl, batch_invariant):
    _check(q, keys, values, seen, start, key_scales, value_scales, window, scale)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
