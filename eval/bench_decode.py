"""``brise bench decode``: the decode loop beside transformers' ``generate``, on the same tokens, in turns, in one run.

A side is a way to continue prompts. It is asked for one token, which gives the time to the first, and for all of them;
the difference is decoding. Where sides have the same weights their tokens must be the same before anything is timed.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .memory import kv_cache_bytes, loaded_bytes, predict_ledger, process_peak, reset_peak
from .provenance import collect
from .timing import BenchError, Spread, in_child

Progress = Callable[[str, int, int], None]
# tokens int64 [B, T], new tokens -> those that follow
Continue = Callable[[Tensor, int], list[list[int]]]
OURS = "brise"


@dataclass
class Side:
    """A way to continue prompts, and what it reads.

    Attributes:
        weight_bytes: read in every decode step; None where that is not known.
        memory: what is known of its memory, in bytes by name.
    """

    name: str
    run: Continue
    weight_bytes: int | None = None
    memory: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """What one row measures: ``batch`` prompts of ``prompt`` random tokens, ``new`` tokens each."""

    batch: int
    prompt: int
    new: int

    def __post_init__(self) -> None:
        if min(self.batch, self.prompt) < 1 or self.new < 2:
            raise ValueError(f"expected at least one prompt, one token in it and two new ones, got {self}")


def measure(
    sides: Sequence[Side], load: Load, *, vocab: int, device: torch.device, rounds: int, seed: int = 0
) -> dict[str, Any]:
    """Time all sides in turns: a JSON-ready row.

    A side that fails (out of memory, say) is named under ``missing`` with the reason; the others are measured.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (load.batch, load.prompt), generator=generator).to(device)
    missing: dict[str, str] = {}
    found: dict[str, list[list[int]]] = {}
    for side in sides:
        try:
            found[side.name] = side.run(ids, load.new)
        except (RuntimeError, ValueError, TypeError) as error:
            missing[side.name] = f"{type(error).__name__}: {error}"[:300]
    running = [side for side in sides if side.name in found]
    first: dict[str, list[float]] = {side.name: [] for side in running}
    whole: dict[str, list[float]] = {side.name: [] for side in running}
    for turn in range(rounds):
        for side in running if turn % 2 else reversed(running):
            first[side.name].append(_seconds(lambda side=side: side.run(ids, 1), device))  # type: ignore[misc]
            whole[side.name].append(_seconds(lambda side=side: side.run(ids, load.new), device))  # type: ignore[misc]
    row: dict[str, Any] = {
        "bench": "decode",
        **dataclasses.asdict(load),
        "rounds": rounds,
        "tokens": {name: sum(map(len, tokens)) for name, tokens in found.items()},
        "missing": missing,
        "sides": {},
    }
    ours_wrote = found.get(OURS)
    row["agree"] = {
        name: tokens == ours_wrote
        for name, tokens in found.items()
        if name != OURS and ours_wrote is not None
    }
    for side in running:
        decode = [w - f for w, f in zip(whole[side.name], first[side.name])]
        steps = load.new - 1
        per_step = statistics.median(decode) / steps
        row["sides"][side.name] = {
            "seconds_to_first_token": _spread(first[side.name]),
            "seconds": _spread(whole[side.name]),
            "tokens_per_second": _spread([load.batch * load.new / s for s in whole[side.name]]),
            "decode_tokens_per_second": _spread([load.batch * steps / s for s in decode]),
            "weight_bytes_per_second": None if side.weight_bytes is None else side.weight_bytes / per_step,
            "memory": side.memory,
        }
    ours = row["sides"].get(OURS)
    row["ratio"] = {}
    for side in running:
        if ours is not None and side.name != OURS:
            pairs = zip(whole[side.name], whole[OURS])
            row["ratio"][side.name] = _spread([theirs / own for theirs, own in pairs])
    return row


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(values: list[float]) -> dict[str, float]:
    return dataclasses.asdict(Spread.of(values))


def read_ceiling(nbytes: int = 1 << 29, rounds: int = 7) -> float:
    """Bytes a second that this processor reads from its memory, with all of torch's threads: the best of two ways."""
    rows, width = nbytes // (4 * 4096), 4096
    matrix, vector = torch.ones(rows, width), torch.ones(width)
    best = float("inf")
    for call in (matrix.sum, lambda: torch.mv(matrix, vector)):
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        best = min(best, statistics.median(times))
    return matrix.nbytes / best


def our_side(model: Any, batch: int, *, name: str = OURS, **options: Any) -> Side:
    """The decode loop with nothing that ends a text early; ``options`` are the Generator's."""
    from ..model.generate import Generator, Request

    generator = Generator(model, batch_size=batch, eos=(), **options)

    def run(ids: Tensor, new: int) -> list[list[int]]:
        requests = [Request(row, new) for row in ids.tolist()]
        events = generator.stream(requests, every_token=False)
        done = [event.completion for event in events if event.completion is not None]
        return [c.tokens for c in sorted(done, key=lambda c: c.index)]

    return Side(name, run, step_bytes(model), {"repacked": generator.model.repacked_bytes})


