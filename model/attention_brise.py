"""Sliding-window attention of `kernels/` as an attention implementation of transformers, by the name `brise`.

`register()` puts it there; `import brise.model.hf` calls it, and so does a model of ours that is asked for it:

    AutoModelForCausalLM.from_pretrained("some/model", attn_implementation="brise")

transformers says which keys a query may see by a function of indices. All it makes of its own accord (causal,
windowed, chunked, packed, padded on either side) leave each query an interval of keys around its own, and the
interval's ends are what our mask holds. A mask is

    int32 [B, 1, 2, T]     of each query the first key it sees and the one behind the last;
    int32 [B, 1, 0, W]     without elements: causal, with a window of W, the last query at the last key;
    None                   the same without a window.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ..kernels.attention_ops import sliding_attention
from ..kernels.decode_ops import decode_attention

NAME = "brise"
# what other implementations take and this one does not
_REFUSED = ("softcap", "s_aux", "position_bias", "cache", "head_mask", "block_table")


def register() -> None:
    """Make `attn_implementation="brise"` known to transformers, for every model of every architecture."""
    AttentionInterface.register(NAME, brise_attention_forward)
    AttentionMaskInterface.register(NAME, brise_mask)


def brise_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> Tensor | None:
    """The mask that transformers hands to `brise_attention_forward`; its arguments are transformers' own.

    Args:
        q_offset, kv_offset: the position of the first query, and of the first key.
        attention_mask: boolean [B, positions], True = keep.
        use_vmap: a function of the caller's own was mixed in.

    Raises:
        ValueError: a mask that leaves no interval: of the caller's own, or with holes.
    """
    if use_vmap:
        raise ValueError(
            "attn_implementation='brise' takes the masks that transformers makes, not an or_mask_function or "
            "and_mask_function: use 'sdpa' or 'flex_attention'"
        )
    device = torch.device(device)
    padding = None
    if attention_mask is not None:
        padding = _padding(attention_mask.to(device=device, dtype=torch.bool), kv_length, kv_offset)
    window = None
    plain = mask_function is causal_mask_function
    if allow_is_causal_skip and local_size is not None and not _chunks(config):
        # no overlay, no packing: what is left of create_sliding_window_causal_mask
        plain, window = True, local_size
    shift = q_offset - kv_offset
    if plain and padding is None and isinstance(shift, int) and shift == kv_length - q_length:
        if window is None or window >= kv_length:
            return None
        return torch.empty((batch_size, 1, 0, window), dtype=torch.int32, device=device)

    query = torch.arange(q_length, device=device)[None]
    own = query + shift
    if plain:
        lo, hi = (own - window + 1 if window is not None else torch.zeros_like(own)), own + 1
    elif mask_function is bidirectional_mask_function:
        lo, hi = torch.zeros_like(own), torch.full_like(own, kv_length)
    else:
        lo, hi = _interval(mask_function, batch_size, query, own, q_offset, kv_offset, kv_length)
    begin, end = (0, kv_length) if padding is None else padding
    bounds = torch.stack((lo.clamp(begin, end), hi.clamp(begin, end)), dim=1)  # type: ignore[arg-type]
    return bounds.to(torch.int32).expand(batch_size, 2, q_length)[:, None].contiguous()


def _chunks(config: Any) -> bool:
    """Whether a local size may be that of chunks, not of a window."""
    return getattr(config, "attention_chunk_size", None) is not None


def _padding(mask: Tensor, kv_length: int, kv_offset: int) -> tuple[Tensor, Tensor] | None:
    """The first real key and the one behind the last, [B, 1] each; None where every key is real."""
    missing = kv_offset + kv_length - mask.shape[1]
    if missing > 0:
        mask = torch.nn.functional.pad(mask, (0, missing))
    mask = mask[:, kv_offset : kv_offset + kv_length]
    count = mask.sum(-1)
    begin = mask.int().argmax(-1) if kv_length else torch.zeros_like(count)
    index = torch.arange(kv_length, device=mask.device)
    inside = (index >= begin[:, None]) & (index < (begin + count)[:, None])
    whole = (inside == mask).all()
    message = (
        "attn_implementation='brise' takes padding before and behind a text, but attention_mask has zeros between "
        "its ones; use 'sdpa'"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(whole, message)
    else:
        # both answers in one trip to the device
        right, full = torch.stack((whole, (count == kv_length).all())).tolist()
        if not right:
            raise ValueError(message)
        if full:
            return None
    return begin[:, None], (begin + count)[:, None]


def _interval(
    mask_function: Callable[..., Any],
    batch: int,
    query: Tensor,
    own: Tensor,
    q_offset: int | Tensor,
    kv_offset: int,
    keys: int,
) -> tuple[Tensor, Tensor]:
    """lo and hi [B, T] of each query, by asking `mask_function`, keys counted from the first that is there.

    The keys seen are an interval that holds the query's own, so each end is found by halving.
    """
    rows = torch.arange(batch, device=query.device)[:, None]
    head = torch.zeros_like(rows)
    own = own.clamp(0, max(keys - 1, 0)).expand(batch, -1)

    def seen(key: Tensor) -> Tensor:
        return mask_function(rows, head, query + q_offset, key + kv_offset)

    if query.shape[1] == 1:
        # while decoding, asking for every key at once is less work
        kept = seen(torch.arange(keys, device=query.device)[None]).expand(batch, keys)
        first = kept.int().argmax(-1, keepdim=True)
        return first, first + kept.sum(-1, keepdim=True)

    # a compiled graph must not depend on the number of keys
    steps = 31 if torch.compiler.is_compiling() else int(keys).bit_length()
    low, lo = torch.zeros_like(own), own
    hi, high = own, torch.full_like(own, keys - 1)
    for _ in range(steps):
        middle = (low + lo) // 2
        reached = seen(middle)
        lo, low = torch.where(reached, middle, lo), torch.where(reached, low, torch.minimum(middle + 1, lo))
        middle = (hi + high + 1) // 2
        reached = seen(middle)
        hi, high = torch.where(reached, middle, hi), torch.where(reached, high, torch.maximum(middle - 1, hi))
    return lo, hi + 1


def brise_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: [B, H, T, head_dim]; key, value: [B, KV, S, head_dim], H a multiple of KV.
        attention_mask: what `brise_mask` made. With None, several texts packed in one row are told apart by
            `cu_seq_lens_q` and `cu_seq_lens_k`, or by a jump in `position_ids` [1, T], as for flash attention.
        sliding_window: W keys with the query's own; counts where there is no mask.
    Returns:
        context [B, T, H, head_dim], and None: the weights are never made.

    Raises:
        ValueError: dropout, a finished mask of the caller's own, or an option this kernel does not have.
    """
    _refuse(dropout, kwargs)
    q, k, v = (x.transpose(1, 2) for x in _one_dtype(query, key, value))
    bounds, window = _read(attention_mask, q, k)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None:
        window = sliding_window
        if not causal and window is not None:
            if window < max(q.shape[1], k.shape[1]):
                raise ValueError(
                    f"a window of {window} in both directions needs the mask that transformers makes for "
                    "attn_implementation='brise', got attention_mask=None"
                )
            window = None
    packed: dict[str, Any] = {}
    if bounds is None and q.shape[1] > 1 and cu_seq_lens_q is not None:
        # in a batch of several rows they are refused below
        packed = {"cu_seqlens": cu_seq_lens_q, "cu_seqlens_k": cu_seq_lens_k}
    elif (
        bounds is None
        and causal
        and position_ids is not None
        and q.shape[1] > 1
        and (tuple(q.shape[:2]) == tuple(position_ids.shape) == (1, k.shape[1]))
    ):
        packed = {"bounds": _bounds_of_positions(position_ids, window)}
        window = window if packed["bounds"] is None else None
    if bounds is not None:
        packed, window = {"bounds": bounds}, None
    if q.shape[1] == 1 and k.shape[1] and not (torch.is_grad_enabled() and _needs_grad(query, key, value)):
        return _decode(q, k, v, bounds, window, scaling), None
    return sliding_attention(q, k, v, window=window, causal=causal, scale=scaling, **packed), None


