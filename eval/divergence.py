"""How far a model's predictions are from its baseline's: mean KL and agreement of the first choice.

Perplexity looks at one probability a token and lets better and worse ones cancel; the divergence looks at the
whole distribution and is zero only where nothing changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .statistics import mean_per_token


@dataclass(frozen=True)
class Divergence:
    """Over the scored tokens, standard errors with the window as sampling unit.

    Attributes:
        kl, kl_stderr: mean of KL(baseline || model), in nats a token.
        top1, top1_stderr: share of tokens where both find the same one likeliest.
    """

    kl: float
    kl_stderr: float | None
    top1: float
    top1_stderr: float | None


def token_kl(baseline_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(baseline || model) at each position, fp32 [T], from logits [T, V]: sum_v p_v (log p_v - log q_v)."""
    log_p = F.log_softmax(baseline_logits.float(), dim=-1)
    log_q = F.log_softmax(logits.float(), dim=-1)
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q)


def same_first_choice(baseline_logits: Tensor, logits: Tensor) -> Tensor:
    """Whether the likeliest token is the same, bool [T], from logits [T, V]; of equals the lowest id."""
    return baseline_logits.argmax(dim=-1) == logits.argmax(dim=-1)


def divergence(kl: Tensor, agree: Tensor, tokens: Tensor) -> Divergence:
    """From the windows' sums of KL and of agreements, float64 [n], and their scored tokens, int64 [n]."""
    mean_kl, mean_agree = mean_per_token(kl, tokens), mean_per_token(agree, tokens)
    return Divergence(mean_kl.value, mean_kl.stderr, mean_agree.value, mean_agree.stderr)
