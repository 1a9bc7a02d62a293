"""A baseline's predictions in 16 bits on disk, to compare many models with, and llama.cpp's file of them.

Both kinds of file hold a row a scored token: log-probabilities as ``low + scale * code`` with 16-bit codes and a
scale and a least value of the row's own, so the error is at most half a scale: 2.4e-4 nats over a range of 32, and
without a sign of its own, so that means over tokens are far nearer (1e-6 nats seen over 16k tokens). llama.cpp's
rows cut off what is 16 nats below the likeliest token; ours cut nothing.

llama.cpp's file (``llama-perplexity --save-all-logits``; tools/perplexity/perplexity.cpp): ``_logits_``, n_ctx
int32, n_vocab int32, n_chunk int32, the tokens int32 [n_chunk, n_ctx], then for each chunk the rows of the positions
n_ctx / 2 .. n_ctx - 2: float32 scale, float32 least log-probability, uint16 [n_vocab rounded up to even].
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import FREE, Windows
from .model_info import ModelInfo
from .scoring import Progress, Scores, _score

PRECISION = "16-bit"
# the note of a baseline whose model is not at hand
FROM_FILE = "log-probabilities of a file"
_MAGIC = b"_logits_"
_CODES, _META = "codes.npy", "baseline.json"
# llama.cpp keeps this many nats below the likeliest token
_RANGE = 16.0


class LogProbError(ValueError):
    """A file of log-probabilities that is damaged, or of other windows or another model."""


@dataclass(frozen=True)
class LogProbs:
    """Predictions read from a file: see :class:`brise.eval.scoring.Predictions`.

    Attributes:
        rows: uint16 [T, 4 + V (rounded up to even)]: the two floats of a row, then its codes; a map of the file.
        starts: the first row of each window, and its first target.
        vocab: V.
    """

    rows: Any
    vocab: int
    starts: tuple[tuple[int, int], ...]
    windows_sha256: str
    nll: Tensor
    info: ModelInfo | None
    precision: str = PRECISION

    def logits(self, window: int, before: slice, device: torch.device) -> Tensor:
        start, first = self.starts[window]
        begin = start + before.start - (first - 1)
        part = np.array(self.rows[begin : begin + before.stop - before.start])
        return decode_rows(part, self.vocab).to(device)


def encode_rows(logits: Tensor, reach: float | None = None) -> np.ndarray:
    """Rows uint16 [T, 4 + V] of logits [T, V]; ``reach`` nats below the likeliest token are kept, None keeps all.

    llama.cpp's own arithmetic, in float32 with halves to even, so that equal logits give equal bytes.
    """
    logits = logits.float().cpu()
    top = logits.max(dim=-1, keepdim=True).values
    low = logits.min(dim=-1, keepdim=True).values
    if reach is not None:
        low = torch.maximum(low, top - reach)
    total = (logits - top).exp().double().sum(-1, keepdim=True).log().float()
    scale = (top - low) / 65535.0
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    codes = ((logits - low) * inverse).round().clamp(0, 65535)
    kept = torch.where(logits > low, codes, torch.zeros_like(codes)).to(torch.int32).numpy().astype("<u2")
    head = torch.cat([scale, low - top - total], dim=-1).numpy().astype("<f4").view("<u2")
    pad = np.zeros((len(kept), kept.shape[1] % 2), "<u2")
    return np.concatenate([head, kept, pad], axis=1)


def decode_rows(rows: np.ndarray, vocab: int) -> Tensor:
    """Log-probabilities fp32 [T, V] of rows uint16 [T, 4 + V]."""
    head = torch.from_numpy(np.ascontiguousarray(rows[:, :4]).view("<f4").astype(np.float32))
    codes = torch.from_numpy(rows[:, 4 : 4 + vocab].astype(np.float32))
    return codes * head[:, :1] + head[:, 1:]


def cache_key(info: ModelInfo, windows: Windows, dtype: torch.dtype, device: str) -> str:
    """Of model, text and protocol: other windows, another model or precision is another file."""
    what = [info.sha256, windows.text_sha256, windows.sha256, windows.protocol, str(dtype), device]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def save_baseline(
    model: Any,
    windows: Windows,
    info: ModelInfo,
    folder: Path,
    *,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """Score ``model`` and keep its predictions in ``folder``, which appears whole; returns its scores."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    work.mkdir()
    vocab = model.config.vocab_size
    shape = (windows.scored_tokens, 4 + vocab + vocab % 2)
    try:
        codes = np.lib.format.open_memmap(work / _CODES, mode="w+", dtype="<u2", shape=shape)
        written = 0

        def listen(window: int, logits: Tensor) -> None:
            nonlocal written
            rows = encode_rows(logits)
            codes[written : written + len(rows)] = rows
            written += len(rows)

        scores = _score(model, windows, None, batch, progress, "baseline", None, listen)
        codes.flush()
        meta = {
            "model": asdict(info),
            "windows_sha256": windows.sha256,
            "vocab": vocab,
            "nll": scores.nll.tolist(),
        }
        (work / _META).write_text(json.dumps(meta) + "\n")
        os.rename(work, folder)
    except OSError:
        if not (folder / _META).is_file():  # another process was first, and its file is as good
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return scores


