"""The model that a config.json describes, without data, and whether a folder's tensors are its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import MistralConfig, PreTrainedModel

from ..quant.apply import find_targets, swap
from ..quant.config import ConfigError, QuantSpec
from . import mistral
from .reader import CheckpointReader
from .safetensors_header import CheckpointError
from .source import Source

CLASSES: dict[str, type[PreTrainedModel]] = {
    name: getattr(mistral, name)
    for name in (
        "MistralForCausalLM",
        "MistralForQuestionAnswering",
        "MistralForSequenceClassification",
        "MistralForTokenClassification",
        "MistralModel",
    )
}
# what the values of a hostile config.json make transformers raise
UNFIT = (
    StrictDataclassError,
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    ArithmeticError,
)
# transformers makes a name for each of them
_MOST_LABELS = 1 << 20
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def empty_model(
    config: Mapping[str, Any],
    where: str = "config.json",
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The model that a config.json describes, tied where it says so, on the meta device: shapes without data.

    Args:
        config: contents of the file.
        where: its path, for messages.

    Raises:
        CheckpointError: not a Mistral, an unknown class, or values that make no model.
    """
    if config.get("model_type") != "mistral":
        raise CheckpointError(
            f"{where}: expected model_type 'mistral', got {config.get('model_type')!r}; other models load "
            "through transformers, after `import brise.model.hf`"
        )
    check_labels(config, where)
    names = config.get("architectures") or ["MistralForCausalLM"]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in CLASSES:
        raise CheckpointError(
            f"{where}: expected one of {', '.join(CLASSES)} in architectures, got {names!r}"
        )
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        parsed = MistralConfig.from_dict({**config})
        with torch.device("meta"):
            model = CLASSES[names[0]]._from_config(parsed, dtype=dtype or parsed.dtype, **options)
    except (
        *UNFIT,
        RuntimeError,
    ) as error:  # torch has a RuntimeError for sizes that overflow or are negative
        raise CheckpointError(f"{where} describes no model that can be built: {error}") from error
    model.tie_weights()
    return model


