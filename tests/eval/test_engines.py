"""Sweeps in processes: the rows of one process, whoever dies on the way."""

import contextlib
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from brise.eval import cells as cells_module
from brise.eval import engines, provenance
from brise.eval.engines import CellDied, CellTimeout, Inline, Processes, portable
from brise.eval.record import read_rows
from brise.eval.speed import SpeedProtocol
from brise.eval.sweep import how_far, run_sweep
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


def test_processes_give_the_figures_of_this_one(here, tiny_checkpoint, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_code", ["what this process began with"])
    notes, seen = [], []
    configs = {**CONFIGS, "broken": rules(format="int4", group_size=48)}
    result = run_sweep(
        tiny_checkpoint,
        configs,
        tmp_path,
        engine=Processes(2, threads=1, timeout=900),
        note=notes.append,
        progress=lambda *s: seen.append(s),
        **settings,
    )
    assert figures(result.rows) == figures(here)
    assert {row.provenance.commit for row in result.rows} == {"what this process began with"}
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


class Keep(Inline):
    """Takes note of the cells, and runs none."""

    def __init__(self):
        self.cells = []

    def run(self, cells, progress):
        self.cells += cells
        return iter(())


def test_a_cell_that_hangs_is_ended_and_the_next_begun(tiny_checkpoint, settings, tmp_path):
    keep = Keep()
    run_sweep(tiny_checkpoint, {}, tmp_path, engine=keep, **settings)
    (cell,) = keep.cells
    cell.marker.parent.mkdir(parents=True)
    with FileLock(cell.marker.with_suffix(".lock")):  # so it waits for ever
        begin = time.monotonic()
        results = list(Processes(1, threads=1, timeout=1.5).run([cell, cell], lambda *_: None))
        assert time.monotonic() - begin >= 3  # each has its own time
    assert [type(result) for _, result in results] == [CellTimeout] * 2
    assert "not done after 1.5 s" in str(results[0][1]) and not multiprocessing.active_children()
    with pytest.raises(ValueError, match="above 0 seconds"):
        Processes(1, timeout=0)


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


def test_two_sweeps_at_once_make_each_checkpoint_once(here, tiny_checkpoint, settings, tmp_path, monkeypatch):
    """The one that comes second to a cell waits, and takes the row of the first."""
    made, results = [], []
    plain = cells_module.quantize_checkpoint

    def quantize(source, folder, *args, **kwargs):
        made.append(folder.name)
        time.sleep(0.3)  # long enough for the other to come
        plain(source, folder, *args, **kwargs)

    monkeypatch.setattr(cells_module, "quantize_checkpoint", quantize)

    def go(names):
        configs = {name: CONFIGS[name] for name in names}
        results.append(run_sweep(tiny_checkpoint, configs, tmp_path, **settings))

    threads = [threading.Thread(target=go, args=(names,)) for names in (["int8", "nf4"], ["nf4", "int8"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == ["int8", "nf4"]
    for result in results:
        assert not result.failures and figures(result.rows) == figures(here)
    assert sorted(row.name for row in read_rows(tmp_path / "runs.jsonl")[0]) == ["int8", "nf4", "source"]


def test_a_process_that_is_killed_in_the_middle_of_its_row_is_a_failing_cell(monkeypatch):
    class Torn:
        """A pipe whose writer is gone after half of a message."""

        def recv(self):
            raise OSError("got end of file during message")

    class Process:
        exitcode = -9

        def start(self):
            pass

        def join(self):
            pass

    torn = Torn()
    context = SimpleNamespace(
        set_forkserver_preload=lambda names: None,
        Pipe=lambda duplex: (torn, SimpleNamespace(close=lambda: None)),
        Process=lambda **_: Process(),
    )
    monkeypatch.setattr(engines.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(engines, "wait", lambda connections, timeout: connections)
    monkeypatch.setattr(engines, "Connection", Torn)
    cell = SimpleNamespace(name="a")
    ((found, error),) = Processes(1, threads=1).run([cell], lambda *_: None)
    assert found is cell and isinstance(error, CellDied) and "exit code -9" in str(error)


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