def load_baseline(folder: Path, windows: Windows) -> LogProbs:
    """The predictions in ``folder`` on ``windows``.

    Raises:
        LogProbError: they are of other windows, or cut off.
    """
    meta = json.loads((folder / _META).read_text())
    if meta["windows_sha256"] != windows.sha256:
        raise LogProbError(f"{folder} holds predictions on other windows")
    try:
        codes = np.load(folder / _CODES, mmap_mode="r")
    except (ValueError, OSError) as error:
        raise LogProbError(f"{folder / _CODES} cannot be read ({error}); delete {folder}") from error
    nll = torch.tensor(meta["nll"], dtype=torch.float64)
    info = ModelInfo(**meta["model"])
    return LogProbs(codes, meta["vocab"], _starts(windows), meta["windows_sha256"], nll, info)


def write_kld(path: Path, model: Any, windows: Windows, *, progress: Progress | None = None) -> Scores:
    """Score ``model`` and write llama.cpp's file; the windows must be cut as it cuts them (``llamacpp-512``).

    Raises:
        LogProbError: windows whose second half is not what is scored.
    """
    length = windows.length
    if windows.stop is not None or set(windows.first_target) != {length // 2 + 1}:
        raise LogProbError("llama.cpp scores the second half of each window: take the protocol llamacpp-512")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    vocab = model.config.vocab_size
    try:
        with temporary.open("wb") as file:
            file.write(_MAGIC + struct.pack("<iii", length, vocab, windows.count))
            file.write(windows.ids.to(torch.int32).numpy().astype("<i4").tobytes())

            def keep_rows(window: int, logits: Tensor) -> None:
                file.write(encode_rows(logits, _RANGE).tobytes())

            scores = _score(
                model,
                windows,
                None,
                1,
                progress,
                "baseline",
                None,
                keep_rows,
            )
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return scores


def read_kld(path: Path, bos_id: int | None = None) -> tuple[LogProbs, Windows]:
    """llama.cpp's file: the predictions in it, and the windows that they are of.

    Args:
        bos_id: put in the place of each window's first token, as llama.cpp does for models with a BOS before it
            runs them; the file has the text's own token there.

    Raises:
        LogProbError: not such a file, or cut off.
    """
    head = struct.calcsize("<8siii")
    size = path.stat().st_size
    with path.open("rb") as file:
        data = file.read(head)
        if len(data) < head or data[:8] != _MAGIC:
            raise LogProbError(f"{path}: expected a file that begins with _logits_, got {data[:8]!r}")
        length, vocab, count = struct.unpack("<iii", data[8:])
        if length < 4 or vocab < 1 or count < 1:
            raise LogProbError(f"{path}: {count} windows of {length} tokens over {vocab} words make no sense")
        scored, width = length - 1 - length // 2, 4 + vocab + vocab % 2
        expected = head + 4 * count * length + 2 * count * scored * width
        if size != expected:
            raise LogProbError(f"{path}: expected {expected} bytes, got {size}: was its writing cut off?")
        ids = np.frombuffer(file.read(4 * count * length), "<i4").reshape(count, length).astype(np.int64)
    tokens = torch.from_numpy(ids.copy())
    if bos_id is not None:
        tokens[:, 0] = bos_id
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    name = "llamacpp-512" if length == 512 else FREE
    first = (length // 2 + 1,) * count
    windows = Windows(tokens, first, path.name, digest, bos_id is not None, length, name)
    rows = np.memmap(path, "<u2", "r", head + 4 * count * length, (count * scored, width))
    nll = torch.zeros(count, dtype=torch.float64)
    for window in range(count):
        part = decode_rows(np.array(rows[window * scored : (window + 1) * scored]), vocab)
        nll[window] = -part.gather(1, tokens[window, first[0] :, None]).double().sum()
    with path.open("rb") as file:
        info = ModelInfo(path.name, hashlib.file_digest(file, "sha256").hexdigest(), FROM_FILE)
    return LogProbs(rows, vocab, _starts(windows), windows.sha256, nll, info), windows


def _starts(windows: Windows) -> tuple[tuple[int, int], ...]:
    starts, row = [], 0
    for first, number in zip(windows.first_target, windows.scored.tolist()):
        starts.append((row, first))
        row += number
    return tuple(starts)
