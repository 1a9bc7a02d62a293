"""Error bars on a quantization result: the spread over calibration sets drawn from one text."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .record import Row


@dataclass(frozen=True)
class DrawSpread:
    """Of rows that differ in the seed of their calibration alone: mean and standard deviation over the draws.

    Attributes:
        name: without the draw's suffix. draws: how many, at least two.
        perplexity, kl: (mean, standard deviation over draws); kl None where nothing was compared with.
    """

    name: str
    draws: int
    perplexity: tuple[float, float]
    kl: tuple[float, float] | None

    def in_words(self) -> str:
        """One line for a report."""
        text = f"{self.name}: perplexity {self.perplexity[0]:.3f} ± {self.perplexity[1]:.3f}"
        if self.kl is not None:
            text += f", KL {self.kl[0]:.4f} ± {self.kl[1]:.4f}"
        return f"{text} over {self.draws} draws of the calibration text (standard deviation)"


def spread_over_draws(rows: Sequence[Row]) -> Iterator[DrawSpread]:
    """Every configuration of ``rows`` (of one group) that was calibrated on two draws or more."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        calibration = (row.config or {}).get("calibration") or {}
        if row.config is None or calibration.get("seed") is None or row.variant is not None:
            continue
        rest = {k: v for k, v in calibration.items() if k != "seed"}
        key = json.dumps([{**row.config, "calibration": rest}, row.name.rpartition(".d")[0]], sort_keys=True)
        found.setdefault(key, []).append(row)
    for same in found.values():
        if len({row.config["calibration"]["seed"] for row in same if row.config}) < 2:
            continue
        kls = [row.divergence.kl for row in same if row.divergence is not None]
        yield DrawSpread(
            same[0].name.rpartition(".d")[0] or same[0].name,
            len(same),
            _mean([row.perplexity.value for row in same]),
            _mean(kls) if len(kls) == len(same) else None,
        )


def _mean(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values)