def check_labels(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for more labels than any model has: transformers would make a name for each."""
    count = config.get("num_labels")
    if isinstance(count, int) and count > _MOST_LABELS:
        raise CheckpointError(f"{where}: num_labels is {count}, expected at most {_MOST_LABELS}")


def check_tensors(
    reader: Source,
    model: nn.Module,
    dtype: torch.dtype | None,
    skip: Mapping[str, str] | None = None,
) -> None:
    """Hold the tensors of a folder against a model on the meta device: names, shapes, dtypes.

    Args:
        dtype: what every tensor that is not quantized must have; None allows any floating one, to be cast.
        skip: modules whose tensors are those of another (tied).

    Raises:
        CheckpointError: naming the tensors, what was expected, and what is there.
    """
    tied = tuple(f"{path}." for path in skip or {})
    wanted = {n: t for n, t in model.state_dict(keep_vars=True).items() if not (tied and n.startswith(tied))}
    names = [name for name in reader.names if not (tied and name.startswith(tied))]
    if missing := sorted(set(wanted) - set(names)):
        raise CheckpointError(
            f"{reader.folder}: {len(missing)} tensors that config.json asks for are missing: {some(missing)}"
        )
    if extra := sorted(set(names) - set(wanted)):
        raise CheckpointError(
            f"{reader.folder}: {len(extra)} tensors have no place in the model of config.json: {some(extra)}"
        )
    for name in names:
        got_dtype, got_shape = reader.info(name)
        shape = tuple(wanted[name].shape)
        file = reader.folder / reader.shard(name)
        if got_shape != shape:
            raise CheckpointError(
                f"{file}: {name} has the shape {list(got_shape)}, but config.json asks for {list(shape)}"
            )
        if not isinstance(wanted[name], nn.Parameter):  # a quantized module's: the layout fixes it
            if got_dtype != wanted[name].dtype:
                raise CheckpointError(
                    f"{file}: {name} is {got_dtype}, but its spec asks for {wanted[name].dtype}"
                )
        elif got_dtype not in _FLOATS:
            raise CheckpointError(f"{file}: {name} is {got_dtype}, expected a floating-point weight")
        elif dtype is not None and got_dtype != dtype:
            raise CheckpointError(
                f"{file}: {name} is {got_dtype}, expected {dtype} like config.json's dtype; name a "
                "dtype when loading to cast all of them"
            )


def stored_dtype(reader: CheckpointReader) -> torch.dtype:
    """What config.json names, or else the dtype of the first weight that is not quantized."""
    name = reader.config.get("dtype", reader.config.get("torch_dtype"))
    if name is not None:
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        if dtype not in _FLOATS:
            raise CheckpointError(
                f"{reader.folder / 'config.json'}: dtype is {name!r}, expected float32, "
                "bfloat16, float16 or float64"
            )
        return dtype
    for tensor in reader.names:
        if tensor.endswith((".weight", ".bias")) and reader.info(tensor)[0] in _FLOATS:
            return reader.info(tensor)[0]
    raise CheckpointError(f"{reader.folder} has no floating-point tensor, and config.json names no dtype")


def check_depth(reader: Source) -> None:
    """Compare the number of blocks before a model is built: a config can ask for any number of them."""
    found = {m[1] for name in reader.names if (m := re.match(r"(?:model\.)?layers\.(\d+)\.", name))}
    wanted = reader.config.get("num_hidden_layers", MistralConfig().num_hidden_layers)
    if len(found) != wanted:
        raise CheckpointError(
            f"{reader.folder / 'config.json'}: num_hidden_layers is {str(wanted)[:40]}, but the tensors are "
            f"of {len(found)} blocks; the file belongs to another checkpoint, or shards are missing"
        )


def swap_modules(
    model: nn.Module,
    specs: Mapping[str, QuantSpec],
    ties: Mapping[str, str],
    dtype: torch.dtype,
    where: str,
) -> None:
    known = {target.path for target in find_targets(model)}
    for path in specs:
        if path not in known:
            raise CheckpointError(
                f"{where}: quantization_config names the module {path[:200]}, which is no Linear or "
                f"Embedding of {type(model).__name__}"
            )
    for path, owner in ties.items():
        if specs.get(path) != specs.get(owner):
            raise CheckpointError(
                f"{where}: {path} is tied to {owner} (tie_word_embeddings), but quantization_config gives "
                "them different specs"
            )
    try:
        swap(model, specs, dtype)
    except ConfigError as error:
        raise CheckpointError(f"{where}: quantization_config does not fit the model: {error}") from error


def check_tied_copies(reader: Source, model: nn.Module, ties: Mapping[str, str]) -> None:
    """A tied weight may be stored twice if both copies are equal; nothing else of one may be there."""
    for path, owner in ties.items():
        for name in [n for n in reader.names if n.startswith(f"{path}.")]:
            other = owner + name.removeprefix(path)
            same = (
                name == f"{path}.weight"
                and other in reader.names
                and reader.info(name) == reader.info(other)
                and _equal(reader, name, other)
            )
            if not same:
                raise CheckpointError(
                    f"{reader.folder}: config.json ties {path} to {owner} (tie_word_embeddings), but {name} "
                    f"is there and is not {other}; if the head is its own, set tie_word_embeddings to false"
                )


def _equal(source: Source, name: str, other: str) -> bool:
    count = source.info(name)[1][0]
    return all(
        torch.equal(source.rows(name, i, i + 4096), source.rows(other, i, i + 4096))
        for i in range(0, count - count % 4096, 4096)
    ) and torch.equal(*(source.rows(n, count - count % 4096, count) for n in (name, other)))


def some(names: list[str], limit: int = 6) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name[:120] for name in names[:limit]) + rest
