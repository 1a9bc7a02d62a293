"""Quantize a checkpoint step by step: read, quantize, write, free. The whole model is never in memory.

A step is the embedding, a block, or what comes after the blocks. Plain algorithms read each tensor once, in pieces,
and see no data; under calibration the hidden states of all windows travel along, and each block is run once
(:mod:`.sequential`). A step is written while the next one is computed, and put on record once it is on the disk
(:mod:`.job`), so that a job which dies goes on behind it, and ends with the same bytes.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.apply import Outcome, Report, Target, find_targets, resolve
from ..quant.config import ConfigError, QuantConfig, QuantSpec
from .calibrated import check_calibration
from .copied import copy_tensor
from .device_copy import compute_device
from .group import Group, current_group, raise_together, share
from .identity import goes_on, job_identity
from .job import JobFolder
from .job_plan import Step, plan_steps, plan_tensors, tensors_of
from .plain import StepResult
from .quantization_entry import quantization_entry
from .safetensors_header import CheckpointError
from .shards import ShardFiles
from .skeleton import check_depth, check_tensors, check_tied_copies, empty_model
from .source import Source, check_apart, open_source
from .trouble import Policy, TroubleError
from .worker import worker_of
from .writer import complete_folder

Progress = Callable[[str, int, int], None]
REPORT = "quantization_report.json"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the message says what is kept: ``kept`` steps."""

    def __init__(self, message: str, kept: int = 0) -> None:
        super().__init__(message)
        self.kept = kept


