"""Tasks: lm-eval's own figures on sets that need no hub, and the items that two models are compared by."""

import json

import pytest
import yaml

from brise.eval.assets import ASSETS, fetch
from brise.eval.tasks import (
    CONFIGS,
    TaskError,
    TaskRequest,
    offline_config,
    offline_tasks,
    run_tasks,
)
from brise.model.checkpoint import load_model, load_tokenizer

LETTERS = "abcdefgh"


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """A folder with sets of the same columns as the asset's, and tasks on them."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    folder = tmp_path / "sets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    choices = [{"text": [c * 3, c * 2, "xyz"], "label": ["A", "B", "C"]} for c in LETTERS]
    rows = {
        "id": list(LETTERS),
        "question": [f"What is {c}?" for c in LETTERS],
        "choices": choices,
        "answerKey": ["A", "B", "C", "A", "B", "C", "A", "B"],
    }
    (folder / "arc_easy").mkdir(parents=True)
    writer = datasets.arrow_writer.ArrowWriter(path=str(folder / "arc_easy" / "validation.arrow"))
    for i in range(len(LETTERS)):
        writer.write({name: values[i] for name, values in rows.items()})
    writer.finalize()
    import gzip

    (folder / "lambada").mkdir()
    with gzip.open(folder / "lambada" / "requests.jsonl.gz", "wt") as file:
        for c in LETTERS:
            file.write(
                json.dumps({"request": {"context": c * 5, "continuation": f" {c}"}, "doc": {"id": c}}) + "\n"
            )
    monkeypatch.setattr("brise.eval.tasks.fetch", lambda *_: folder)
    return folder


def test_what_is_no_task(sets, tiny_checkpoint):
    for text in ("", "a:b", "a:0", "a:", ":3"):
        with pytest.raises(TaskError, match="expected a task as NAME"):
            TaskRequest.parse(text)
    with pytest.raises(TaskError, match="offline there are arc_challenge_offline, arc_easy_offline"):
        TaskRequest.parse("arc_offline")
    assert str(TaskRequest.parse(" a:3 ")) == "a:3" and TaskRequest.parse("a").limit is None
    with pytest.raises(TaskError, match="no_such_task could not be run"):
        run_tasks(load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint), [TaskRequest("no_such_task")])
    with pytest.raises(TaskError, match=r"expected piqa/validation\.arrow in"):
        offline_config("piqa_offline")


def test_nine_sets_ship_and_every_file_of_theirs_is_in_the_asset():
    names = {
        "arc_easy",
        "arc_challenge",
        "boolq",
        "hellaswag",
        "lambada",
        "mmlu",
        "openbookqa",
        "piqa",
        "sciq",
    }
    assert set(offline_tasks()) == {f"{name}_offline" for name in {*names, "winogrande"}}
    held = set(ASSETS["tasks"].members.values())
    for path in CONFIGS.glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        assert config["task"] == path.stem
        for pattern in config["dataset_kwargs"]["data_files"].values():
            assert pattern in held or (pattern == "mmlu/test/*.arrow" and len(held) == 9 + 57)


@pytest.mark.assets
def test_prompts_are_lm_evals_own():
    """Each shipped task against lm-eval's of that name, document by document."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    fetch("tasks")
    theirs_of = {"lambada": None, "mmlu": "mmlu_anatomy"}
    manager = tasks.TaskManager()
    for name in offline_tasks():
        short = name.removesuffix("_offline")
        other = theirs_of.get(short, short)
        if other is None:
            continue
        config = offline_config(name)
        (files,) = config["dataset_kwargs"]["data_files"].values()
        rows = datasets.Dataset.from_file(files[0] if short != "mmlu" else files[1]).select(range(3))
        ours = _task(manager, config, rows)
        their_config = dict(_config(manager, other))
        if short == "boolq":  # the hub's has numbers for answers
            rows = rows.map(lambda row: {"label": int(row["answer"])})
        their = _task(manager, their_config, rows)
        for a, b in zip(ours, their, strict=True):
            assert a == b, name


def _config(manager, name):
    from lm_eval.tasks import TaskManager

    assert isinstance(manager, TaskManager)
    entry = manager._entry(name)
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(entry.yaml_path)


def _task(manager, config, rows):
    """(prompt, answers, target) of every row, by lm-eval's own reading of a config."""
    from lm_eval.api.task import ConfigurableTask

    config = {
        k: v for k, v in config.items() if k not in ("dataset_path", "dataset_name", "dataset_kwargs", "tag")
    }
    split = config.get("test_split") or config["validation_split"]
    config |= {"custom_dataset": lambda **_: {split: rows}, "test_split": split, "fewshot_split": None}
    config |= {"validation_split": None, "training_split": None}
    task = ConfigurableTask(config=config)
    out = []
    for doc in task.test_docs():
        context = task.fewshot_context(doc, 0)
        out.append((context, task.doc_to_choice(doc), task.doc_to_target(doc)))
    return out
