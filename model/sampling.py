"""The choice of the next token, on the device: each row with its own settings and its own random numbers.

Nothing here asks the device for a value, so all of it can stand in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

# what is returned in place of a token
RESTING, BROKEN = -1, -2

# splitmix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195), its constants as signed 64-bit integers
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class Sampling:
    """How one text's tokens are chosen; the filters apply in this order, as in transformers.

    Attributes:
        repetition_penalty: divides the positive and multiplies the negative logits of every token that the prompt or
            the text has (Keskar et al. 2019, arXiv:1909.05858); 1 is none.
        temperature: 0 takes the likeliest token each time.
        top_k: only the k likeliest; None is all.
        top_p: only the likeliest that together have this share (Holtzman et al. 2019, arXiv:1904.09751).
        min_p: only those at least this likely relative to the likeliest (Nguyen et al. 2024, arXiv:2407.01082).
        seed: the tokens are a function of the seed, the logits and how many came before; of nothing else.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind, fits, expected in (
            ("temperature", Real, lambda x: 0 <= x < float("inf"), "a finite number of at least 0"),
            ("top_k", Integral, lambda x: x >= 1, "an integer of at least 1, or None for all"),
            ("top_p", Real, lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
            ("min_p", Real, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
            ("repetition_penalty", Real, lambda x: 0 < x < float("inf"), "a finite number above 0"),
            ("seed", Integral, lambda x: -(1 << 63) <= x < 1 << 63, "an integer of 64 bits"),
        ):
            value = getattr(self, name)
            if name == "top_k" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
                raise ValueError(f"{name} must be {expected}, got {value!r}")

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the model is taken as it is."""
        return self.temperature == 0 and self.repetition_penalty == 1


class SamplerState:
    """The settings of ``rows`` rows as tensors, and which tokens each row has had.

    temperature, top_p, min_p, penalty: fp32 [rows]; top_k, seed, count: int64 [rows], count the tokens chosen so far;
    seen: bool [rows, vocab].
    """

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self.vocab = vocab
        self.temperature, self.top_p, self.min_p, self.penalty = torch.zeros(4, rows, device=device)
        self.top_k, self.seed, self.count = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.seen = torch.zeros(rows, vocab, dtype=torch.bool, device=device)

    def begin(self, row: int, sampling: Sampling, prompt: Tensor) -> None:
        """Give a row to another text; ``prompt`` int64 [T] on the device."""
        self.temperature[row] = sampling.temperature
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        self.penalty[row] = sampling.repetition_penalty
        self.top_k[row] = self.vocab if sampling.top_k is None else min(sampling.top_k, self.vocab)
        self.seed[row] = sampling.seed
        self.count[row] = 0
        if sampling.repetition_penalty != 1:
            self.seen[row] = False
            self.seen[row, prompt] = True

    def move(self, source: int, target: int) -> None:
        for t in self._tensors().values():
            t[target] = t[source]

    def rows(self, start: int, stop: int) -> SamplerState:
        """These rows, sharing the storage."""
        part = object.__new__(SamplerState)
        part.vocab = self.vocab
        for name, t in self._tensors().items():
            setattr(part, name, t[start:stop])
        return part

    def _tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}


def uniform(seed: Tensor, count: Tensor) -> Tensor:
    """Random numbers in [0, 1), fp32, a function of seed and count (int64, any shape) alone: splitmix64, 24 bits."""
    z = _mix(seed * _GOLDEN + 1)  # neighbouring seeds, far apart
    z = _mix(z + count * _GOLDEN)
    return ((z >> 40) & 0xFFFFFF).to(torch.float32) * 2**-24


def _mix(z: Tensor) -> Tensor:
    # the shifts of splitmix64 are those of unsigned numbers
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def filtered(logits: Tensor, state: SamplerState) -> tuple[Tensor, Tensor]:
    """Probabilities of the tokens that the filters leave, sorted, likeliest first.

    Args:
        logits: fp32 [rows, vocab], the penalty applied.
    Returns:
        fp32 [rows, vocab], up to a factor, 0 for what is left out; and the tokens int64 [rows, vocab].
    """
    heat = torch.where(state.temperature > 0, state.temperature, 1.0)
    scores, tokens = torch.sort(logits, dim=-1, descending=True, stable=True)
    # the likeliest at 0, where no temperature, however low, makes it infinite
    scores = (scores - scores[:, :1]) / heat[:, None]
    # equals of the k-th stay too
    least = scores.gather(1, (state.top_k - 1)[:, None])
    scores = scores.masked_fill(scores < least, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    before = weights.cumsum(-1) - weights
    # 1 leaves nothing out, though the sum may be rounded to 1 before the last token
    within = (before < state.top_p[:, None]) | (state.top_p >= 1)[:, None]
    keep = within & (weights >= state.min_p[:, None] * weights[:, :1])
    keep[:, 0] = True
    return weights * keep, tokens


def choose(logits: Tensor, state: SamplerState, plain: bool) -> Tensor:
    """The next token of each row.

    Args:
        logits: [rows, vocab], any float dtype.
        plain: all rows are :attr:`Sampling.plain`, so the rest need not be computed.
    Returns:
        int64 [rows]; BROKEN where a logit is nan or +inf, or none is finite.
    """
    logits = logits.float()
    top, likeliest = logits.max(dim=-1)
    chosen = likeliest
    if not plain:
        penalty = state.penalty[:, None]
        scores = torch.where(logits < 0, logits * penalty, logits / penalty)
        scores = torch.where(state.seen, scores, logits)
        weights, tokens = filtered(scores, state)
        total = weights.cumsum(-1)
        threshold = uniform(state.seed, state.count) * total[:, -1]
        place = (total <= threshold[:, None]).sum(-1)
        # rounding must not lead behind the last token that is left
        place = torch.minimum(place, (weights > 0).sum(-1) - 1).clamp(min=0)
        sampled = tokens.gather(1, place[:, None])[:, 0]
        chosen = torch.where(state.temperature > 0, sampled, scores.argmax(-1))
    return torch.where(torch.isfinite(top), chosen, BROKEN)


def record(chosen: Tensor, state: SamplerState, plain: bool) -> None:
    """Count the tokens chosen, int64 [rows]; what is negative is none."""
    real = chosen >= 0
    state.count += real.to(torch.int64)
    if not plain:
        token = chosen.clamp(min=0)[:, None]
        state.seen.scatter_(1, token, state.seen.gather(1, token) | real[:, None])