def quantize_checkpoint(
    src: Path,
    out: Path,
    config: QuantConfig,
    *,
    calibration: Tensor | None = None,
    overwrite: bool = False,
    resume: bool = False,
    memory: str = "memory",
    policy: Policy | None = None,
    max_shard_bytes: int = 5_000_000_000,
    hessians: Path | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Quantize the checkpoint in folder ``src`` into a new folder ``out``, which appears only when it is whole.

    Where torch's default process group is there (torchrun), all its processes call this, with one ``out`` that all of
    them can write to: blocks are shared out among them, or, under calibration, the windows.

    Args:
        config: the rules; every module they leave out is copied as it is.
        calibration: token ids int64 [windows, length], needed where ``config.needs_calibration``.
        overwrite: replace ``out`` if it is there, and begin anew where an unfinished job is.
        resume: go on with an unfinished job of the same arguments; the result is the same to the bit. What the policy
            let fail may be kept or rounded now.
        memory: where the activations of the calibration windows are kept: ``memory``, or ``file`` (beside ``out``).
        policy: what is done about weights and Hessians that cannot be quantized, and about what is copied.
        max_shard_bytes: a tensor that would make a shard larger than this begins the next one.
        hessians: a folder of Hessians that several configs with ``hessians: once`` share (see :mod:`.hessian_store`);
            without it such a config gathers its own.
        device: where weights are rounded, or blocks run and are solved. What is rounded plainly, with scales that are
            not searched, has the same bits on each.
        progress: called with (what, done, total) after every step.

    Returns:
        What became of every module; also written to ``out`` as ``quantization_report.json``.

    Raises:
        ConfigError: the rules do not fit the model, or calibration data is missing.
        CheckpointError: ``src`` cannot be read, is quantized already, or changes underneath; ``out`` is there and is to
            stay; another process writes it; an unfinished job is in the way, or another one than this.
        DeviceError: torch does not see the device.
        TroubleError: a weight or a Hessian cannot be quantized or copied, and the policy is to fail.
        ValueError: token ids outside the vocabulary.
        OSError: the disk is full. What was finished is kept, and can be resumed.
    """
    where = compute_device(device)
    check_apart(src, out)
    job = _Job(
        open_source(src),
        src,
        config,
        calibration,
        memory,
        policy or Policy(),
        max_shard_bytes,
        where,
        hessians,
    )
    return job.run(out, overwrite, resume, progress or (lambda *_: None))


class _Job:
    """One run of :func:`quantize_checkpoint`: where tensors come from and go to, and what was done so far."""

    def __init__(
        self,
        source: Source,
        src: Path,
        config: QuantConfig,
        calibration: Tensor | None,
        memory: str,
        policy: Policy,
        max_shard_bytes: int,
        device: torch.device,
        hessians: Path | None,
    ) -> None:
        self.source = source
        self.config = config
        self.policy = policy
        self.max_shard_bytes = max_shard_bytes
        self.group: Group = current_group()
        if "quantization_config" in source.config:
            raise ConfigError(f"{src} is quantized already: quantize the checkpoint that it was made from")
        check_depth(source)
        model = empty_model(source.config, str(source.folder / "config.json"), attn_implementation="sdpa")
        self.targets: dict[str, Target] = {target.path: target for target in find_targets(model)}
        ties = {t.path: t.tied_to for t in self.targets.values() if t.tied_to is not None}
        check_tied_copies(source, model, ties)
        check_tensors(source, model, None, ties)
        self.resolved: dict[str, tuple[QuantSpec | None, str]] = resolve(config, self.targets.values())
        self.steps: list[Step] = plan_steps(source, model, self.targets)
        self.outcomes: dict[str, Outcome] = {}
        # of what is copied: name -> what is wrong with it
        self.copied: dict[str, str] = {}
        needy = [p for p, (spec, _) in self.resolved.items() if spec is not None and spec.needs_hessian]
        ids = (
            check_calibration(calibration, needy, self.steps, source.config["vocab_size"]) if needy else None
        )
        self.worker = worker_of(
            source,
            model,
            self.targets,
            self.resolved,
            policy,
            device,
            self.group,
            config,
            ids,
            memory,
            hessians,
        )
        self.identity = job_identity(source, config, policy, max_shard_bytes, ids, self.group.world, device)

    @property
    def specs(self) -> dict[str, QuantSpec | None]:
        return {path: spec for path, (spec, _) in self.resolved.items()}

    @property
    def entry(self) -> dict[str, Any]:
        return quantization_entry(self.config, self.resolved)

    def run(self, out: Path, overwrite: bool, resume: bool, progress: Progress) -> Report:
        self.progress = progress
        self.job: JobFolder | None = None
        error: Exception | None = None
        if self.group.rank == 0:
            try:
                self.job = JobFolder(out, self.identity, overwrite=overwrite, resume=resume, goes_on=goes_on)
            except Exception as failed:
                error = failed
        raise_together(self.group, error)
        try:
            with torch.no_grad():
                self._steps(out)
                return self._finish()
        except BaseException as failed:
            self._leave(failed)
            raise
        finally:
            if self.job is not None:
                self.job.close()

    def _steps(self, out: Path) -> None:
        first = self.group.gather(None if self.job is None else (self.job.folder, self.job.records))[0]
        assert first is not None
        folder, records = first
        done = [record for line in records for record in line["steps"]]
        for record in done:
            self._take(record)
        for line in records:
            self.copied |= line["copied"]
        generation = records[-1]["generation"] if records else 0
        planned = plan_tensors(self.steps, self.source, self.targets, self.specs, self.entry)
        begins = self.group.rank == 0 and not records
        error = None
        try:
            self.shards = ShardFiles(folder, planned, self.max_shard_bytes, generation, create=begins)
            if self.job is not None:
                self.shards.reclaim()
                self.job.start()
        except OSError as failed:
            error = failed
        raise_together(self.group, error)
        self.shards.open()
        finished = sorted(record["step"] for record in done)
        self.worker.resume(folder.parent, self.shards, [self.steps[i] for i in finished])
        left = [i for i in range(len(self.steps)) if i not in finished]
        size = self.group.world if self.worker.shared_out else 1
        self._old: list[Path] = []
        self._line: dict[str, Any] | None = None
        with ThreadPoolExecutor(1) as writer:
            pending: Future[dict[str, str]] | None = None
            for start in range(0, len(left), size):
                mine = (
                    [left[start + i] for i in share(min(size, len(left) - start), self.group)]
                    if size > 1
                    else []
                )
                index = (mine[0] if mine else None) if size > 1 else left[start]
                pending = self._round(index, size > 1, writer, pending)
            self._settle(pending, None)

    def _round(
        self,
        index: int | None,
        shared: bool,
        writer: ThreadPoolExecutor,
        pending: Future[dict[str, str]] | None,
    ) -> Future[dict[str, str]] | None:
        """Compute a step, then see that the one before is written and on record, then begin to write this one."""
        result, error = None, None
        try:
            result = None if index is None else self.worker.compute(self.steps[index], index)
        except Exception as failed:
            error = failed
        self._settle(pending, error)
        mine = None if result is None or index is None else result.record(index)
        gathered = [record for record in self.group.gather(mine) if record is not None]
        if not shared:
            if any(record != gathered[0] for record in gathered):
                raise RuntimeError("the processes of the job did not come to the same weights: report this")
            gathered = gathered[:1]
        for record in gathered:
            self._take(record)
        if any(record["changes"] for record in gathered):
            self._relay()
        line = {"generation": self.shards.generation, "steps": gathered, "copied": {}}
        alone = self.group.world == 1
        self._line = None if alone else line
        if result is None or index is None or not (shared or self.group.rank == 0):
            return None
        return writer.submit(self._write, self.steps[index], result, line if alone else None)

    def _settle(self, pending: Future[dict[str, str]] | None, error: Exception | None) -> None:
        """Wait for what is being written, at every process, and put it on record where the writer has not."""
        copied: dict[str, str] = {}
        try:
            if pending is not None:
                copied = pending.result()
        except Exception as failed:
            error = failed  # of the step before: what is wrong there may be what failed here
        raise_together(self.group, error)
        if self._line is not None:
            for found in self.group.gather(copied):
                self._line["copied"] |= found
            self._put_on_record(self._line)
            self._line = None

    def _put_on_record(self, line: dict[str, Any]) -> None:
        indices = [record["step"] for record in line["steps"]]
        for index in indices:
            self.worker.sync(index)
        self.group.gather(None)  # the windows of every process are behind the step
        if self.job is not None:
            self.job.append(line)
            self.shards.forget(self._old)
            self.progress(self.steps[indices[-1]].name, self.job.done, len(self.steps))
        self._old = []
        self.copied |= line["copied"]
        self.worker.on_record(indices[-1])

    def _take(self, record: dict[str, Any]) -> None:
        """Know what a step came to: its outcomes, and modules that became something else than the rules say."""
        for data in record["outcomes"]:
            outcome = Outcome.from_dict(data)
            self.outcomes[outcome.path] = outcome
        for path in record["changes"]:
            outcome = self.outcomes[path]
            for target in self.targets.values():
                if path in (target.path, target.tied_to):
                    self.resolved[target.path] = (outcome.spec, outcome.reason)

    def _relay(self) -> None:
        """Lay the shards out anew, after a module became something else than was planned."""
        planned = plan_tensors(self.steps, self.source, self.targets, self.specs, self.entry)
        generation = self.shards.generation + 1
        error = None
        if self.job is not None:
            done = [self.steps[record["step"]] for line in self.job.records for record in line["steps"]]
            names = [name for step in done for name in tensors_of(step, self.specs, self.targets)]
            try:
                self._old = self.shards.relay(planned, generation, names)
            except OSError as failed:
                error = failed
        raise_together(self.group, error)
        if self.job is None:
            self.shards.set_plan(planned, generation)
            self.shards.open()

    def _write(self, step: Step, result: StepResult, line: dict[str, Any] | None) -> dict[str, str]:
        """Write a step, wait for the disk, and put it on record where this process is alone.

        Returns:
            Of the copied tensors: name -> what is wrong with it.
        """
        for name, tensor in result.tensors.items():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            self.shards.write(name, data)
        result.tensors.clear()
        copied: dict[str, str] = {}
        for name in step.copied(self.specs):
            if words := copy_tensor(self.source, self.shards, name, self.policy):
                copied[name] = words
        self.shards.sync(tensors_of(step, self.specs, self.targets))
        self.source.check_unchanged()
        if line is not None:
            line["copied"] |= copied
            self._put_on_record(line)
        return copied

    def _finish(self) -> Report:
        copied = {name.removesuffix(".weight"): words for name, words in self.copied.items()}
        report = Report(
            [self._outcome(t) for t in self.targets.values()],
            {path: words for path, words in copied.items() if path not in self.targets},
        )
        error = None
        if self.job is not None:
            try:
                self._complete(self.job, report)
            except Exception as failed:
                error = failed
        raise_together(self.group, error)
        return report

    def _complete(self, job: JobFolder, report: Report) -> None:
        self.shards.close()
        files = [(self.shards.path(i).name, list(shard.begins)) for i, shard in enumerate(self.shards.shards)]
        complete_folder(
            job.folder,
            files,
            self.shards.nbytes,
            {**self.source.config, "quantization_config": self.entry},
            self.source.folder,
            {REPORT: json.dumps(report.to_dict(), indent=1) + "\n"},
        )
        job.commit()

    def _leave(self, error: BaseException) -> None:
        """An end before the end: what is on record stays, a job without a finished step goes."""
        if hasattr(self, "shards"):
            self.shards.close()
        done = 0 if self.job is None else self.job.done
        if self.job is not None and not done:
            self.job.discard()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and self.job is not None:
            error.filename = error.filename or str(self.job.folder)
        if isinstance(error, KeyboardInterrupt):
            kept = (
                f"{done} of {len(self.steps)} steps are kept: resume to go on" if done else "nothing is kept"
            )
            raise Interrupted(f"interrupted; {kept}", done) from None
        if isinstance(error, OSError | CheckpointError | TroubleError) and done:
            error.add_note(f"{done} of {len(self.steps)} steps are kept: resume to go on")

    def _outcome(self, target: Target) -> Outcome:
        spec, reason = self.resolved[target.path]
        if target.path in self.outcomes:
            return self.outcomes[target.path]
        # tied: the owner's tensors serve, so no bytes of its own
        nbytes = 0 if spec is not None else None
        trouble = self.copied.get(f"{target.path}.weight")
        return Outcome(target.path, target.shape, spec, reason, nbytes, trouble=trouble)