def peer_side(model: Any, name: str = "transformers", **options: Any) -> Side:
    """transformers' greedy ``generate``, with nothing that ends a text early."""
    # as an argument of generate() None would mean the model's own
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def run(ids: Tensor, new: int) -> list[list[int]]:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return out[:, ids.shape[1] :].tolist()

    return Side(name, run, step_bytes(model))


def step_bytes(model: Any) -> int:
    """Bytes of weights that one decode step reads: all but an embedding that is no head."""
    tied = model.config.tie_word_embeddings
    table = model.get_input_embeddings()
    held = [*table.parameters(), *table.buffers()]
    return loaded_bytes(model) - (0 if tied else sum(t.nbytes for t in held))


def run_cpu(
    folder: str | Path,
    *,
    batches: Sequence[int] = (1, 8),
    prompt: int = 128,
    new: int = 64,
    rounds: int = 5,
    memory: bool = True,
    command: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A checkpoint in fp32 on the CPU: our loop beside transformers' own model and generate.

    Args:
        memory: also measure each side's peak, in a process of its own.
    Raises:
        BenchError: the two do not write the same tokens.
    """
    from transformers import AutoModelForCausalLM

    from ..model.checkpoint import load_model

    say = progress or (lambda *_: None)
    device = torch.device("cpu")
    origin = dataclasses.asdict(collect(device, 0, command))
    say("ceiling", 0, 0)
    ceiling = read_ceiling()
    ours: Any = load_model(folder, dtype=torch.float32)
    peer = peer_side(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    ledger = predict_ledger(ours.config, None, torch.float32).nbytes
    rows = []
    for i, batch in enumerate(batches):
        say("decode", i, len(batches))
        load = Load(batch, prompt, new)
        side = our_side(ours, batch)
        side.memory |= {
            "weights_predicted": ledger,
            "cache_predicted": kv_cache_bytes(ours.config, prompt + new, batch=batch, dtype=torch.float32),
        }
        row = measure([side, peer], load, vocab=ours.config.vocab_size, device=device, rounds=rounds)
        if not row["agree"].get(peer.name, False):
            raise BenchError(
                f"{batch} prompts of {prompt} tokens: transformers and the decode loop do not write the same; "
                f"{row['missing'] or 'compare their tokens'}"
            )
        for name, entry in row["sides"].items():
            entry["memory"]["process_peak"] = in_child(_peak, name, str(folder), load) if memory else None
            entry["share_of_ceiling"] = entry["weight_bytes_per_second"] / ceiling
        rows.append(
            {
                **row,
                "model": Path(folder).name,
                "dtype": "float32",
                "read_bytes_per_second": ceiling,
                "provenance": origin,
            }
        )
    say("decode", len(batches), len(batches))
    return rows


def _peak(name: str, folder: str, load: Load) -> int | None:
    """The most memory that a process holds which does nothing but load one side and continue the prompts."""
    from transformers import AutoModelForCausalLM

    from ..model.checkpoint import load_model

    reset_peak()
    if name == OURS:
        model: Any = load_model(folder, dtype=torch.float32)
        side = our_side(model, load.batch)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        side = peer_side(model)
    side.run(torch.randint(model.config.vocab_size, (load.batch, load.prompt)), load.new)
    return process_peak()


def write_rows(folder: str | Path, rows: list[dict[str, Any]], name: str = "decode") -> list[Path]:
    """``decode.jsonl`` and ``decode.md`` in a folder, in place of an older run's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.jsonl", folder / f"{name}.md"]
    files[0].write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    files[1].write_text(table(rows))
    return files


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: tokens a second of every side, time to the first token, bytes a second, memory."""
    if not rows:
        return "Nothing was measured.\n"
    origin = rows[0]["provenance"]
    lines = [
        f"# Decoding {rows[0]['model']}, {origin['device']}, {origin['threads']} threads",
        "",
        "Medians (p20-p80) of the sides taking turns; the ratio is of whole runs, turn by turn. GB/s: weights read a",
        "step over its time.",
        "",
        "| batch | prompt + new | side | tokens/s | decode tokens/s | first token, ms | GB/s (of ceiling) | peak, MB "
        "| ours is faster |",
        "|--:|--:|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        for name, side in row["sides"].items():
            rate = side["weight_bytes_per_second"]
            share = side.get("share_of_ceiling")
            peak = side["memory"].get("process_peak") or side["memory"].get("gpu_peak")
            ratio = row["ratio"].get(name)
            cells = [
                str(row["batch"]),
                f"{row['prompt']} + {row['new']}",
                name,
                Spread(**side["tokens_per_second"]).text(),
                Spread(**side["decode_tokens_per_second"]).text(),
                Spread(**side["seconds_to_first_token"]).text(1e3, 0),
                "–" if rate is None else f"{rate / 1e9:.1f}" + ("" if share is None else f" ({share:.0%})"),
                "–" if peak is None else f"{peak / 1e6:.0f}",
                "–" if ratio is None else Spread(**ratio).text(digits=2) + "x",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    notes = {f"{name}: {why}" for row in rows for name, why in row["missing"].items()}
    return "\n".join([*lines, "", *(f"- {note}" for note in sorted(notes)), ""])
