"""The allotment under a budget, against trying every choice there is."""

import itertools
import random

import pytest

from brise.eval.allocate import BudgetError, Option, allocate

pytest.importorskip("scipy")


def every_choice(options, budget):
    """The least loss by brute force."""
    best = None
    for names in itertools.product(*(row for row in options.values())):
        taken = [options[path][name] for path, name in zip(options, names, strict=True)]
        if sum(o.nbytes for o in taken) <= budget:
            loss = sum(o.loss for o in taken)
            best = loss if best is None else min(best, loss)
    return best


@pytest.mark.parametrize("seed", range(25))
def test_the_best_of_all_choices(seed):
    rng = random.Random(seed)
    scale = 10.0 ** rng.randint(-9, 3)
    options = {
        f"m{i}": {
            f"f{j}": Option(rng.randint(1, 400) * rng.choice([1, 16]), scale * rng.random() ** 4)
            for j in range(4)
        }
        for i in range(6)
    }
    least = sum(min(o.nbytes for o in row.values()) for row in options.values())
    most = sum(max(o.nbytes for o in row.values()) for row in options.values())
    for budget in (least, rng.randint(least, most), most):
        found = allocate(options, budget)
        taken = [options[path][name] for path, name in found.chosen.items()]
        assert list(found.chosen) == list(options)
        assert sum(o.nbytes for o in taken) == found.nbytes <= budget
        assert sum(o.loss for o in taken) == pytest.approx(found.loss)
        assert found.loss == pytest.approx(every_choice(options, budget), rel=1e-7)


def test_large_numbers_of_modules_and_of_bytes():
    """As many as Mistral-7B has, against the bound that Lagrange multipliers give."""
    rng = random.Random(0)
    options = {}
    for i in range(226):
        size, weight = rng.choice([4096 * 4096, 4096 * 14336, 1024 * 4096]), rng.random() ** 2
        options[f"m{i}"] = {
            str(bits): Option(size * bits // 8 + 17 * bits, weight * 4.0**-bits * rng.uniform(0.8, 1.2))
            for bits in (2, 3, 4, 5, 8)
        }
    budget = sum(row["3"].nbytes for row in options.values())
    found = allocate(options, budget)
    assert found.nbytes <= budget
    bound = max(
        sum(min(o.loss + price * o.nbytes for o in row.values()) for row in options.values()) - price * budget
        for price in (10.0 ** (-14 + k / 40) for k in range(280))
    )
    # the best choice lies above the bound, and one module's step at most away from it
    assert bound <= found.loss * (1 + 1e-9) and found.loss <= bound * 1.01


def test_what_is_over_by_the_solvers_tolerance_is_not_taken(monkeypatch):
    import scipy.optimize

    real, calls = scipy.optimize.milp, []

    def loose(losses, constraints, **rest):
        """Its sums come out smaller than they are."""
        each, limit = constraints
        calls.append(limit.ub)
        return real(losses, constraints=[each, type(limit)(limit.A, limit.lb, limit.ub + 1)], **rest)

    monkeypatch.setattr(scipy.optimize, "milp", loose)
    row = {"small": Option(10, 1.0), "large": Option(101, 0.0)}
    found = allocate({"a": row, "b": row}, 201)
    assert found.nbytes == 111 and found.loss == 1.0 and len(calls) == 2


def test_a_budget_that_nothing_fits():
    with pytest.raises(BudgetError, match="the smallest choice takes 30 bytes, the budget is 29"):
        allocate({"a": {"x": Option(10, 1.0)}, "b": {"x": Option(20, 1.0), "y": Option(30, 0.0)}}, 29)
