"""Sweeps in processes and on Ray: the rows of one process, whoever dies on the way."""

import contextlib
import importlib.util
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from brise.eval.engines import CellDied, Inline, Processes, portable
from brise.eval.record import read_rows
from brise.eval.spec import SpecError, load_spec, run_spec
from brise.eval.speed import SpeedProtocol
from brise.eval.sweep import how_far, run_sweep
from brise.quant.config import ConfigError, QuantConfig, QuantSpec, Rule


def rules(**spec) -> QuantConfig:
    return QuantConfig((Rule(("*layers.*",), QuantSpec(**spec)),))


CONFIGS = {"int8": rules(format="int8"), "nf4": rules(format="nf4", group_size=32)}


def figures(rows):
    return {
        row.name: (row.key, row.perplexity, row.divergence, row.memory.bytes, row.protocol) for row in rows
    }


@pytest.fixture(scope="module")
def settings(tiny_text):
    return {"text": f"{tiny_text}#evaluation", "windows": 4, "length": 32}


@pytest.fixture(scope="module")
def here(tiny_checkpoint, settings, tmp_path_factory):
    """The rows of a sweep in this process."""
    out = tmp_path_factory.mktemp("here")
    return run_sweep(tiny_checkpoint, CONFIGS, out, **settings).rows


def test_processes_give_the_figures_of_this_one(here, tiny_checkpoint, settings, tmp_path):
    notes, seen = [], []
    configs = {**CONFIGS, "broken": rules(format="int4", group_size=48)}
    result = run_sweep(
        tiny_checkpoint,
        configs,
        tmp_path,
        engine=Processes(2, threads=1),
        note=notes.append,
        progress=lambda *s: seen.append(s),
        **settings,
    )
    assert figures(result.rows) == figures(here)
    assert [f.name for f in result.failures] == ["broken"] and isinstance(
        result.failures[0].error, ConfigError
    )
    assert ("int8: score", 4, 4) in seen and ("cells", 3, 3) in seen
    assert notes[-1] == "3 of 3 cells, 1 failed" and any("2 of 3 cells" in n and "left" in n for n in notes)
    assert not any("speeds" in note for note in notes)
    assert (tmp_path / ".cells" / "baselines").is_dir()  # a cell is missing: the predictions stay for it
    again = run_sweep(tiny_checkpoint, CONFIGS, tmp_path, engine=Processes(1), **settings)
    assert again.skipped == ["source", "int8", "nf4"]


def test_a_process_that_is_killed_is_a_failing_cell(here, tiny_checkpoint, settings, tmp_path):
    """As the kernel does where memory runs out."""

    def progress(stage, done, total):
        if stage.startswith("int8:"):
            for process in multiprocessing.active_children():
                process.kill()

    engine = Processes(1, threads=1)
    result = run_sweep(tiny_checkpoint, CONFIGS, tmp_path, engine=engine, progress=progress, **settings)
    assert [row.name for row in result.rows] == ["source", "nf4"]
    assert isinstance(result.failures[0].error, CellDied) and "exit code -9" in str(result.failures[0])
    result = run_sweep(tiny_checkpoint, CONFIGS, tmp_path, **settings)
    assert figures(result.rows) == figures(here) and result.skipped == ["source", "nf4"]


def test_speeds_of_cells_beside_each_other_are_said_to_be_worth_nothing(tiny_checkpoint, settings, tmp_path):
    class Wide(Inline):
        width = 2

    notes = []
    speed = SpeedProtocol(prompt=4, new_tokens=1, warmup=0, repeats=1)
    how = {**settings, "speed": speed, "note": notes.append}
    run_sweep(tiny_checkpoint, {"int8": CONFIGS["int8"]}, tmp_path / "wide", engine=Wide(), **how)
    assert notes[0].startswith("speeds are timed while other cells run beside")
    notes.clear()
    run_sweep(tiny_checkpoint, {"int8": CONFIGS["int8"]}, tmp_path / "one", engine=Inline(), **how)
    assert not any("speeds" in note for note in notes)


DRIVER = """
import sys
from brise.eval.engines import Processes
from brise.eval.sweep import run_sweep
from brise.quant.config import QuantConfig, QuantSpec, Rule
if __name__ == "__main__":
    model, text, out = sys.argv[1:]
    specs = {f"g{g}": QuantSpec(format="int4", group_size=g) for g in (16, 32, 64)}
    configs = {name: QuantConfig((Rule(("*layers.*",), spec),)) for name, spec in specs.items()}
    run_sweep(model, configs, out, text=text, windows=4, length=32, engine=Processes(1, threads=1))
"""


