"""Sweeps on Ray: a cluster of two workers one of which is killed, and a cluster without room."""

import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from brise.eval import provenance
from brise.eval.engines import CellDied, CellTimeout, Inline
from brise.eval.record import read_rows
from brise.eval.sweep import run_sweep
from brise.quant.config import ConfigError

from .small_sweep import CONFIGS, figures, rules


@pytest.fixture(scope="module")
def settings(tiny_text):
    return {"text": f"{tiny_text}#evaluation", "windows": 4, "length": 32}


@pytest.fixture(scope="module")
def here(tiny_checkpoint, settings, tmp_path_factory):
    """The rows of a sweep in this process."""
    out = tmp_path_factory.mktemp("here")
    return run_sweep(tiny_checkpoint, CONFIGS, out, **settings).rows


class Doomed:
    """A cell whose process is killed ``deaths`` times, and then has an error of its own."""

    name, setting = "doomed", SimpleNamespace(device=SimpleNamespace(type="cpu"))

    def __init__(self, out, deaths):
        self.out, self.deaths = out, deaths

    def run(self, progress):
        with self.out.open("a") as file:
            file.write("x")
        if len(self.out.read_text()) <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("its own")


class StandIn:
    """What of Ray the engine uses: every task is never ready until it is cancelled."""

    exceptions = SimpleNamespace(RayError=ZeroDivisionError)

    def __init__(self, machines):
        self.machines, self.cancelled = machines, []

    def nodes(self):
        return [{"Alive": alive, "Resources": resources} for alive, resources in self.machines]

    def remote(self, function):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda cell, *_: f"of {cell.out}"))

    def wait(self, waiting, num_returns, timeout):
        self.machines = self.machines[1:]  # one after the other goes
        return [], waiting

    def cancel(self, reference, force):
        self.cancelled.append(reference)


def test_cells_that_no_machine_is_left_for_do_not_wait_for_ever(monkeypatch):
    from brise.eval import engine_ray

    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(engine_ray.time, "monotonic", lambda: next(clock))
    engine = object.__new__(engine_ray.OnRay)
    # a machine that has gone stays on Ray's list
    engine.ray = StandIn([(True, {"CPU": 4.0}), (True, {"CPU": 1.0})] + [(False, {"CPU": 4.0})] * 50)
    engine.wanted, engine.retries, engine.timeout = {"CPU": 1, "GPU": 0}, 3, None
    cells = [Doomed(Path(name), 0) for name in "ab"]
    results = list(engine.run(cells, lambda *_: None))
    assert [cell for cell, _ in results] == cells
    for _, error in results:
        assert isinstance(error, engine_ray.NoRoomError)
        assert str(error).startswith("expected a machine with 1 CPU for a cell, the cluster has none")
    assert len(engine.ray.cancelled) == 2
    assert len(engine.ray.machines) > 40  # soon after the last of those alive


