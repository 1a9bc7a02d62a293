"""Tasks, through lm-eval's own programming interface: its built-in ones, and nine sets that need no hub.

A task is asked for as ``NAME`` or ``NAME:LIMIT`` (its first LIMIT items). Names that end in ``_offline`` are the
files in ``task_configs/`` on the asset ``tasks``: the same prompts as lm-eval's tasks of that name, on the splits
that the asset has (validation, where lm-eval would take a test split). Any other name is lm-eval's, and its data
come from a hub.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .assets import fetch

Progress = Callable[[str, int, int], None]
CONFIGS = Path(__file__).parent / "task_configs"
ITEMS = "items"


class TaskError(ValueError):
    """A task that is not known, cannot be run, or has no single figure of the kind that is recorded."""


@dataclass(frozen=True)
class TaskRequest:
    """A task and how many of its items: the first ``limit``, or None for all."""

    name: str
    limit: int | None = None

    @classmethod
    def parse(cls, text: str) -> TaskRequest:
        """``NAME`` or ``NAME:LIMIT``.

        Raises:
            TaskError: no name, a limit that is no positive number, or an ``_offline`` task that is not there.
        """
        name, _, limit = text.strip().partition(":")
        if not name or (limit and (not limit.isdigit() or int(limit) < 1)) or text.rstrip().endswith(":"):
            raise TaskError(f"expected a task as NAME or NAME:LIMIT, got {text!r}")
        if name.endswith("_offline") and name not in offline_tasks():
            raise TaskError(f"unknown task {name!r}; offline there are {', '.join(offline_tasks())}")
        return cls(name, int(limit) if limit else None)

    def __str__(self) -> str:
        return self.name if self.limit is None else f"{self.name}:{self.limit}"


@dataclass(frozen=True)
class TaskScore:
    """Of one task.

    Attributes:
        metric: ``acc``, or ``acc_norm`` (log-likelihood by the character of an answer) where the task has it.
        value, stderr: lm-eval's own.
        items: how many were asked; items_sha256: of their prompts and answers, so that only equal items are compared.
        version: the task's own.
    """

    metric: str
    value: float
    stderr: float | None
    items: int
    items_sha256: str
    version: str


@dataclass(frozen=True)
class Item:
    """One item: its number in the set, the hash of its prompt and target, and what each metric says of it."""

    id: int
    sha256: str
    scores: dict[str, float]


def offline_tasks() -> list[str]:
    """The names of the tasks that ship."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def offline_config(name: str, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """lm-eval's configuration of a shipped task, its files those of the asset's folder."""
    folder = fetch("tasks", cache_dir)
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    files = config["dataset_kwargs"]["data_files"]
    for split, pattern in files.items():
        found = [str(path) for path in sorted(folder.glob(pattern))]
        if not found:
            raise TaskError(f"{name}: expected {pattern} in {folder}, found nothing")
        files[split] = found
    if "process_docs" in config:
        config["process_docs"] = _PROCESS[config["process_docs"]]
    return config


def run_tasks(
    model: Any,
    tokenizer: Any,
    requests: Sequence[TaskRequest],
    *,
    batch: int = 1,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, TaskScore], dict[str, list[Item]]]:
    """Scores and items by the request's text (``NAME:LIMIT``).

    Args:
        model: a causal LM of transformers' kind: ours, or anybody's that ``from_pretrained`` gave.
        tokenizer: is left as it was.
        batch: requests of a forward pass.

    Raises:
        ImportError: lm-eval is not installed.
        TaskError: a name that lm-eval does not know, a group of tasks, data that cannot be loaded, or an empty prompt
            where the tokenizer has neither BOS nor EOS to stand before its answers.
        AssetError: the asset ``tasks`` cannot be fetched.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('tasks need lm-eval: pip install "brise[tasks]"') from error
    bare = tokenizer.bos_token_id is None and tokenizer.eos_token_id is None
    with _without_entry(model.config):
        lm = HFLM(
            pretrained=model,
            # it gives a tokenizer without padding a token for it
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch,
            max_length=getattr(model.config, "max_position_embeddings", None),
            # what stands in an empty prompt; it has to be a token even where no prompt is empty: _no_empty_prompt
            prefix_token_id=0 if bare else None,
        )
    # its index of built-in tasks takes half a minute, and those that ship need none of them
    manager = TaskManager(include_defaults=not all(r.name.endswith("_offline") for r in requests))
    scores: dict[str, TaskScore] = {}
    items: dict[str, list[Item]] = {}
    for number, request in enumerate(requests):
        if progress is not None:
            progress("tasks", number, len(requests))
        offline = request.name.endswith("_offline")
        task: Any = offline_config(request.name, cache_dir) if offline else request.name
        try:
            found = simple_evaluate(
                model=lm,
                tasks=[task],
                task_manager=manager,
                num_fewshot=0 if offline else None,
                limit=request.limit,
                log_samples=True,
                bootstrap_iters=1000,
            )
        except Exception as error:  # lm-eval and datasets raise many unrelated types: the task did not run
            raise TaskError(f"{request} could not be run: {type(error).__name__}: {error}") from error
        if found is None or list(found["samples"]) != [request.name]:
            raise TaskError(
                f"expected {request.name} to be one task, lm-eval made of it: {found and list(found['samples'])}"
            )
        if bare:
            _no_empty_prompt(request, found["samples"][request.name])
        scores[str(request)], items[str(request)] = _read(request.name, found)
    if progress is not None:
        progress("tasks", len(requests), len(requests))
    return scores, items


