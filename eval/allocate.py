"""Which format each module gets under a budget of bytes: the least sum of losses, exactly.

A multiple-choice knapsack: of every module one option is taken, the bytes stay within the budget, and the losses,
which are taken to add up, are as small as they can be. Solved as an integer program by scipy's milp (HiGHS).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


class BudgetError(ValueError):
    """No choice fits the budget."""


@dataclass(frozen=True)
class Option:
    """What one module may become: bytes on disk, and the loss it brings (KL in nats a token, for example)."""

    nbytes: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """The option of every module by name, the bytes of all, and the sum of their losses."""

    chosen: dict[str, str]
    nbytes: int
    loss: float


def allocate(options: Mapping[str, Mapping[str, Option]], budget: int) -> Allocation:
    """The best choice for ``options`` (module -> name -> :class:`Option`) within ``budget`` bytes.

    Raises:
        BudgetError: even the smallest options together are larger than the budget.
        ImportError: scipy is not installed.
        RuntimeError: the solver did not come to an optimum.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise ImportError('an allocation needs scipy: pip install "brise[demo]"') from error
    least = sum(min(o.nbytes for o in row.values()) for row in options.values())
    if least > budget:
        raise BudgetError(
            f"the smallest choice takes {least:,} bytes, the budget is {budget:,}: raise it, or allow smaller formats"
        )
    useful = {path: _useful(row) for path, row in options.items()}
    flat = [(path, name, option) for path, row in useful.items() for name, option in row.items()]
    unit = math.gcd(*(option.nbytes for _, _, option in flat)) or 1
    sizes = np.array([option.nbytes // unit for _, _, option in flat], dtype=float)
    losses = np.array([option.loss for _, _, option in flat])
    # the solver stops at a gap of 1e-6 in its own units: the losses are given in such as make that nothing
    spread = sum(
        max(o.loss for o in row.values()) - min(o.loss for o in row.values()) for row in useful.values()
    )
    losses = losses * (1e6 / spread if spread > 0 else 1.0)
    place = {path: i for i, path in enumerate(useful)}
    rows = np.array([place[path] for path, _, _ in flat])
    one_each = csr_array((np.ones(len(flat)), (rows, np.arange(len(flat)))), shape=(len(useful), len(flat)))
    limit = budget // unit
    while True:
        found = milp(
            losses,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None], -np.inf, limit)],
            options={"mip_rel_gap": 0.0},
        )
        if found.status != 0 or found.x is None:
            raise RuntimeError(f"the solver found no optimum ({found.message})")
        taken = [flat[i] for i in np.flatnonzero(found.x > 0.5)]
        total = sum(option.nbytes for _, _, option in taken)
        if total <= budget:
            break
        limit -= 1  # its sums are rounded: what is over by less than its tolerance is over
    chosen = {path: name for path, name, _ in taken}
    return Allocation({path: chosen[path] for path in options}, total, sum(o.loss for _, _, o in taken))


def _useful(row: Mapping[str, Option]) -> dict[str, Option]:
    """Without the options that another one beats or equals in both ways: they are in no best choice."""
    kept: dict[str, Option] = {}
    for name, option in sorted(row.items(), key=lambda item: (item[1].nbytes, item[1].loss)):
        if all(option.loss < other.loss for other in kept.values()):
            kept[name] = option
    return kept