def living(group: int) -> list[str]:
    """The processes of a group that still run; one that has ended may wait long for somebody to ask after it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            name, _, rest = path.read_text().rpartition(")")
            state, _, its_group = rest.split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(name)
    return found


def test_a_sweep_that_is_killed_goes_on_and_leaves_no_process(tiny_checkpoint, settings, tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    out = tmp_path / "out"
    command = [sys.executable, str(script), str(tiny_checkpoint), settings["text"], str(out)]
    with subprocess.Popen(command, start_new_session=True) as driver:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and len(read_rows(out / "runs.jsonl")[0]) < 2:
            time.sleep(0.05)
        driver.kill()
    assert 2 <= len(read_rows(out / "runs.jsonl")[0]) < 4
    deadline = time.monotonic() + 20
    while living(driver.pid):  # its cell ends with it
        assert time.monotonic() < deadline, "a process of the killed sweep is still there"
        time.sleep(0.1)
    configs = {f"g{g}": rules(format="int4", group_size=g) for g in (16, 32, 64)}
    result = run_sweep(tiny_checkpoint, configs, out, **settings)
    rows, problems = read_rows(out / "runs.jsonl")
    assert sorted(row.name for row in rows) == ["g16", "g32", "g64", "source"] and not problems
    assert len({row.key for row in rows}) == 4 and not result.failures and "source" in result.skipped


def test_two_sweeps_of_one_folder_write_no_row_twice(here, tiny_checkpoint, settings, tmp_path):
    def go():
        run_sweep(tiny_checkpoint, {}, tmp_path, **settings)

    threads = [threading.Thread(target=go) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row.name for row in read_rows(tmp_path / "runs.jsonl")[0]] == ["source"]


def test_errors_that_cannot_be_sent_say_the_same():
    class Odd(Exception):
        def __init__(self, a, b):
            super().__init__(f"{a} and {b}")

    error = portable(Odd(1, 2))
    assert isinstance(error, RuntimeError) and str(error) == "Odd: 1 and 2"
    assert isinstance(portable(ValueError("x")), ValueError)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((1, 3, 0, 10.0), "1 of 3 cells, about 20 s left"),
        ((12, 24, 1, 2100.0), "12 of 24 cells, 1 failed, about 35 min left"),
        ((1, 11, 0, 1800.0), "1 of 11 cells, about 5 h left"),
        ((3, 3, 0, 5.0), "3 of 3 cells"),
        # beside the one that is done another is half done: half a cell is left after one and a half
        ((1, 2, 0, 30.0, 2), "1 of 2 cells, about 10 s left"),
        ((3, 5, 0, 100.0, 9), "3 of 5 cells, about 25 s left"),
    ],
)
def test_how_far_a_sweep_is(arguments, text):
    assert how_far(*arguments) == text


# ---- written down -----------------------------------------------------------------------------------

SPEC = """
models: [{model}]
configs:
  - int8
  - beside.json
  - name: mine
    rules: [{{match: "*layers.*", format: int4, group_size: 32, algorithm: gptq}}]
    calibration: {{text: "{text}#calibration", windows: 4, length: 32}}
metrics:
  - {{text: "{text}#evaluation", windows: 4, length: 32}}
  - {{text: "{text}#evaluation", windows: 2, length: 32, dtype: bfloat16}}
