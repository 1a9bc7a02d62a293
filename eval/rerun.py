"""Repeat a row from what it says of itself, and see whether the figures agree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..model.checkpoint import resolve_source
from ..model.stream import quantize_checkpoint
from ..quant.config import QuantConfig
from .calibration import calibration_windows
from .data import FREE, Bos
from .evaluate import baseline_of, measure_checkpoint
from .logprobs import FROM_FILE
from .model_info import model_info
from .record import EXACT, ROWS, Row, read_rows
from .scoring import Predictions
from .setting import Setting, make_setting
from .surface import measure_surface

Progress = Callable[[str, int, int], None]
# of a divergence's details, what is no other figure already
_DETAILS = {
    "median": "KL median",
    "p90": "KL p90",
    "p99": "KL p99",
    "p999": "KL p99.9",
    "top5": "same five",
    "true_token": "true token",
    "true_token_rms": "true token, rms",
}


class RerunError(ValueError):
    """A row that cannot be found, or repeated from what it says."""


@dataclass(frozen=True)
class Figure:
    """One figure of both runs. ``equal``: to the bit."""

    name: str
    before: float | None
    now: float | None

    @property
    def equal(self) -> bool:
        return self.before == self.now

    @property
    def difference(self) -> float:
        """Relative; infinite where only one run has it."""
        if self.before is None or self.now is None:
            return 0.0 if self.equal else math.inf
        return 0.0 if self.equal else abs(self.now - self.before) / max(abs(self.before), 1e-300)


@dataclass(frozen=True)
class Rerun:
    """A row and its repetition.

    Attributes:
        figures: of quality and of size; timings are never equal and are not among them.
        changed: what is otherwise than it was then: the checkpoint's bytes, versions, device, commit. None of it is an
            error.
    """

    before: Row
    now: Row
    figures: list[Figure]
    changed: list[str]

    @property
    def agrees(self) -> bool:
        return all(figure.equal for figure in self.figures)

    def in_words(self) -> str:
        if self.agrees:
            return f"All {len(self.figures)} figures of {self.before.name} agree to the bit."
        worst = max(self.figures, key=lambda figure: figure.difference)
        unlike = sum(not figure.equal for figure in self.figures)
        why = "; ".join(self.changed) or "nothing that the row knows of has changed"
        return (
            f"{unlike} of {len(self.figures)} figures of {self.before.name} differ, most of all {worst.name}: "
            f"{worst.before} then, {worst.now} now ({why})."
        )


def find_row(folder: str | Path, name: str) -> Row:
    """The last row of that name in ``folder``, or the one whose key begins so.

    Raises:
        RerunError: there is none, or rows under several protocols have that name.
    """
    rows, _ = read_rows(Path(folder) / ROWS)
    found = {
        row.key: row for row in rows if row.name == name or (len(name) >= 6 and row.key.startswith(name))
    }
    if not found:
        names = ", ".join(sorted({row.name for row in rows})) or "none"
        raise RerunError(f"expected a row {name} in {Path(folder) / ROWS}, there are {names}")
    if len(found) > 1:
        keys = ", ".join(key[:12] for key in found)
        raise RerunError(f"{name} is the name of {len(found)} rows: name one by its key: {keys}")
    return next(iter(found.values()))


def rerun(
    row: Row,
    model: str | Path,
    *,
    text: str | None = None,
    work: str | Path | None = None,
    cache_dir: str | Path | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> Rerun:
    """Make the row's checkpoint again from ``model`` and measure it under the row's protocol, window and cache.

    torch's threads are set to the row's for the while, as sums come out otherwise with others.

    Args:
        model: what the row was compared with, or, where that was nothing, the row's own model, as a folder or hub
            name; its hash must be the row's.
        text: where the row's text lies now, if it was a file.
        work: where the checkpoint is made; None is a folder that goes again.

    Raises:
        RerunError: another model or text than the row's, or a row that says too little to be repeated.
    """
    if row.baseline is not None and row.baseline.note == FROM_FILE:
        raise RerunError(f"{row.name} was compared with the file {row.baseline.name}: repeat its command")
    source = resolve_source(model)
    info = model_info(source, str(model))
    wanted = row.baseline or row.model
    if info.sha256 != wanted.sha256:
        raise RerunError(
            f"expected the model {wanted.name} of sha256 {wanted.sha256[:12]}, {model} has {info.sha256[:12]}"
        )
    is_itself = info.sha256 == row.model.sha256
    config = None if is_itself else _config(row)
    how = _setting(row, text, cache_dir)
    threads = torch.get_num_threads()
    torch.set_num_threads(row.provenance.threads)
    try:
        with TemporaryDirectory(prefix="brise-rerun-", dir=work) as folder:
            place = Path(folder)
            checkpoint = source if config is None else place / "checkpoint"
            setting = make_setting(source, command=command, cache_dir=cache_dir, **how)
            if config is not None:
                ids = None
                if config.needs_calibration:
                    ids = calibration_windows(source, config.calibration, how.get("bos", "auto"), cache_dir)
                quantize_checkpoint(
                    source,
                    checkpoint,
                    config,
                    calibration=ids,
                    hessians=place / "hessians",
                    progress=progress,
                )
            against = None
            if row.baseline is not None:
                kept = None if row.protocol.baseline == EXACT else place / "baseline"
                against = baseline_of(source, setting, kept, progress)
            now = _measure(row, checkpoint, setting, against, progress)
    finally:
        torch.set_num_threads(threads)
    if now.protocol.tokens_sha256 != row.protocol.tokens_sha256:
        raise RerunError(f"the text {row.protocol.text} gives other tokens than it did: is it another text?")
    return Rerun(row, now, _figures(row, now), _changed(row, now))


def _measure(
    row: Row, checkpoint: Path, setting: Setting, against: Predictions | None, progress: Progress | None
) -> Row:
    if row.variant is None:
        return measure_checkpoint(checkpoint, setting, against, name=row.name, progress=progress)
    window, cache = row.variant.window, row.variant.cache
    (now,) = measure_surface(checkpoint, setting, against, [window], [cache], progress=progress)
    return dataclasses.replace(now, name=row.name)


def _config(row: Row) -> QuantConfig:
    """What the row's checkpoint was made with from its baseline."""
    if row.config is None:
        raise RerunError(f"{row.name} is no quantization of what it was compared with: repeat its command")
    if "rules" not in row.config:
        raise RerunError(
            f"{row.name} was made by another library: make its checkpoint again, and brise eval it"
        )
    return QuantConfig.from_dict(row.config)


