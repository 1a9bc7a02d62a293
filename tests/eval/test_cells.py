"""What makes a cell's checkpoint, its baseline's file and its row another one: part by part."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from brise.eval import cells as cells_module
from brise.eval.baseline_file import baseline_path
from brise.eval.cells import SOURCE, Cell, checkpoint_identity
from brise.eval.data import Text, Windows
from brise.eval.model_info import ModelInfo
from brise.eval.setting import Setting
from brise.eval.sweep import _key
from brise.eval.tasks import TaskRequest
from brise.quant.config import Calibration, QuantConfig, QuantSpec, Rule

INFO = ModelInfo("tiny", "a" * 64)
CONFIG = QuantConfig((Rule(("*layers.*",), QuantSpec(format="int4", group_size=32)),), Calibration(windows=4))
IDS = torch.arange(12).reshape(3, 4)
WINDOWS = Windows(IDS, (1, 1, 1), "text", "b" * 64, False, 4)
SETTING = Setting(WINDOWS, torch.float32, torch.device("cpu"))


def test_a_checkpoint_is_of_its_source_its_configuration_and_its_text():
    other = dataclasses.replace(CONFIG, calibration=Calibration(windows=4, seed=1))
    made = [
        checkpoint_identity(INFO, CONFIG, None, "auto"),
        checkpoint_identity(dataclasses.replace(INFO, sha256="c" * 64), CONFIG, None, "auto"),
        checkpoint_identity(INFO, other, None, "auto"),
        checkpoint_identity(INFO, CONFIG, Text("corpus.txt", ("one",)), "auto"),
        checkpoint_identity(INFO, CONFIG, Text("corpus.txt", ("two",)), "auto"),  # the file was written anew
        checkpoint_identity(INFO, CONFIG, None, "never"),
    ]
    assert len(set(made)) == len(made)
    # how it was named is no part of it
    assert checkpoint_identity(ModelInfo("renamed", "a" * 64), CONFIG, None, "auto") == made[0]


def test_predictions_are_of_their_model_windows_and_precision():
    def path(info=INFO, **changes):
        return baseline_path(Path("x"), info, dataclasses.replace(SETTING, **changes))

    other = IDS.clone()
    other[2, 3] = 0
    found = [
        path(),
        path(dataclasses.replace(INFO, sha256="c" * 64)),
        path(windows=dataclasses.replace(WINDOWS, ids=other)),
        path(windows=dataclasses.replace(WINDOWS, first_target=(1, 2, 1))),
        path(dtype=torch.bfloat16),
        path(device=torch.device("cuda")),
    ]
    assert len(set(found)) == len(found)
    # nothing else is in them: what is timed, and which tasks are run, changes no prediction
    assert path(tasks=(TaskRequest("arc_easy_offline", 2),)) == path()


def test_other_tasks_make_another_row():
    settings = [
        SETTING,
        dataclasses.replace(SETTING, tasks=(TaskRequest("arc_easy_offline", 2),)),
        dataclasses.replace(SETTING, tasks=(TaskRequest("arc_easy_offline", 3),)),
        dataclasses.replace(SETTING, batches=(1,), contexts=(8,)),
        dataclasses.replace(SETTING, batches=(2,), contexts=(8,)),
    ]
    assert len({_key(setting, "nf4", "identity") for setting in settings}) == len(settings)
    assert _key(SETTING, "nf4", "identity") != _key(SETTING, "nf4", "other")


@pytest.fixture
def cell(tmp_path):
    return Cell("nf4", "key", CONFIG, tmp_path, INFO, tmp_path, tmp_path, SETTING, None, "auto")


def test_a_row_that_another_sweep_wrote_is_taken_by_its_key(cell, monkeypatch):
    rows = [SimpleNamespace(name="nf4", key="other"), SimpleNamespace(name="of any name", key="key")]
    monkeypatch.setattr(cells_module, "read_rows", lambda path: (rows, []))
    monkeypatch.setattr(Cell, "_run", lambda self, progress: "measured")
    assert cell.run(lambda *_: None) is rows[1]
    assert dataclasses.replace(cell, key="missing").run(lambda *_: None) == "measured"
    # a source's row is not enough: the other cells need its predictions
    source = dataclasses.replace(cell, name=SOURCE, config=None)
    assert source.run(lambda *_: None) == "measured"
    path = baseline_path(source.baselines, INFO, SETTING)
    path.parent.mkdir(parents=True)
    path.touch()
    assert source.run(lambda *_: None) is rows[1]
    assert dataclasses.replace(source, timed=False).run(lambda *_: None) == "measured"


def test_a_checkpoint_that_was_made_of_something_else_is_not_used(cell):
    cell.folder.mkdir()
    assert cell._made_before() is None  # nobody says what it is
    cell._mark(2.5)
    assert cell._made_before() == 2.5
    assert dataclasses.replace(cell, bos="never")._made_before() is None
    cell._mark(None)  # begun, and never finished
    assert cell._made_before() is None
    cell._mark(2.5)
    cell.folder.rmdir()
    assert cell._made_before() is None
