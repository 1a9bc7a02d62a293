"""Write a checkpoint as a GGUF file of llama.cpp's ``llama`` architecture, tensor by tensor.

Norms are stored in F32; a weight that is not quantized in the type nearest to its own dtype; Q and K with the halves
of each head interleaved, as llama.cpp wants them (:func:`brise.model.gguf.interleaved`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...quant.apply import quantize_weight
from ...quant.interop.ggml import BLOCKS, BlockWeight
from ...quant.interop.restate import Unfit, restate
from ..atomic import AtomicFolder, write_file
from ..gguf import BLOCK_NAMES, interleaved
from ..reader import CheckpointReader
from ..safetensors_header import CheckpointError
from ..skeleton import UNFIT
from .gguf_vocabulary import add_vocabulary
from .plan import Plan, Step, Verdict
from .reader import quantized

_PLAIN = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
# llama.h, enum llama_ftype
_FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7}


@dataclass(frozen=True)
class _Planned:
    """A tensor of the file: its name there, shape, type, and what gives its bytes, uint8 rows."""

    name: str
    shape: tuple[int, ...]
    kind: str
    data: Callable[[], Tensor]


def write_gguf(
    reader: CheckpointReader,
    plan: Plan,
    out: Path,
    kind: str,
    dtype: str,
    *,
    overwrite: bool,
    files: dict[str, str],
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Write the folder ``out`` with ``NAME-KIND.gguf``, config.json, the licence and ``files``.

    Args:
        kind: Q4_0, Q4_1, Q8_0 or F16.
        dtype: of the model, by torch's name.

    Raises:
        CheckpointError: the model is no llama-type one, or ``out`` may not be replaced.
        ImportError: the ``gguf`` package is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError('writing a GGUF file needs the gguf package: pip install "brise[demo]"') from error
    tensors = list(_planned(reader, plan, kind, dtype))
    folder = AtomicFolder(out, overwrite=overwrite)
    try:
        path = folder.path / f"{out.name}-{kind}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        _add_config(writer, reader.config, kind)
        try:
            add_vocabulary(writer, reader, int(reader.config["vocab_size"]))
        except CheckpointError:
            raise
        except UNFIT as error:
            raise CheckpointError(
                f"{reader.folder}: its tokenizer's files make no tokenizer: {type(error).__name__}: {error}"
            ) from error
        for tensor in tensors:
            stored = gguf.GGMLQuantizationType[tensor.kind]
            block, size = gguf.GGML_QUANT_SIZES[stored]
            shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
            nbytes = torch.Size(shape).numel()
            writer.add_tensor_info(tensor.name, shape, _uint8(), nbytes, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors, 1):
            writer.write_tensor_data(tensor.data().contiguous().numpy())
            if progress is not None:
                progress(tensor.name, done, len(tensors))
        writer.close()
        _sync(path)
        config = {k: v for k, v in reader.config.items() if k != "quantization_config"}
        for name, text in {"config.json": json.dumps(config, indent=2) + "\n", **files}.items():
            write_file(folder.path / name, text.encode())
        for licence in sorted(reader.folder.glob("LICENSE*")) if reader.folder.is_dir() else []:
            write_file(folder.path / licence.name, licence.read_bytes())
        folder.commit()
    except BaseException:
        folder.discard()
        raise


def _planned(reader: CheckpointReader, plan: Plan, kind: str, dtype: str) -> Iterator[_Planned]:
    config = reader.config
    if config.get("model_type") not in ("mistral", "llama"):
        raise CheckpointError(
            f"model_type is {config.get('model_type')!r}: GGUF is written of mistral and llama"
        )
    steps = {step.path: step for step in plan.steps}
    names = plan_names(config)
    present = {n for n in reader.names if n.rpartition(".")[0] not in steps or n.endswith(".bias")}
    if extra := sorted((present | {f"{p}.weight" for p in steps}) - set(names)):
        raise CheckpointError(
            f"{len(extra)} tensors have no place in GGUF's llama, among them {', '.join(extra[:4])}"
        )
    for name, (there, heads) in names.items():
        path = name.removesuffix(".weight")
        step = steps.get(path)
        if step is not None and step.target is not None:
            yield _Planned(there, step.shape, kind, _blocks(reader, step, BLOCKS[kind], heads))
            continue
        if step is None and name not in present:
            raise CheckpointError(f"{reader.folder}: the tensor {name} is missing")
        shape = reader.info(name)[1] if step is None else step.shape
        stored = getattr(torch, dtype) if step is not None else reader.info(name)[0]
        if len(shape) == 1:
            stored = torch.float32
        elif kind == "F16":
            stored = torch.float16
        yield _Planned(there, shape, _PLAIN[stored], _plain(reader, name, step, stored, heads))


def plan_names(config: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Hugging Face name -> (name in GGUF, heads whose rows are interleaved, or 0) of every tensor of a model."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config.get("num_key_value_heads")}
    out = {"model.embed_tokens.weight": ("token_embd.weight", 0)}
    for layer in range(config["num_hidden_layers"]):
        for short, name in BLOCK_NAMES.items():
            there = f"blk.{layer}.{short}.weight"
            out[f"model.layers.{layer}.{name}.weight"] = (there, heads.get(short) or 0)
    out["model.norm.weight"] = ("output_norm.weight", 0)
    if not config.get("tie_word_embeddings"):
        out["lm_head.weight"] = ("output.weight", 0)
    return out


def _blocks(reader: CheckpointReader, step: Step, block: BlockWeight, heads: int) -> Callable[[], Tensor]:
    def data() -> Tensor:
        assert step.target is not None
        if step.verdict in (Verdict.EXACT, Verdict.ROUNDED):
            assert step.spec is not None
            q = restate(quantized(reader, step.path, step.spec), step.target)
        else:
            weight = _decoded(reader, step)
            try:
                q = quantize_weight(step.path, weight, block.target(step.target, step.shape))
            except Unfit as error:
                raise CheckpointError(f"{step.path}: {error}, even when it is quantized anew") from error
        rows = block.write(q)
        return interleaved(rows, heads) if heads else rows

    return data


def _plain(
    reader: CheckpointReader, name: str, step: Step | None, dtype: torch.dtype, heads: int
) -> Callable[[], Tensor]:
    def data() -> Tensor:
        weight = reader.tensor(name) if step is None else _decoded(reader, step)
        weight = weight.to(dtype)
        if not bool(weight.isfinite().all()):
            raise CheckpointError(f"{name} has values that do not fit {dtype}")
        weight = interleaved(weight, heads) if heads else weight
        return weight.reshape(-1).contiguous().view(torch.uint8).view(*weight.shape[:-1], -1)

    return data


def _decoded(reader: CheckpointReader, step: Step) -> Tensor:
    if step.spec is None:
        return reader.tensor(f"{step.path}.weight")
    return quantized(reader, step.path, step.spec).dequantize(torch.float32)


def _add_config(writer: Any, config: dict[str, Any], kind: str) -> None:
    """The ``llama.`` section.

    Raises:
        CheckpointError: a rotary embedding or an activation that the section is not written with here.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act is {config['hidden_act']!r}: GGUF's llama always means silu")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise CheckpointError(f"rope_type {rope.get('rope_type')!r}: only the default one is written to GGUF")
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_type("model")
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(2)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("sliding_window") is not None:
        writer.add_sliding_window(config["sliding_window"])


def _uint8() -> Any:
    import numpy as np

    return np.dtype(np.uint8)


def _sync(path: Path) -> None:
    import os

    with path.open("rb") as file:
        os.fsync(file.fileno())