def _needs_grad(*states: Tensor) -> bool:
    return any(x.requires_grad for x in states)


def _decode(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, window: int | None, scale: float | None
) -> Tensor:
    """One query a row, by the kernel that splits the keys: for it they are a ring that has not come round."""
    keys = k.shape[1]
    start: Tensor | None = None
    if bounds is not None:
        start, seen = bounds[:, 0, 0].contiguous(), bounds[:, 1, 0].contiguous()
    else:
        seen = torch.full(q.shape[:1], keys, dtype=torch.int32, device=q.device)
        if window is not None and window < keys:
            start = seen - window
    return decode_attention(q, k.transpose(1, 2), v.transpose(1, 2), seen, start=start, scale=scale)


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"attn_implementation='brise' has no dropout, got {dropout}: set config.attention_dropout to 0, or use "
            "'sdpa'"
        )
    given = [name for name in _REFUSED if kwargs.get(name) is not None]
    if kwargs.get("output_attentions"):
        given.append("output_attentions")
    if given:
        raise ValueError(f"attn_implementation='brise' has no {', '.join(given)}: use 'eager'")


def _one_dtype(*states: Tensor) -> list[Tensor]:
    """As torch's own attention does under autocast: all in its dtype."""
    kind = states[0].device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return [x if x.dtype == torch.float64 else x.to(dtype) for x in states]
    return list(states)


def _read(mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, int | None]:
    """(bounds [B, 2, T], window) of a mask that `brise_mask` made."""
    if mask is None:
        return None, None
    if isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.ndim == 4 and mask.shape[1] == 1:
        if mask.shape[2] == 0:
            return None, mask.shape[3]
        if mask.shape[2] == 2 and mask.shape[3] == q.shape[1]:
            return mask[:, 0], None
    what = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        "attn_implementation='brise' takes attention_mask [B, keys] with ones for real tokens, or none, and works "
        f"out the rest; it takes no finished mask, got {what}: use 'sdpa' or 'eager' for masks of your own"
    )


_seen_positions: tuple[Any, int, int | None, Tensor | None] | None = None


def _bounds_of_positions(position_ids: Tensor, window: int | None) -> Tensor | None:
    """Bounds of texts packed in one row, told apart by positions that do not go on by one; None if they all do.

    The layers of a model hand in one and the same tensor: it is read once.
    """
    global _seen_positions
    compiling = torch.compiler.is_compiling()
    # what is made under inference_mode does not tell when it is written to
    kept = not compiling and not position_ids.is_inference()
    if kept and _seen_positions is not None:
        last, version, last_window, found = _seen_positions
        if last() is position_ids and version == position_ids._version and last_window == window:
            return found
    position = position_ids[0]
    index = torch.arange(position.shape[0], device=position.device)
    begins = torch.cat((torch.ones_like(position[:1], dtype=torch.bool), position.diff() != 1))
    bounds: Tensor | None = None
    if compiling or bool(begins[1:].any()):
        begin = torch.where(begins, index, 0).cummax(0).values
        lo = begin if window is None else torch.maximum(begin, index - window + 1)
        bounds = torch.stack((lo, index + 1)).to(torch.int32)[None]
    if kept:
        _seen_positions = (weakref.ref(position_ids), position_ids._version, window, bounds)
    return bounds
