"""Write a checkpoint in another library's format: one weight at a time, whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...quant.apply import quantize_weight
from ...quant.interop.restate import Unfit, restate
from ...quant.tensor import QuantizedTensor
from ..reader import CheckpointReader
from ..safetensors_header import CheckpointError
from ..skeleton import stored_dtype
from ..writer import CheckpointWriter
from .card import model_card
from .entries import Written
from .formats import FORMATS, ForeignFormat, WeightWriter
from .plan import Plan, Step, Verdict, make_plan
from .reader import open_checkpoint, quantized

Progress = Callable[[str, int, int], None]
# files of a folder that say how another copy of it was quantized
CARD = "README.md"


def plan_export(source: Path, format: str) -> Plan:
    """What :func:`export_checkpoint` will do to each weight; reads scales and zero points, writes nothing.

    Raises:
        CheckpointError: the source cannot be read, or there is no such format.
    """
    reader = open_checkpoint(source)
    return make_plan(reader, lookup(format), dtype_name(reader))


def export_checkpoint(
    source: Path,
    out: Path,
    format: str,
    *,
    requantize: bool = False,
    overwrite: bool = False,
    base_model: str | None = None,
    figures: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Write the checkpoint ``source``, ours or any that is read here, to the folder ``out``.

    Args:
        format: a name in :data:`.formats.FORMATS`.
        requantize: allow what cannot be kept to be decoded and rounded anew.
        base_model, figures: for the model card; see :func:`.card.model_card`.
        announce: called with the plan before the first byte is written.
        progress: called with (path, done, total) after every weight.

    Raises:
        CheckpointError: ``source`` cannot be read, ``out`` may not be replaced, or something would have to be
            quantized again and ``requantize`` is not set.
    """
    reader = open_checkpoint(source)
    row, dtype = lookup(format), dtype_name(reader)
    plan = make_plan(reader, row, dtype)
    if announce is not None:
        announce(plan)
    check_allowed(plan, requantize)
    card = model_card(reader, row, plan, out.name, base_model=base_model, figures=figures)
    if row.kind == "brise":
        _write_ours(reader, plan, out, overwrite, max_shard_bytes, card, progress)
        return plan
    if row.kind is not None:
        from .gguf_writer import write_gguf

        write_gguf(
            reader, plan, out, row.kind, dtype, overwrite=overwrite, files={CARD: card}, progress=progress
        )
        return plan
    writer: WeightWriter = row.weight(dtype)
    specs = {s.path: s.target for s in plan.steps if s.target is not None}
    if not specs:
        raise CheckpointError(f"{source} has no weight that {row.title} could hold")
    leaves = {name for step in plan.steps for name in _names(reader, step)}
    kept = [name for name in reader.names if name not in leaves]
    total = len(plan.steps) + 1
    with CheckpointWriter(out, overwrite=overwrite, max_shard_bytes=max_shard_bytes) as folder:
        for name in kept:
            folder.add(name, reader.tensor(name))
        for done, step in enumerate(plan.steps, 1):
            tensors, stored = _converted(reader, step, writer, dtype)
            if stored is not None:
                specs[step.path] = stored.spec
            for leaf, tensor in tensors.items():
                folder.add(f"{step.path}.{leaf}", tensor)
            if progress is not None:
                progress(step.path, done, total)
        entry = row.entry(Written(specs, linears_kept(reader, set(specs)), dtype))
        config = {k: v for k, v in reader.config.items() if k != "quantization_config"}
        extra = {CARD: card, **_tokenizer_files(reader)}
        if entry["quant_method"] == "gptq":  # what gptqmodel looks for first
            extra["quantize_config.json"] = json.dumps(entry, indent=2) + "\n"
        source_folder = reader.folder if reader.folder.is_dir() else None
        folder.finish({**config, "quantization_config": entry}, source_folder, extra)
    if progress is not None:
        progress("config", total, total)
    return plan


def _write_ours(
    reader: CheckpointReader,
    plan: Plan,
    out: Path,
    overwrite: bool,
    max_shard_bytes: int,
    card: str,
    progress: Progress | None,
) -> None:
    """A folder of ours: what a reader shows is what goes to disk."""
    if plan.of(Verdict.REQUANTIZED):
        raise CheckpointError(
            f"{reader.folder} has weights that are not quantized: brise quantize makes those"
        )
    with CheckpointWriter(out, overwrite=overwrite, max_shard_bytes=max_shard_bytes) as folder:
        for done, name in enumerate(reader.names, 1):
            folder.add(name, reader.tensor(name))
            if progress is not None:
                progress(name, done, len(reader.names))
        source_folder = reader.folder if reader.folder.is_dir() else None
        folder.finish(reader.config, source_folder, {CARD: card, **_tokenizer_files(reader)})


def check_allowed(plan: Plan, requantize: bool) -> None:
    """Raise CheckpointError where a plan re-quantizes and that was not asked for."""
    if plan.of(Verdict.REQUANTIZED) and not requantize:
        raise CheckpointError(f"{plan.describe()}; pass --requantize to round those weights anew")


def lookup(format: str) -> ForeignFormat:
    """The row of the table. Raises CheckpointError for a name that is not there."""
    if format not in FORMATS:
        raise CheckpointError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    return FORMATS[format]


def dtype_name(reader: CheckpointReader) -> str:
    """The model's dtype, by torch's name."""
    return str(stored_dtype(reader)).removeprefix("torch.")


def linears_kept(reader: CheckpointReader, specs: set[str]) -> tuple[str, ...]:
    """Paths of the Linears that stay as they are: two-dimensional weights that are no embedding, and the head."""
    found = {
        name.removesuffix(".weight")
        for name in reader.names
        if name.endswith(".weight") and len(reader.info(name)[1]) == 2 and "embed" not in name
    }
    return tuple(sorted((found | {"lm_head"}) - specs))


def _names(reader: CheckpointReader, step: Step) -> list[str]:
    if step.spec is None:
        return [f"{step.path}.weight"]
    return [n for n in reader.names if n.rpartition(".")[0] == step.path and not n.endswith(".bias")]


def _converted(
    reader: CheckpointReader, step: Step, writer: WeightWriter, dtype: str
) -> tuple[Mapping[str, Tensor], QuantizedTensor | None]:
    """Tensors by last name of one weight in the new format, and the weight as it is there."""
    if step.spec is None:
        weight = reader.tensor(f"{step.path}.weight")
    else:
        q = quantized(reader, step.path, step.spec)
        if step.verdict == Verdict.DECODED:
            return {"weight": q.dequantize(getattr(torch, dtype))}, None
        if step.verdict != Verdict.REQUANTIZED:
            assert step.target is not None
            stored = restate(q, step.target)
            return writer.write(stored), stored
        weight = q.dequantize(torch.float32)
    assert step.target is not None
    try:
        target = writer.target(step.target, step.shape)
        fresh = quantize_weight(step.path, weight, target)
        return writer.write(fresh), fresh
    except Unfit as error:
        raise CheckpointError(f"{step.path}: {error}, even when it is quantized anew") from error


def _tokenizer_files(reader: CheckpointReader) -> dict[str, str]:
    """Tokenizer and generation config of a GGUF file, by file name; a folder's own files are copied instead."""
    from .gguf_reader import GGUFCheckpoint, write_tokenizer

    if not isinstance(reader, GGUFCheckpoint):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(reader, Path(folder))
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
