"""Load and save a model, quantized or not, as a Hugging Face folder of safetensors: strictly and atomically.

The classes are chosen by name from our own; ``auto_map`` and any code in a folder are never looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from ..quant.apply import Report, find_targets, tie_quantized
from ..quant.config import QuantConfig
from ..quant.linear import QuantEmbedding, QuantLinear
from .foreign.reader import open_checkpoint
from .gguf import open_gguf
from .gguf_tokenizer import read_tokenizer
from .quantization_entry import entry_of, quantization_entry, read_entry
from .reader import CheckpointReader, read_json, resolve_source
from .rope import MistralRotaryEmbedding
from .safetensors_header import CheckpointError
from .skeleton import (
    UNFIT,
    check_depth,
    check_tensors,
    check_tied_copies,
    empty_model,
    some,
    stored_dtype,
    swap_modules,
)
from .writer import CheckpointWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "CheckpointWriter",
    "check_tensors",
    "empty_model",
    "load_model",
    "load_tokenizer",
    "quantization_entry",
    "resolve_source",
    "save_model",
]

REPORT = "quantization_report.json"
GENERATION = "generation_config.json"


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load the model of a folder (or hub name), quantized or not, ready to be evaluated.

    Tensors go straight from the mapped files to where they are used: on the CPU and without a change of dtype
    the maps themselves are the weights, and pages are read as they are touched. The logits are to the bit
    those of the model that was saved.

    Args:
        dtype: of everything that is not quantized, and of what the quantized embedding gives. None keeps what
            is stored, and then every such tensor must have the dtype that config.json names.
        attn_implementation: as in transformers (``eager``, ``sdpa``, ...); None lets transformers choose.

    Raises:
        CheckpointError: the folder cannot be read (:class:`.CheckpointReader`), is no Mistral, was quantized
            by another library, or its config and its tensors disagree.
    """
    reader = open_checkpoint(resolve_source(folder))
    where = str(reader.folder / "config.json")
    target = dtype or stored_dtype(reader)
    entry = reader.config.get("quantization_config")
    specs = {} if entry is None else read_entry(entry, where)[1]
    check_depth(reader)
    model = empty_model(reader.config, where, dtype=target, attn_implementation=attn_implementation)
    ties = {t.path: t.tied_to for t in find_targets(model) if t.tied_to is not None}
    swap_modules(model, specs, ties, target, where)
    check_tied_copies(reader, model, ties)
    check_tensors(reader, model, target if dtype is None else None, skip=ties)
    for name, tensor in reader.tensors():
        path, _, leaf = name.rpartition(".")
        if path not in ties:
            _assign(model.get_submodule(path), leaf, tensor, target, device)
    for path, owner in ties.items():
        head, source = model.get_submodule(path), model.get_submodule(owner)
        if isinstance(head, QuantLinear) and isinstance(source, QuantEmbedding):
            tie_quantized(head, source)
        else:
            head.weight = source.weight
    _fill_buffers(model, device)
    if (reader.folder / GENERATION).exists() and model.can_generate():
        model.generation_config = _generation_config(reader.folder)
    model.config._name_or_path = str(folder)
    return model.eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder (or hub name); code that comes with one is never run.

    Raises:
        CheckpointError: there is none, or it needs such code.
    """
    source = resolve_source(folder)
    if source.suffix == ".gguf" and source.is_file():
        return read_tokenizer(open_gguf(source))
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(f"{source} has no tokenizer that can be loaded: {error}") from error


def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    config: QuantConfig | None = None,
    report: Report | None = None,
    copy_from: str | Path | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a model in memory, quantized (``brise.quant.apply.quantize_model``) or not, to a folder.

    Args:
        config: the rules that it was quantized by, to be recorded; by default those it was loaded with, or
            else rules that name its modules one by one.
        report: written along as ``quantization_report.json``.
        copy_from: a folder whose tokenizer, chat template and licence go along.
        overwrite, max_shard_bytes: see :class:`.CheckpointWriter`.

    Raises:
        CheckpointError: the folder exists and may not be replaced, or a tensor has no data.
    """
    contents = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        contents.pop(key, None)
    known: Any = getattr(model.config, "quantization_config", None)
    known = known.to_dict() if hasattr(known, "to_dict") else known
    if config is None and isinstance(known, Mapping) and "modules" in known:
        config = read_entry(known, "model.config")[0]
    entry = entry_of(model, config)
    if entry is not None:
        contents["quantization_config"] = entry
    shared = _shared_heads(model)
    contents["architectures"] = [type(model).__name__]
    contents["dtype"] = str(model.dtype).removeprefix("torch.")
    contents["tie_word_embeddings"] = bool(shared)
    extra = {} if report is None else {REPORT: json.dumps(report.to_dict(), indent=1) + "\n"}
    if model.can_generate() and model.generation_config is not None:
        extra[GENERATION] = model.generation_config.to_json_string()
    with CheckpointWriter(folder, overwrite=overwrite, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in model.state_dict().items():
            if name.rpartition(".")[0] not in shared:
                writer.add(name, tensor)
        return writer.finish(contents, copy_from, extra)


def _generation_config(folder: Path) -> GenerationConfig:
    contents = read_json(folder, GENERATION)
    try:
        return GenerationConfig.from_dict(contents)
    except UNFIT as error:
        raise CheckpointError(f"{folder / GENERATION} has values that make no sense: {error}") from error


def _assign(
    module: nn.Module, leaf: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | str
) -> None:
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor.to(device=device, dtype=dtype))
    else:
        module._buffers[leaf] = tensor.to(device)


def _fill_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Compute the buffers that no checkpoint holds, and see that nothing was left on the meta device."""
    for module in model.modules():
        if isinstance(module, MistralRotaryEmbedding):
            for name, buffer in MistralRotaryEmbedding(module.config).named_buffers():
                module._buffers[name] = buffer.to(device)
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise CheckpointError(f"{type(model).__name__} has tensors that no checkpoint fills: {some(left)}")


def _shared_heads(model: nn.Module) -> set[str]:
    """Modules whose weight, quantized or not, is that of another."""
    owners: dict[tuple[str, int], str] = {}
    shared = set()
    for path, module in model.named_modules():
        leaf = "qweight" if isinstance(module, QuantLinear | QuantEmbedding) else "weight"
        if isinstance(module, QuantLinear | QuantEmbedding | nn.Linear | nn.Embedding):
            weight = getattr(module, leaf)
            # a weight that lies packed in the place of its stored form is no other's
            if weight is not None and owners.setdefault((leaf, weight.data_ptr()), path) != path:
                shared.add(path)
    return shared
