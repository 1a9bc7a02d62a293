"""Sides that take turns: what each finds when its turn comes."""

from itertools import pairwise

import pytest

from brise.eval.timing import WARMUP, take_turns


@pytest.mark.parametrize("count", [2, 3, 8])
def test_no_side_follows_itself_and_each_follows_all_others(count):
    called = []
    sides = {name: lambda name=name: called.append(name) for name in "abcdefgh"[:count]}
    times = take_turns(sides, 60)
    assert [len(t) for t in times] == [60] * count
    turns = [called[at : at + count] for at in range(0, len(called), count)]
    assert len(turns) == WARMUP + 60 and all(sorted(turn) == sorted(sides) for turn in turns)
    assert set(pairwise(called)) == {(a, b) for a in sides for b in sides if a != b}
