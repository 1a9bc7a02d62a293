"""Hessians of one pass over the unquantized model, kept on disk, and weights quantized from them without running it.

A full run gathers each Hessian from what the already quantized blocks give (:mod:`.calibrated`); here all of them come
from the unquantized model, once, and any number of formats, group sizes, dampings and orders is solved from the same
files. What is lost is that a layer no longer makes up for the errors of those before it: a config says
``hessians: once``, and its rows carry it.

``FOLDER/KEY/`` holds ``manifest.json`` (of what they were gathered) and a safetensors file a block: ``0`` .. ``3`` for
the stages of :data:`.walk.STAGES`, and ``head.safetensors`` with ``0``, the input of lm_head; all fp32 [K, K].
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..quant.apply import Target, find_targets, resolve
from ..quant.calibrate import HessianAccumulator
from ..quant.config import Calibration, QuantConfig, QuantSpec, Rule
from .calibrated import CalibratedSteps, check_calibration
from .device_copy import compute_device
from .group import current_group
from .job_plan import Step, plan_steps
from .plain import PlainSteps, Resolved, StepResult
from .safetensors_header import CheckpointError
from .sequential import _batches, _Stream
from .shards import ShardFiles
from .skeleton import empty_model
from .solve import Setting, quantize_under
from .source import Source, open_source, whole
from .trouble import Policy
from .walk import STAGES

Progress = Callable[[str, int, int], None]
MANIFEST = "manifest.json"
HEAD = "head"


@dataclass(frozen=True)
class HessianStore:
    """The Hessians of one model on one calibration set.

    Attributes:
        folder: where they are. tokens: rows that each was summed over.
        blocks: names of the files without their suffix, in the order of the model, ``head`` last.
    """

    folder: Path
    tokens: int
    blocks: tuple[str, ...]

    def load(self, block: str) -> dict[int, Tensor]:
        """Stage -> X^T X, fp32 [K, K]."""
        return {int(name): tensor for name, tensor in load_file(self.folder / f"{block}.safetensors").items()}

    def of_stage(self, block: str, stage: int, device: torch.device) -> HessianAccumulator:
        """One Hessian as the algorithms take it."""
        with safe_open(self.folder / f"{block}.safetensors", "pt") as file:
            return StoredHessian(file.get_tensor(str(stage)).to(device), self.tokens)


class StoredHessian(HessianAccumulator):
    """A Hessian that was gathered before."""

    def __init__(self, hessian: Tensor, tokens: int) -> None:
        super().__init__(1)
        self.tokens = tokens
        self._h = hessian


def store_key(source: Source, ids: Tensor) -> str:
    """Of the model and the calibration windows int64 [windows, length]."""
    data = ids.contiguous().numpy().astype("<i8").tobytes()
    what = [source.identity(), list(ids.shape), hashlib.sha256(data).hexdigest()]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def gather_hessians(
    src: str | Path | Source,
    ids: Tensor,
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> HessianStore:
    """The store in ``folder`` of a model and its calibration windows, gathered unless it is there.

    Args:
        src: the checkpoint, not quantized.
        ids: int64 [windows, length].
        folder: may hold many; each appears whole.
        device: where the model runs; what was gathered on another device is taken as well.
        progress: called with ("hessians", blocks done, blocks in all).

    Raises:
        CheckpointError: ``src`` cannot be read, or a store is damaged.
        ValueError: ids that are no tokens of the model.
    """
    from filelock import FileLock

    source = open_source(Path(src)) if isinstance(src, str | Path) else src
    target = Path(folder) / store_key(source, ids)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not (target / MANIFEST).is_file():
            _gather(source, ids, target, compute_device(device), progress or (lambda *_: None))
    return open_store(target)


def open_store(folder: Path) -> HessianStore:
    """Raises CheckpointError where a file is missing."""
    manifest = json.loads((folder / MANIFEST).read_text())
    missing = [name for name in manifest["blocks"] if not (folder / f"{name}.safetensors").is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing[0]}.safetensors: delete the folder to gather it again"
        )
    return HessianStore(folder, manifest["tokens"], tuple(manifest["blocks"]))


@torch.no_grad()
def _gather(source: Source, ids: Tensor, target: Path, device: torch.device, progress: Progress) -> None:
    model = empty_model(source.config, str(source.folder / "config.json"), attn_implementation="sdpa")
    targets = {t.path: t for t in find_targets(model)}
    # any spec that asks for a Hessian: what the walk runs and frees depends on nothing else in it
    probe = QuantConfig((Rule(("*layers.*",), QuantSpec(format="int8", algorithm="gptq")),))
    resolved = resolve(probe, targets.values())
    steps = plan_steps(source, model, targets)
    needy = [path for path, (spec, _) in resolved.items() if spec is not None]
    check_calibration(ids, needy, steps, source.config["vocab_size"])
    # what is wrong with a Hessian is for the job that solves with it to decide
    policy = Policy(nonfinite="keep")
    walk = CalibratedSteps(
        source, model, targets, resolved, policy, device, current_group(), Calibration(), ids, "memory"
    )
    hidden = walk._embedded(None).hidden
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    work.mkdir()
    blocks: list[str] = []
    try:
        inner = steps[1:-1]
        for number, step in enumerate(inner, 1):
            layer = walk._layer(step)
            stream = _Stream(layer, walk._walk(), hidden, torch.empty, frozen=True)  # type: ignore[arg-type]
            found: dict[str, Tensor] = {}
            for stage, names in enumerate(STAGES):
                weights = {name: walk._load(step, name) for name in names}
                stream.fill(stage, weights)
                found[str(stage)] = _sum(stream.inputs(stage), weights[names[0]].shape[1])
                stream.finish(stage)
            layer.to("meta")
            save_file(found, work / f"{step.name}.safetensors")
            blocks.append(step.name)
            progress("hessians", number, len(inner))
        if "lm_head" in targets:
            norm = model.get_submodule("model.norm")
            norm.load_state_dict({"weight": walk._weight("model.norm.weight")}, assign=True)
            inputs = (norm(hidden[i : i + 1].to(device)) for i in range(len(hidden)))
            save_file({"0": _sum(inputs, hidden.shape[-1])}, work / f"{HEAD}.safetensors")
            blocks.append(HEAD)
        source.check_unchanged()
        manifest = {"tokens": ids.numel(), "windows": list(ids.shape), "blocks": blocks}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sum(inputs: Any, width: int) -> Tensor:
    accumulator = None
    for x in inputs:
        accumulator = accumulator or HessianAccumulator(width, device=x.device)
        accumulator.add(x)
    assert accumulator is not None  # there is a window
    return accumulator.hessian.cpu()


class StoredSteps(PlainSteps):
    """Computes steps from kept Hessians: none needs the one before it, so processes share them out."""

    def __init__(
        self,
        source: Source,
        targets: Mapping[str, Target],
        resolved: Resolved,
        policy: Policy,
        device: torch.device,
        ids: Tensor,
        folder: Path | None,
    ) -> None:
        super().__init__(source, targets, resolved, policy, device)
        self.ids = ids
        self.folder = folder
        # no group: a step is one process's alone, and its sums are there already
        self.setting = Setting(resolved, policy, current_group())
        self.store: HessianStore | None = None

    def resume(self, folder: Path, shards: ShardFiles, done: list[Step]) -> None:
        """Open the Hessians; without a place of their own they are gathered in the job's folder, and go with it."""
        self.store = gather_hessians(
            self.source, self.ids, self.folder or folder / "hessians", device=self.device
        )

    def compute(self, step: Step, index: int) -> StepResult:
        assert self.store is not None
        prefix = "" if step.name == HEAD else f"{step.name}."
        result = StepResult()
        for stage, all_names in enumerate((("lm_head",),) if step.name == HEAD else STAGES):
            names = [
                n for n in all_names if f"{prefix}{n}" in step.targets and self._needs_hessian(f"{prefix}{n}")
            ]
            if not names:
                continue
            accumulator = self.store.of_stage(step.name, stage, self.device)
            for together in _batches(names, prefix.removesuffix("."), self.resolved) if prefix else [names]:
                paths = [f"{prefix}{name}" for name in together]
                weights = [
                    whole(self.source, f"{path}.weight").to(self.device).to(torch.float32) for path in paths
                ]
                solved = quantize_under(paths, weights, self.setting, accumulator)
                for path, done in zip(paths, solved, strict=True):
                    result.add(path, done, self.resolved[path][0])
        plain = tuple(path for path in step.targets if not self._needs_hessian(path))
        rest = super().compute(Step(step.name, plain, step.names), index)
        result.tensors |= rest.tensors
        result.outcomes += rest.outcomes
        result.changes += rest.changes
        return result

    def _needs_hessian(self, path: str) -> bool:
        spec = self.resolved[path][0]
        return spec is not None and spec.needs_hessian
