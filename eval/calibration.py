"""What a calibration set is, and how good its Hessians are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.checkpoint import load_tokenizer
from ..model.hessian_store import HEAD, HessianStore, gather_hessians
from ..model.walk import STAGES
from ..quant.calibrate import HessianError
from ..quant.config import Calibration
from ..quant.gptq import GPTQOptions, dead_channels, factorize
from .data import Bos, calibration_ids, load_text

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HessianReport:
    """One Hessian.

    Attributes:
        modules: that it is of. width: K.
        rank: eigenvalues above K times fp32's epsilon times the largest: what it has no right to be asked beyond.
        dead: channels that no input excited.
        condition: largest over smallest eigenvalue, undamped; None where the smallest is not above zero.
        damping: share of the mean diagonal that GPTQ had to add; None where its greatest was not enough.
        damped_condition: with that added.
    """

    modules: tuple[str, ...]
    width: int
    rank: int
    dead: int
    condition: float | None
    damping: float | None
    damped_condition: float | None


@dataclass(frozen=True)
class CalibrationReport:
    """Of one calibration set on one model.

    Attributes:
        padding: tokens of padding: the windows are cut from running text, so it should be none.
        bos: windows that begin with BOS. distinct: different tokens. sha256: of text and of tokens.
        hessians: where they were asked for.
    """

    text: str
    text_sha256: str
    windows: int
    length: int
    tokens: int
    distinct: int
    padding: int
    bos: int
    ids_sha256: str
    hessians: list[HessianReport]


def calibration_windows(
    source: Path, calibration: Calibration, bos: Bos = "auto", cache_dir: str | Path | None = None
) -> Tensor:
    """The windows that a calibration asks for, int64 [windows, length]."""
    text = load_text(calibration.text, "calibration", cache_dir)
    tokenizer = load_tokenizer(source)
    return calibration_ids(
        text,
        tokenizer,
        windows=calibration.windows,
        length=calibration.length,
        seed=calibration.seed,
        bos=bos,
    )


def report_calibration(
    source: Path,
    calibration: Calibration,
    folder: Path | None,
    *,
    options: GPTQOptions | None = None,
    bos: Bos = "auto",
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Describe a calibration set; with a ``folder`` gather its Hessians there and describe them as well.

    Raises:
        TextError: the text is missing or too short.
        CheckpointError: ``source`` cannot be read.
    """
    text = load_text(calibration.text, "calibration", cache_dir)
    tokenizer = load_tokenizer(source)
    ids = calibration_windows(source, calibration, bos, cache_dir)
    found: list[HessianReport] = []
    if folder is not None:
        store = gather_hessians(source, ids, folder, progress=progress)
        found = describe_store(store, options or GPTQOptions(), progress)
    return CalibrationReport(
        text=text.name,
        text_sha256=text.sha256,
        windows=ids.shape[0],
        length=ids.shape[1],
        tokens=ids.numel(),
        distinct=len(ids.unique()),
        padding=_count(ids, tokenizer.pad_token_id),
        bos=_count(ids[:, 0], tokenizer.bos_token_id),
        ids_sha256=hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
        hessians=found,
    )


def describe_store(
    store: HessianStore, options: GPTQOptions, progress: Progress | None = None
) -> list[HessianReport]:
    """Every Hessian of a store, in the order of the model."""
    out = []
    for number, block in enumerate(store.blocks, 1):
        for stage, hessian in sorted(store.load(block).items()):
            names = ("lm_head",) if block == HEAD else tuple(f"{block}.{name}" for name in STAGES[stage])
            out.append(describe_hessian(names, hessian, options))
        if progress is not None:
            progress("eigenvalues", number, len(store.blocks))
    return out


def describe_hessian(modules: tuple[str, ...], hessian: Tensor, options: GPTQOptions) -> HessianReport:
    """Rank, condition and damping of one Hessian, fp32 [K, K]."""
    width = hessian.shape[0]
    values = torch.linalg.eigvalsh(hessian.double())
    top, low = float(values[-1]), float(values[0])
    limit = width * torch.finfo(torch.float32).eps * top
    try:
        damping, _ = factorize(hessian, options)
    except HessianError:
        damping = None
    mean = float(hessian.diagonal().double().mean())
    # what is below the rank's limit is rounding, and may be negative
    damped = None if damping is None else (top + damping * mean) / (max(low, 0.0) + damping * mean)
    return HessianReport(
        modules,
        width,
        int((values > limit).sum()),
        int(dead_channels(hessian).sum()),
        top / low if low > limit else None,
        damping,
        damped,
    )


def _count(ids: Tensor, token: Any) -> int:
    return 0 if token is None else int((ids == token).sum())