@contextmanager
def _without_entry(config: Any) -> Iterator[None]:
    """``config`` without the quantization entry of a model in memory: lm-eval has transformers read such a dict, though
    it is for loading alone, and transformers does not know our method unless its plug-in was imported."""
    entry = getattr(config, "quantization_config", None)
    if not isinstance(entry, dict):
        yield
        return
    del config.quantization_config
    try:
        yield
    finally:
        config.quantization_config = entry


def _no_empty_prompt(request: TaskRequest, samples: Sequence[dict[str, Any]]) -> None:
    for sample in samples:
        if any(not arguments[0] for arguments in sample["arguments"]):
            raise TaskError(
                f"{request}: the prompt of item {sample['doc_id']} is empty, and the tokenizer has neither BOS nor EOS "
                "to score its answers behind: leave the task out, or take a tokenizer with one"
            )


def _read(name: str, found: dict[str, Any]) -> tuple[TaskScore, list[Item]]:
    result = found["results"][name]
    metric = next((m for m in ("acc_norm", "acc", "exact_match") if f"{m},none" in result), None)
    if metric is None:
        known = ", ".join(key for key in result if key.endswith(",none"))
        raise TaskError(f"{name} has no accuracy to record, only {known}")
    items = []
    for sample in found["samples"][name]:
        text = json.dumps([sample["arguments"], sample["target"]], sort_keys=True, default=str)
        values = {m: float(sample[m]) for m in ("acc", "acc_norm", "exact_match") if m in sample}
        items.append(Item(int(sample["doc_id"]), hashlib.sha256(text.encode()).hexdigest(), values))
    items.sort(key=lambda item: item.id)
    stderr = result.get(f"{metric}_stderr,none")
    digest = hashlib.sha256("".join(item.sha256 for item in items).encode()).hexdigest()
    version = str(found["versions"].get(name))
    error = float(stderr) if isinstance(stderr, int | float) else None
    return TaskScore(metric, float(result[f"{metric},none"]), error, len(items), digest, version), items


def write_items(folder: Path, key: str, items: dict[str, list[Item]]) -> None:
    """Keep every item of a row: ``folder/items/KEY/TASK.jsonl``, a line an item."""
    for task, found in items.items():
        path = folder / ITEMS / key[:16] / f"{task.replace(':', '-')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"id": i.id, "sha256": i.sha256, **i.scores}) for i in found]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in lines))
        temporary.replace(path)


def items_of(folder: Path, key: str) -> dict[str, bytes]:
    """The files of a row's items by name, to be sent to where rows are gathered; empty where it has none."""
    return {path.name: path.read_bytes() for path in sorted((folder / ITEMS / key[:16]).glob("*.jsonl"))}


def put_items(folder: Path, key: str, files: Mapping[str, bytes]) -> None:
    """Write what :func:`items_of` gave, unless it is there."""
    for name, data in files.items():
        path = folder / ITEMS / key[:16] / name
        if path.is_file() and path.read_bytes() == data:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(data)
        temporary.replace(path)


def read_items(folder: Path, key: str, task: str, metric: str) -> dict[str, bool]:
    """Whether each item of a row was answered rightly, by the item's hash and number.

    Raises:
        TaskError: they were not kept there.
    """
    path = folder / ITEMS / key[:16] / f"{task.replace(':', '-')}.jsonl"
    if not path.is_file():
        raise TaskError(f"{path} is not there: the items of {task} were kept where the row was measured")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {f"{row['id']}:{row['sha256']}": row[metric] > 0.5 for row in rows}


def _hellaswag(rows: Any) -> Any:
    import re

    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return {"query": clean(query), "endings_clean": [clean(ending) for ending in row["endings"]]}

    return rows.map(prepare)


_PROCESS: dict[str, Callable[[Any], Any]] = {"hellaswag": _hellaswag}