@pytest.mark.parametrize(
    ("machine", "wanted", "cells"),
    [
        ({"CPU": 8.0, "GPU": 2.0}, {"CPU": 1, "GPU": 1}, 2),
        ({"CPU": 3.0, "GPU": 8.0}, {"CPU": 2, "GPU": 1}, 1),
        ({"CPU": 8.0}, {"CPU": 1, "GPU": 0.25}, 0),
        ({"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.1, "GPU": 0.3}, 3),
        ({"CPU": 1.0}, {"CPU": 0, "GPU": 0}, 1),
    ],
)
def test_how_many_cells_fit_on_a_machine(machine, wanted, cells):
    from brise.eval.engine_ray import _fits

    assert _fits(machine, wanted) == cells


def hung(model, settings, out, address):
    """What comes of a cell whose lock another holds, with a time limit."""
    from brise.eval.engine_ray import OnRay

    class Keep(Inline):
        def run(self, cells, progress):
            found.extend(cells)
            return iter(())

    found = []
    run_sweep(model, {}, out, engine=Keep(), **settings)
    found[0].marker.parent.mkdir(parents=True)
    with FileLock(found[0].marker.with_suffix(".lock")):
        return list(OnRay(address, retries=1, timeout=1.5).run(found, lambda *_: None))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: brise[ray]")
def test_a_ray_cluster_of_two_workers_one_of_which_is_killed(
    here, tiny_checkpoint, settings, tmp_path, monkeypatch
):
    import ray
    from ray.cluster_utils import Cluster

    from brise.eval.engine_ray import NoRoomError, OnRay

    # the workers are of another module: what they are sent has to be whole
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
        engine = OnRay(cluster.address, retries=3)
        assert engine.width == 2
        # neither has two, though both together have
        with pytest.raises(
            NoRoomError, match="expected a machine with 2 CPU for a cell, the cluster has 0 CPU"
        ):
            OnRay(cluster.address, cpus=2)
        with pytest.raises(NoRoomError, match=r"with 1 CPU and 0\.5 GPU for a cell"):
            OnRay(cluster.address, gpus=0.5)
        configs = {**CONFIGS, "broken": rules(format="int4", group_size=48)}
        configs |= {f"g{g}": rules(format="int4", group_size=g) for g in (16, 32, 64)}
        seen = []
        monkeypatch.setattr(provenance, "_code", ["the driver's, on another machine perhaps"])

        def note(text):
            seen.append(text)
            if text.startswith("1 of 6"):  # both are at work on a cell now
                cluster.remove_node(workers[0], allow_graceful=False)

        result = run_sweep(tiny_checkpoint, configs, tmp_path, engine=engine, note=note, **settings)
        assert any(text.startswith("1 of 6") for text in seen)
        assert [f.name for f in result.failures] == ["broken"]
        assert isinstance(result.failures[0].error, ConfigError)
        rows, _ = read_rows(tmp_path / "runs.jsonl")
        assert sorted(row.name for row in rows) == ["g16", "g32", "g64", "int8", "nf4", "source"]
        assert {row.provenance.commit for row in rows} == {provenance.commit()}  # the workers' own
        wanted = figures(here)
        assert {name: value for name, value in figures(rows).items() if name in wanted} == wanted
        for deaths, retries in ((2, 2), (2, 1)):
            cell = Doomed(tmp_path / f"{deaths}-{retries}", deaths)
            ((_, result),) = OnRay(cluster.address, retries=retries).run([cell], lambda *_: None)
            assert len(cell.out.read_text()) == min(deaths, retries + 1) + (deaths <= retries)
            assert isinstance(result, CellDied if deaths > retries else ValueError), result
        ((cell, result),) = hung(tiny_checkpoint, settings, tmp_path / "hung", cluster.address)
        assert isinstance(result, CellTimeout) and "not done after 1.5 s" in str(result)
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_the_items_of_a_cell_come_back_from_a_machine_that_shares_no_disk(tmp_path):
    from brise.eval.engine_ray import OnRay
    from brise.eval.tasks import Item, read_items, write_items

    key = "0123456789abcdef" * 4
    there, here = tmp_path / "there", tmp_path / "here"
    row = SimpleNamespace(key=key)

    class Cell:
        name = "a cell"
        out = here  # on another disk than the driver's it is another folder: see call
        setting = SimpleNamespace(device=SimpleNamespace(type="cpu"))

        def run(self, progress):
            write_items(self.out, key, {"arc:2": [Item(0, "a", {"acc": 1.0}), Item(1, "b", {"acc": 0.0})]})
            return row

    class Ray:
        """What of Ray the engine uses, at once and here."""

        exceptions = SimpleNamespace(RayError=ZeroDivisionError)
        wait = staticmethod(lambda waiting, num_returns, timeout: (waiting[:1], waiting[1:]))
        get = staticmethod(lambda reference: reference.value)

        def remote(self, function):
            def call(cell, *rest):
                cell.out = there
                value = function(cell, *rest)
                cell.out = here
                return Reference(value)

            return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=call))

    class Reference:
        def __init__(self, value):
            self.value = value

    engine = object.__new__(OnRay)
    engine.ray, engine.wanted, engine.timeout = Ray(), {"CPU": 1, "GPU": 0}, None
    cell = Cell()
    assert list(engine.run([cell], lambda *_: None)) == [(cell, row)]
    assert read_items(here, key, "arc:2", "acc") == {"0:a": True, "1:b": False}


def test_cells_on_cuda_say_what_of_a_gpu_they_take():
    from brise.eval.engine_ray import OnRay

    engine = object.__new__(OnRay)  # without a cluster
    engine.ray, engine.wanted = None, {"CPU": 1, "GPU": 0}
    cell = SimpleNamespace(setting=SimpleNamespace(device=SimpleNamespace(type="cuda")))
    with pytest.raises(ValueError, match="need a part of a GPU each"):
        list(engine.run([cell], lambda *_: None))


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    from brise.eval.engine_ray import OnRay

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"brise\[ray\]"):
        OnRay()
