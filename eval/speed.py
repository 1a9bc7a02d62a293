"""Speed of reading a prompt (prefill) and of writing (decode), in tokens a second.

Each repetition is timed on its own; what is reported is the median with the 20th and 80th percentile. On a
GPU the clock is read after a synchronisation. Other load on the machine goes into the figures: measure alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SpeedProtocol:
    """What is timed.

    Attributes:
        prompt: tokens of the prompt; prefill reads them in one call.
        new_tokens: decode steps timed in one repetition, after a prompt of that length.
        batch: prompts at once; the rates count the tokens of all.
        warmup, repeats: repetitions not timed, and timed.
    """

    prompt: int = 256
    new_tokens: int = 8
    batch: int = 1
    warmup: int = 1
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("prompt", "new_tokens", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"expected warmup of at least 0, got {self.warmup}")


@dataclass(frozen=True)
class Rate:
    """Tokens a second over the repetitions: median, 20th and 80th percentile (linear between neighbours)."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Speed:
    """Prefill and decode, and what was timed."""

    prefill: Rate
    decode: Rate
    prompt: int
    new_tokens: int
    batch: int
    repeats: int


@dataclass(frozen=True)
class SpeedPoint:
    """Prefill and decode at one batch and one context.

    Attributes:
        bytes_a_step: that a decode step must read at least: the weights as they are stored, once, and the cache.
        bandwidth: bytes_a_step times the median of the decode steps a second, in bytes a second.
    """

    batch: int
    context: int
    prefill: Rate
    decode: Rate
    bytes_a_step: int
    bandwidth: float


def rate(tokens: int, seconds: list[float]) -> Rate:
    """From the times of repetitions that handled ``tokens`` tokens each."""
    rates = tokens / torch.tensor(seconds, dtype=torch.float64)
    p20, median, p80 = torch.quantile(rates, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Rate(median, p20, p80)


@torch.inference_mode()
def measure_speed(
    model: Any, protocol: SpeedProtocol | None = None, *, seed: int = 0, progress: Progress | None = None
) -> Speed:
    """Time ``model`` on random tokens, greedy, with its own default cache.

    Args:
        model: a causal LM (transformers' or ours).
        protocol: what to time.
        seed: of the prompt's tokens.
        progress: called with ("speed", repetitions done, repetitions in all).
    """
    protocol = protocol or SpeedProtocol()
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (protocol.batch, protocol.prompt), generator=generator).to(
        device
    )
    prefill: list[float] = []
    decode: list[float] = []
    total = protocol.warmup + protocol.repeats
    for repetition in range(total):
        times = _once(model, ids, protocol.new_tokens, device)
        if repetition >= protocol.warmup:
            prefill.append(times[0])
            decode.append(times[1])
        if progress is not None:
            progress("speed", repetition + 1, total)
    return Speed(
        prefill=rate(protocol.batch * protocol.prompt, prefill),
        decode=rate(protocol.batch * protocol.new_tokens, decode),
        prompt=protocol.prompt,
        new_tokens=protocol.new_tokens,
        batch=protocol.batch,
        repeats=protocol.repeats,
    )


def measure_speeds(
    model: Any,
    batches: Sequence[int],
    contexts: Sequence[int],
    protocol: SpeedProtocol | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[SpeedPoint]:
    """:func:`measure_speed` for every batch and context (tokens of the prompt), with the bandwidth achieved."""
    from .memory import kv_cache_bytes, loaded_bytes

    protocol = protocol or SpeedProtocol()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    # an embedding that is no head is not read as a whole: a step looks up one row of it
    weights = loaded_bytes(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = {t.data_ptr() for t in [*head.parameters(), *head.buffers()]}
    weights -= sum(t.nbytes for t in [*table.parameters(), *table.buffers()] if t.data_ptr() not in own)
    out = []
    for batch in batches:
        for context in contexts:
            point = dataclasses.replace(protocol, batch=batch, prompt=context)
            found = measure_speed(model, point, seed=seed)
            held = context + protocol.new_tokens // 2
            read = weights + kv_cache_bytes(model.config, held, batch=batch, dtype=dtype)
            steps = found.decode.median / batch
            out.append(SpeedPoint(batch, context, found.prefill, found.decode, read, read * steps))
            if progress is not None:
                progress("speeds", len(out), len(batches) * len(contexts))
    return out


def _once(model: Any, ids: Tensor, steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds of one prefill, and of ``steps`` decode steps behind it."""
    begin = _now(device)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(dim=-1)
    middle = _now(device)
    cache = out.past_key_values
    for _ in range(steps):
        out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(dim=-1)
        cache = out.past_key_values
    return middle - begin, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
