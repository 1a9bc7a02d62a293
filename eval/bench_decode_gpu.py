"""``brise bench decode --device cuda``: Mistral-7B's shape with random weights, made on the device.

Every side is a model of its own, one after another in memory, so that the peak of each is its own. The ceiling is the
read bandwidth that the same run measured; the goals are those the project has set itself for an H200.
"""

from __future__ import annotations

import dataclasses
import gc
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .bench_decode import Load, Progress, Side, measure, our_side, peer_side, read_ceiling, table
from .bench_gpu import NoGpuError
from .gpu_protocol import GraphTimer, RowFile, ceilings
from .memory import gpu_peak, kv_cache_bytes, predict_ledger, reset_peak
from .provenance import collect
from .timing import bitsandbytes_module

DTYPE = torch.float16
# side -> preset of its weights, None for fp16; the first is the fastest we hope for
OURS: dict[str, str | None] = {
    "brise int4-g128-all": "int4-g128-all",
    "brise nf4-dq-all": "nf4-dq-all",
    "brise nf4": "nf4",
    "brise int8": "int8",
    "brise fp16": None,
}
# tokens a second: side and batch -> (limit to be reached, what is aimed at), short context but for the last
GOALS: dict[tuple[str, int], tuple[float, float]] = {
    ("brise int4-g128-all", 1): (550, 750),
    ("brise nf4-dq-all", 1): (450, 620),
    ("brise int8", 1): (380, 460),
    ("brise fp16", 1): (230, 265),
    ("brise int4-g128-all", 32): (4400, 5500),
}


def mistral_7b() -> Any:
    """The configuration of Mistral-7B v0.1."""
    from transformers import MistralConfig

    return MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        sliding_window=4096,
        tie_word_embeddings=False,
        dtype=DTYPE,
    )


def random_model(
    config: Any, preset: str | None, device: torch.device, dtype: torch.dtype = DTYPE
) -> nn.Module:
    """A model of this shape whose weights, quantized by a preset or not, are random and lie on ``device``."""
    from ..model.mistral import MistralForCausalLM
    from ..quant.apply import find_targets, resolve, swap
    from ..quant.presets import PRESETS

    with torch.device("meta"):
        model = MistralForCausalLM(config).to(dtype)  # type: ignore[arg-type]
    if preset is not None:
        specs = {
            path: spec for path, (spec, _) in resolve(PRESETS[preset], find_targets(model)).items() if spec
        }
        swap(model, specs, dtype)
    return fill(model, device).eval()


def fill(model: nn.Module, device: torch.device) -> nn.Module:
    """Allocate what is on the meta device, with values that keep the activations in range."""
    from ..model.rope import MistralRotaryEmbedding

    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        if isinstance(module, MistralRotaryEmbedding):
            for name, buffer in MistralRotaryEmbedding(module.config).named_buffers():
                module._buffers[name] = buffer.to(device)
            continue
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                new = torch.empty(p.shape, dtype=p.dtype, device=device)
                filled = new.fill_(1) if p.ndim == 1 else new.normal_(0, 0.02, generator=generator)
                module._parameters[name] = nn.Parameter(filled, requires_grad=False)
        for name, b in module._buffers.items():
            if b is not None and b.is_meta:
                module._buffers[name] = _buffer(name, b, device, generator)
    return model


def _buffer(name: str, like: torch.Tensor, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    new = torch.empty(like.shape, dtype=like.dtype, device=device)
    if like.dtype == torch.uint8:
        return new.random_(0, 256, generator=generator)
    # scales, such that the weights are about as large as dense ones
    return new.fill_(0.003 if name == "scales" else 0.01)


def makers(config: Any, device: torch.device) -> dict[str, Callable[[int], Side]]:
    """Side -> what makes it for a batch size."""

    def ours(name: str, preset: str | None) -> Callable[[int], Side]:
        return lambda batch: our_side(random_model(config, preset, device), batch, name=name)

    def peer(name: str, **options: Any) -> Callable[[int], Side]:
        return lambda batch: peer_side(_peer_model(config, device), name, **options)

    return {
        **{name: ours(name, preset) for name, preset in OURS.items()},
        "transformers fp16": peer("transformers fp16"),
        "bitsandbytes nf4": lambda batch: peer_side(_bitsandbytes_model(config, device), "bitsandbytes nf4"),
        "transformers fp16, static cache, compiled": peer(
            "transformers fp16, static cache, compiled", cache_implementation="static"
        ),
    }


def _peer_model(config: Any, device: torch.device) -> Any:
    from transformers import MistralForCausalLM

    with torch.device("meta"):
        model: Any = MistralForCausalLM(config)
    model.to(DTYPE)
    model.to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.fill_(1)
            else:
                p.normal_(0, 0.02)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    return model.eval()


def _bitsandbytes_model(config: Any, device: torch.device) -> Any:
    """Its Linear4bit in place of every Linear of the blocks, as transformers puts it there."""
    bnb = bitsandbytes_module()
    model = _peer_model(config, device)
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear):
                    new = bnb.nn.Linear4bit(
                        child.in_features,
                        child.out_features,
                        bias=False,
                        compute_dtype=DTYPE,
                        quant_type="nf4",
                    )
                    new.weight = bnb.nn.Params4bit(
                        child.weight.data.cpu(), requires_grad=False, quant_type="nf4"
                    )
                    setattr(owner, name, new.to(device))
    return model


