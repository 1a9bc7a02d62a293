"""The most memory held while a model is loaded, reads a prompt, and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .memory import gpu_peak, process_peak, reset_peak


@dataclass(frozen=True)
class Peaks:
    """Bytes at most, phase by phase; None where the system does not say.

    On a GPU of tensors on it; on the CPU of the whole process, what it held before included.

    Attributes:
        load: while the checkpoint was loaded. prefill, decode: while a prompt of ``prompt`` tokens was read, and while
            ``new_tokens`` were written behind it.
    """

    load: int | None
    prefill: int | None
    decode: int | None
    prompt: int
    new_tokens: int


def current_peak(device: torch.device) -> int | None:
    """Since the last :func:`start_phase`."""
    return gpu_peak(device) if device.type == "cuda" else process_peak()


def start_phase() -> bool:
    """Let :func:`current_peak` begin anew; False where it cannot, and then peaks are unknown."""
    return reset_peak()


@torch.inference_mode()
def measure_peaks(model: Any, load: int | None, prompt: int, new_tokens: int, seed: int = 0) -> Peaks:
    """Read a prompt of random tokens, then write; ``load`` is what was found while the model was loaded."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (1, prompt), generator=generator).to(device)
    known = start_phase() or device.type == "cuda"
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefill = current_peak(device) if known else None
    start_phase()
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(dim=-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    decode = current_peak(device) if known else None
    return Peaks(load if known else None, prefill, decode, prompt, new_tokens)