calibration: {{windows: 3, once: true}}
"""


def test_a_sweep_written_down(here, tiny_checkpoint, tiny_text, tmp_path):
    path = tmp_path / "sweep.yaml"
    (tmp_path / "beside.json").write_text(json.dumps(CONFIGS["nf4"].to_dict()))
    path.write_text(SPEC.format(model=tiny_checkpoint, text=tiny_text))
    spec = load_spec(path)
    assert list(spec.configs) == ["int8", "beside", "mine"] and spec.cells == 8
    result = run_spec(spec, tmp_path / "out")
    assert not result.failures and len(result.rows) == 8
    by = {(row.name, row.protocol.dtype): row for row in result.rows}
    assert by["int8", "float32"].perplexity == here[1].perplexity
    mine = by["mine", "float32"]
    assert mine.config["calibration"]["windows"] == 3 and mine.config["calibration"]["hessians"] == "once"
    assert by["mine", "bfloat16"].protocol.windows == 2
    assert run_spec(spec, tmp_path / "out").skipped == ["source", "int8", "beside", "mine"] * 2


@pytest.mark.parametrize(
    "text, says",
    [
        ("models: [a]\nconfigs: [nf4]\nmetric: {}", "unknown key metric"),
        ("models: a\nconfigs: [nf4]", "models must be a list"),
        ("models: [a]\nconfigs: []", "configs must be a list"),
        ("models: [a]\nconfigs: [nf4, nf4]", "two configurations are named nf4"),
        ("models: [a]\nconfigs: [{rules: []}]", "needs a name"),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {window: 3}", "unknown key window; known: text"),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {speed: fast}", "speed must be"),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {speed: {prompts: 3}}", "speed: "),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {dtype: float12}", "unknown dtype 'float12'"),
        ("models: [a]\nconfigs: [nf4]\nmetrics: {tasks: lambada}", "tasks must be a list"),
        ("models: [a]\nconfigs: [nf4]\ncalibration: {window: 3}", "unknown key window"),
        ("models: [a]\nconfigs: [{name: b, preset: nf4, rules: []}]", "configs: b: unknown key rules"),
        ("[1, 2]", "expected a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_file_that_describes_no_sweep(text, says, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=says):
        load_spec(path)


def test_draws_and_one_pass(tiny_checkpoint, tiny_text, settings, tmp_path):
    spec = QuantSpec(format="int4", group_size=32, algorithm="gptq")
    calibration = {"text": f"{tiny_text}#calibration", "windows": 2, "length": 32}
    config = QuantConfig.from_dict(
        {"rules": [{"match": "*layers.*", **spec.to_dict()}], "calibration": calibration}
    )
    result = run_sweep(
        tiny_checkpoint,
        {"gptq": config, "int8": CONFIGS["int8"]},
        tmp_path,
        draws=2,
        calibrate_once=True,
        **settings,
    )
    assert [row.name for row in result.rows] == [
        "source",
        "gptq.d0",
        "gptq.d1",
        "int8",
    ] and not result.failures
    one, two = result.rows[1:3]
    assert one.perplexity != two.perplexity and one.config["calibration"]["seed"] == 0
    assert len(list((tmp_path / ".cells" / "hessians").glob("*/manifest.json"))) == 2


# ---- Ray --------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: brise[ray]")
def test_a_ray_cluster_of_two_workers_one_of_which_is_killed(here, tiny_checkpoint, settings, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    from brise.eval.engine_ray import OnRay

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
        engine = OnRay(cluster.address, retries=3)
        assert engine.width == 2
        configs = {**CONFIGS, "broken": rules(format="int4", group_size=48)}
        configs |= {f"g{g}": rules(format="int4", group_size=g) for g in (16, 32, 64)}
        seen = []

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
        wanted = figures(here)
        assert {name: value for name, value in figures(rows).items() if name in wanted} == wanted
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_the_items_of_a_cell_come_back_from_a_machine_that_shares_no_disk(tmp_path):
    from types import SimpleNamespace

    from brise.eval.engine_ray import OnRay
    from brise.eval.tasks import Item, read_items, write_items

    key = "0123456789abcdef" * 4
    there, here = tmp_path / "there", tmp_path / "here"
    row = SimpleNamespace(key=key)

    class Cell:
        out = here  # on another disk than the driver's it is another folder: see call
        setting = SimpleNamespace(device=SimpleNamespace(type="cpu"))

        def run(self, progress):
            write_items(self.out, key, {"arc:2": [Item(0, "a", {"acc": 1.0}), Item(1, "b", {"acc": 0.0})]})
            return row

    class Ray:
        """What of Ray the engine uses, at once and here."""

        exceptions = SimpleNamespace(RayError=ZeroDivisionError)
        wait = staticmethod(lambda waiting, num_returns: (waiting[:1], waiting[1:]))
        get = staticmethod(lambda reference: reference.value)

        def remote(self, function):
            def call(cell, threads):
                cell.out = there
                value = function(cell, threads)
                cell.out = here
                return Reference(value)

            return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=call))

    class Reference:
        def __init__(self, value):
            self.value = value

    engine = object.__new__(OnRay)
    engine.ray, engine.options = Ray(), {"num_cpus": 1, "num_gpus": 0}
    cell = Cell()
    assert list(engine.run([cell], lambda *_: None)) == [(cell, row)]
    assert read_items(here, key, "arc:2", "acc") == {"0:a": True, "1:b": False}


def test_cells_on_cuda_say_what_of_a_gpu_they_take():
    from types import SimpleNamespace

    from brise.eval.engine_ray import OnRay

    engine = object.__new__(OnRay)  # without a cluster
    engine.ray, engine.options = None, {"num_cpus": 1, "num_gpus": 0}
    cell = SimpleNamespace(setting=SimpleNamespace(device=SimpleNamespace(type="cuda")))
    with pytest.raises(ValueError, match="need a part of a GPU each"):
        list(engine.run([cell], lambda *_: None))


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    from brise.eval.engine_ray import OnRay

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"brise\[ray\]"):
        OnRay()
