"""The spread over draws of the calibration text, worked out by hand, and what is no draw of it."""

import dataclasses
import statistics
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from brise.eval.bootstrap import Interval
from brise.eval.divergence import Details
from brise.eval.draws import spread_over_draws
from brise.eval.plot import QUANTITIES
from brise.eval.record import Variant
from brise.eval.report import group_rows, markdown
from brise.eval.speed import Rate, Speed

_spec = spec_from_file_location("made_rows", Path(__file__).with_name("test_report.py"))
_module = module_from_spec(_spec)
_spec.loader.exec_module(_module)
make_row = _module.make_row


def drawn(name, seed, perplexity, windows=8, **changes):
    config = {
        "rules": [{"algorithm": "gptq", "format": "int4"}],
        "calibration": {"windows": windows, "length": 64, "text": "boolq", "seed": seed},
    }
    return make_row(name, 12, perplexity, config=config, **changes)


def test_draws_of_two_calibrations_are_two_spreads():
    rows = [drawn(f"a.d{i}", i, 20.0 + i) for i in range(3)]
    rows += [drawn(f"a.d{i}", i, 30.0 + 2 * i, windows=16) for i in range(2)]
    found = list(spread_over_draws(rows))
    assert [(d.name, d.draws) for d in found] == [("a", 3), ("a", 2)]
    for spread, values in zip(found, ([20.0, 21.0, 22.0], [30.0, 32.0])):
        assert spread.perplexity == pytest.approx((statistics.mean(values), statistics.stdev(values)))


def test_a_divergence_that_one_draw_lacks_has_no_spread():
    rows = [drawn(f"a.d{i}", i, 20.0 + i) for i in range(3)]
    rows[1] = dataclasses.replace(rows[1], divergence=None)
    (found,) = spread_over_draws(rows)
    assert found.kl is None and found.draws == 3


def test_a_surface_is_no_draw():
    rows = [drawn(f"a.d{i}", i, 20.0 + i, variant=Variant(None, "int8", 10)) for i in range(2)]
    assert list(spread_over_draws(rows)) == []


def test_the_column_p99_is_the_99th_percentile():
    names = [field.name for field in dataclasses.fields(Details) if field.name != "resamples"]
    details = Details(**{name: Interval(float(i)) for i, name in enumerate(names)}, resamples=1000)
    row = make_row("nf4", 12, 25)
    row = dataclasses.replace(row, divergence=dataclasses.replace(row.divergence, details=details))
    assert f"| {names.index('p99')}.000 |" in markdown(group_rows([row])[0])


def test_the_bar_of_a_speed_reaches_from_p20_to_p80():
    rate = Rate(10.0, 7.0, 11.0)
    row = make_row("nf4", 12, 25, speed=Speed(rate, rate, 8, 2, 1, 3))
    (speed,) = (quantity for quantity in QUANTITIES if quantity.name == "speed")
    assert speed.bar(row, None) == (3.0, 1.0)
