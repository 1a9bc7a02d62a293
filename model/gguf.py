"""Read a llama-type GGUF file and write it as a Hugging Face folder of a Mistral checkpoint.

A Llama block is a Mistral block without a window, so the tensors need only new names, and Q and K their
rows back in order: GGUF pairs the two halves of a rotary dimension next to each other (llama.cpp,
``convert_hf_to_gguf.py``, ``LlamaModel.permute``) where Hugging Face keeps the halves apart.

Whatever the file says that this reader does not understand is an error: a key that is skipped here would
come out as a model that is quietly worse.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .gguf_header import check_header
from .gguf_tokenizer import save_tokenizer

Progress = Callable[[int, int], None]

# Keys of the `llama.` section that are read below; any other one is refused.
_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "expert_count",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFError(ValueError):
    """The file is no GGUF, or holds something that cannot be turned into a Mistral checkpoint."""


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor comes from: its name in the file, its shape ``(N, K)`` or ``(K,)``, and for Q and K
    the number of heads whose rows are put back in order (0: leave them)."""

    source: str
    shape: tuple[int, ...]
    heads: int = 0


def open_gguf(path: str | Path) -> Any:
    """A ``gguf.GGUFReader`` over the file (memory-mapped: nothing is read yet).

    Raises:
        ImportError: the ``gguf`` package is not installed.
        FileNotFoundError: there is no such file.
        GGUFError: the file is not a GGUF, or is cut short.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError('reading a GGUF file needs the gguf package: pip install "brise[demo]"') from error
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    try:
        check_header(path, {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()})
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise GGUFError(
            f"{path} cannot be read as a GGUF file ({error}); is the download complete?"
        ) from error


def read_config(reader: Any, sliding_window: int | None = None) -> dict[str, Any]:
    """The keyword arguments of ``transformers.MistralConfig`` for the model in the file.

    Args:
        reader: what :func:`open_gguf` returned.
        sliding_window: of the model, where the file does not say it, as llama.cpp's converter never does of a
            llama-type model; with neither, attention is full.

    Raises:
        GGUFError: another architecture, a key that is missing, or one that is not understood; a window that
            contradicts ``sliding_window``.
    """
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arch = fields.get("general.architecture")
    if arch != "llama":
        raise GGUFError(
            f"expected general.architecture 'llama', got {arch!r}: only llama-type files are Mistrals"
        )
    if fields.get("general.type", "model") != "model":
        raise GGUFError(f"expected general.type 'model', got {fields['general.type']!r}")
    if fields.get("split.count", 1) not in (0, 1):
        raise GGUFError(
            f"the model is split over {fields['split.count']} files; join them with llama-gguf-split"
        )
    llama = {
        name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")
    }
    if unknown := sorted(set(llama) - _KEYS):
        raise GGUFError(
            f"keys that a Mistral has no place for: {', '.join('llama.' + name for name in unknown)}"
        )
    if llama.get("expert_count"):
        raise GGUFError(f"llama.expert_count = {llama['expert_count']}: a mixture of experts is no Mistral")
    if llama.get("rope.scaling.type", "none") != "none":
        raise GGUFError(f"llama.rope.scaling.type = {llama['rope.scaling.type']!r}: only 'none' is read")

    def need(key: str) -> Any:
        if key not in llama:
            raise GGUFError(f"the key llama.{key} is missing")
        return llama[key]

    hidden, heads = need("embedding_length"), need("attention.head_count")
    head_dim = llama.get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if llama.get(key, head_dim) != head_dim:
            raise GGUFError(f"expected llama.{key} to be the head's width {head_dim}, got {llama[key]}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise GGUFError("the tensor token_embd.weight is missing")
    vocab = int(tensors["token_embd.weight"].shape[1])
    if llama.get("vocab_size", vocab) != vocab:
        raise GGUFError(f"llama.vocab_size is {llama['vocab_size']} but token_embd.weight has {vocab} rows")
    return {
        "architectures": ["MistralForCausalLM"],
        "dtype": "float32",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": llama.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _shortest(need("attention.layer_norm_rms_epsilon")),
        # llama.cpp's own default where the key is missing
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _shortest(llama.get("rope.freq_base", 10000.0)),
        },
        "sliding_window": _window(llama.get("attention.sliding_window"), sliding_window),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def plan_tensors(reader: Any, config: dict[str, Any]) -> dict[str, GGUFTensor]:
    """Hugging Face name -> :class:`GGUFTensor`, every tensor of the file exactly once.

    Raises:
        GGUFError: a tensor is missing, left over, or has another shape than the configuration says.
    """
    if not 0 < config["num_hidden_layers"] <= len(reader.tensors):
        raise GGUFError(
            f"llama.block_count is {config['num_hidden_layers']}, the file has {len(reader.tensors)} tensors"
        )
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n_q, n_kv, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    shapes = {
        "attn_norm": (hidden,),
        "attn_q": (n_q * width, hidden),
        "attn_k": (n_kv * width, hidden),
        "attn_v": (n_kv * width, hidden),
        "attn_output": (hidden, n_q * width),
        "ffn_norm": (hidden,),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    heads = {"attn_q": n_q, "attn_k": n_kv}
    plan = {"model.embed_tokens.weight": GGUFTensor("token_embd.weight", (vocab, hidden))}
    for layer in range(config["num_hidden_layers"]):
        for short, name in BLOCK_NAMES.items():
            plan[f"model.layers.{layer}.{name}.weight"] = GGUFTensor(
                f"blk.{layer}.{short}.weight", shapes[short], heads.get(short, 0)
            )
    plan["model.norm.weight"] = GGUFTensor("output_norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        plan["lm_head.weight"] = GGUFTensor("output.weight", (vocab, hidden))

    present = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    wanted = {tensor.source: tensor.shape for tensor in plan.values()}
    if missing := sorted(set(wanted) - set(present)):
        raise GGUFError(f"{len(missing)} tensors are missing, among them {', '.join(missing[:4])}")
    if extra := sorted(set(present) - set(wanted)):
        raise GGUFError(f"{len(extra)} tensors have no place in a Mistral, among them {', '.join(extra[:4])}")
    for name, shape in wanted.items():
        if present[name] != shape:
            raise GGUFError(
                f"{name}: expected shape {shape} by the file's own configuration, got {present[name]}"
            )
    return plan


def dequantize_tensor(stored: Any, heads: int = 0) -> Tensor:
    """One tensor of the file in float32, ``[N, K]`` or ``[K]``; with ``heads`` the rotary rows in order.

    Raises:
        GGUFError: the ``gguf`` package cannot decode this type.
    """
    import gguf

    try:
        values = gguf.dequantize(stored.data, stored.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise GGUFError(
            f"{stored.name}: the type {stored.tensor_type.name} cannot be decoded ({error})"
        ) from error
    # a copy in any case: the reader's memory is a read-only map of the file
    tensor = torch.from_numpy(values.astype("float32", copy=True))
    return in_order(tensor, heads) if heads else tensor


def in_order(rows: Tensor, heads: int) -> Tensor:
    """Rows [N, ...] of Q or K as GGUF has them, the halves of each head interleaved, in Hugging Face's order."""
    count = rows.shape[0]
    return rows.unflatten(0, (heads, count // heads // 2, 2)).transpose(1, 2).reshape(rows.shape)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Inverse of :func:`in_order`."""
    count = rows.shape[0]
    return rows.unflatten(0, (heads, 2, count // heads // 2)).transpose(1, 2).reshape(rows.shape)


def convert_gguf(
    path: str | Path,
    out: str | Path,
    *,
    sliding_window: int | None = None,
    shard_bytes: int = 4 << 30,
    progress: Progress | None = None,
) -> Path:
    """Write the model of a GGUF file to ``out``: config, generation config, safetensors, tokenizer.

    The weights are stored in float32. A Q4_1 block decodes to ``scale * q + minimum`` of two float16 numbers:
    up to 15 bits of significand for the product and another exponent for the sum, so neither float16 nor
    bfloat16 holds it, while float32 is what every GGUF reader computes in. The folder is written beside
    ``out`` and renamed, so ``out`` is whole or not there.

    Args:
        path: the GGUF file.
        out: the folder to write; must not exist.
        sliding_window: of the model, where its author says one and the file does not.
        shard_bytes: size at which a new safetensors file begins.
        progress: called with (tensors done, tensors in all).

    Raises:
        FileExistsError: ``out`` exists.
        GGUFError: see :func:`read_config` and :func:`plan_tensors`.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another folder or remove it")
    reader = open_gguf(path)
    config = read_config(reader, sliding_window)
    plan = plan_tensors(reader, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        _write_config(config, folder)
        _write_weights(reader, plan, folder, shard_bytes, progress)
        save_tokenizer(
            reader, folder, vocab_size=config["vocab_size"], max_length=config["max_position_embeddings"]
        )
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return out


def _write_config(config: dict[str, Any], folder: Path) -> None:
    from transformers import GenerationConfig, MistralConfig

    MistralConfig(**config).save_pretrained(folder)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)


def _write_weights(
    reader: Any, plan: dict[str, GGUFTensor], folder: Path, shard_bytes: int, progress: Progress | None
) -> None:
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, tensor in plan.items():
        size = 4 * torch.Size(tensor.shape).numel()
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
        total += size
    stored = {tensor.name: tensor for tensor in reader.tensors}
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = dequantize_tensor(stored[plan[name].source], plan[name].heads)
            where[name] = file
            if progress is not None:
                progress(len(where), len(plan))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        # safetensors makes its file readable by the owner alone; let it follow the umask like the rest
        shutil.copymode(folder / "config.json", folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _window(stored: Any, said: int | None) -> int | None:
    """The window in positions, from the file's key and the caller's word; None is full attention."""
    if stored is None:
        return said
    if type(stored) is not int or stored < 1:
        raise GGUFError(
            f"llama.attention.sliding_window is {stored!r}, expected a number of positions above 0"
        )
    if said not in (None, stored):
        raise GGUFError(
            f"llama.attention.sliding_window is {stored}, but sliding_window={said} was asked for"
        )
    return stored


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 where the file's bits read 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))