def run_gpu(
    folder: str | Path,
    *,
    device: str = "cuda",
    batches: Sequence[int] = (1, 8, 32),
    prompts: Sequence[int] = (128, 4096),
    new: int = 64,
    rounds: int = 5,
    minutes: float = 9.0,
    command: str | None = None,
    progress: Progress | None = None,
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Measure the GPU at hand into ``folder``/gpu: <device>-decode.jsonl and .md, each row as it comes.

    Raises:
        NoGpuError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise NoGpuError(
            f"no GPU: torch {torch.__version__} sees no CUDA device; without --device it runs on the CPU"
        )
    where = torch.device(device)
    ceiling = ceilings(where, GraphTimer(where))["read_bytes_per_second"]
    return run_sides(
        mistral_7b(),
        makers(mistral_7b(), where),
        where,
        Path(folder) / "gpu",
        ceiling,
        loads=[Load(b, p, new) for p in prompts for b in batches],
        rounds=rounds,
        deadline=time.monotonic() + 60 * minutes,
        command=command,
        progress=progress,
    )


def run_sides(
    config: Any,
    sides: dict[str, Callable[[int], Side]],
    device: torch.device,
    folder: Path,
    ceiling: float | None,
    *,
    loads: Sequence[Load],
    rounds: int,
    deadline: float,
    command: str | None = None,
    progress: Progress | None = None,
) -> tuple[list[dict[str, Any]], list[Path]]:
    """The run itself, on any device: each side alone in memory, the most telling first."""
    origin = dataclasses.asdict(collect(device, 0, command))
    stem = re.sub(r"[^a-z0-9]+", "-", origin["device"].lower()).strip("-") + "-decode"
    file = RowFile(folder / f"{stem}.jsonl")
    files = [file.path, folder / f"{stem}.md"]
    ceiling = read_ceiling() if ceiling is None else ceiling
    work = [(name, load) for load in loads for name in sides]
    try:
        for i, (name, load) in enumerate(work):
            if time.monotonic() > deadline:
                break
            if progress is not None:
                progress("sides", i, len(work))
            row = _one(config, name, sides[name], load, device, rounds, ceiling)
            file.add(
                {**row, "model": "Mistral-7B, random weights", "dtype": str(DTYPE), "provenance": origin}
            )
            files[1].write_text(table(file.rows))
    finally:
        file.close()
    return file.rows, files


def _one(
    config: Any,
    name: str,
    make: Callable[[int], Side],
    load: Load,
    device: torch.device,
    rounds: int,
    ceiling: float,
) -> dict[str, Any]:
    """One side, made and measured and given up."""
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    reset_peak()
    before = torch.cuda.memory_allocated(device) if cuda else 0
    try:
        side = make(load.batch)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        side = Side(name, _raising(error))
    held = torch.cuda.memory_allocated(device) - before if cuda else None
    row = measure([side], load, vocab=config.vocab_size, device=device, rounds=rounds)
    entry = row["sides"].get(name)
    if entry is not None:
        entry["memory"] |= {
            "weights_allocated": held,
            "gpu_peak": gpu_peak(device),
            "weights_predicted": _predicted(config, name),
            "cache_predicted": kv_cache_bytes(config, load.prompt + load.new, batch=load.batch, dtype=DTYPE),
        }
        if entry["weight_bytes_per_second"] is not None:
            entry["share_of_ceiling"] = entry["weight_bytes_per_second"] / ceiling
        limit, aim = GOALS.get((name, load.batch), (None, None))
        rate = entry["decode_tokens_per_second"]["median"]
        entry["goal"] = None if limit is None else {"limit": limit, "aim": aim, "met": rate >= limit}
    return {**row, "read_bytes_per_second": ceiling}


def _predicted(config: Any, name: str) -> int | None:
    from ..quant.presets import PRESETS

    if name not in OURS:
        return None
    preset = OURS[name]
    return predict_ledger(config, None if preset is None else PRESETS[preset], DTYPE).nbytes


def _raising(error: Exception) -> Callable[..., list[list[int]]]:
    def run(*_: Any) -> list[list[int]]:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return run