def _setting(row: Row, text: str | None, cache_dir: str | Path | None) -> dict[str, Any]:
    p = row.protocol
    bos: Bos = "always" if p.bos else "never"
    out: dict[str, Any] = {
        "text": text or p.text,
        "windows": p.windows,
        "dtype": getattr(torch, p.dtype),
        "device": p.device,
        "seed": row.provenance.seed,
        "batch": row.provenance.batch,
        "tasks": list(row.tasks or {}),
    }
    if p.name == FREE:
        return {**out, "length": p.length, "stride": p.stride, "bos": bos}
    documents = row.words.documents if row.words is not None else p.windows
    return {**out, "protocol": p.name, "windows": documents}


def _figures(before: Row, now: Row) -> list[Figure]:
    def flat(row: Row) -> dict[str, float | None]:
        d, r = row.divergence, row.relative
        found: dict[str, float | None] = {
            "perplexity": row.perplexity.value,
            "nll": row.perplexity.nll,
            "against source": None if r is None else r.value,
            "KL": None if d is None else d.kl,
            "same first choice": None if d is None else d.top1,
            "bytes": float(row.memory.bytes),
            "bits per weight": row.memory.bits_per_weight,
        }
        if d is not None and d.details is not None:
            found |= {label: getattr(d.details, name).value for name, label in _DETAILS.items()}
        if row.variant is not None:
            found["KV cache, bytes"] = float(row.variant.kv_bytes)
        if row.words is not None:
            found["perplexity by the word"] = row.words.value
        for name, score in (row.tasks or {}).items():
            found[name] = score.value
        return found

    old, new = flat(before), flat(now)
    return [Figure(name, value, new.get(name)) for name, value in old.items()]


def _changed(before: Row, now: Row) -> list[str]:
    a, b = before.provenance, now.provenance
    found = ["the checkpoint has other bytes"] if before.model.sha256 != now.model.sha256 else []
    found += [
        f"{name} {a.versions.get(name, 'none')} then, {b.versions.get(name, 'none')} now"
        for name in sorted({*a.versions, *b.versions})
        if a.versions.get(name) != b.versions.get(name)
    ]
    for name in ("device", "threads", "commit"):
        if getattr(a, name) != getattr(b, name):
            found.append(f"{name} {getattr(a, name)} then, {getattr(b, name)} now")
    return found
