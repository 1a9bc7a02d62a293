"""Mistral's own checkpoints: ``consolidated.safetensors`` with ``params.json``, under Hugging Face's names.

The weights are the same but for names and the rows of Q and K: Mistral's rotary embedding turns neighbouring rows of a
head (2i, 2i + 1), Hugging Face's the rows i and i + d/2 (mistral-inference, ``rope.py``; transformers,
``convert_mistral_weights_to_hf.py``).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .safetensors_header import CheckpointError
from .tensor_files import TensorFiles, listed

PARAMS = "params.json"
_SINGLE = "consolidated.safetensors"
_SEVERAL = "consolidated-*.safetensors"

_ENDS = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_NEEDED = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")
# what is read besides; any other key could change what the model computes
_KNOWN = {
    *_NEEDED,
    "rope_theta",
    "sliding_window",
    "max_position_embeddings",
    "max_seq_len",
    "model_max_length",
    "tied_embeddings",
    "use_biases",
    "causal",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_consolidated(folder: Path) -> bool:
    """Whether a folder holds Mistral's own files, and none of Hugging Face's."""
    has_own = (folder / PARAMS).exists() and any(folder.glob("consolidated*.safetensors"))
    return has_own and not any(folder.glob("model*.safetensors*"))


class ConsolidatedSource:
    """See :class:`.source.Source`.

    Raises:
        CheckpointError: params.json lacks a key or has one that is not known, tensors that are missing, left over or
            double (all are listed), or of another shape than params.json says.
    """

    def __init__(self, folder: str | Path) -> None:
        from .reader import read_json

        self._files = TensorFiles(folder)
        self.folder = self._files.folder
        self.config = read_params(read_json(self.folder, PARAMS), str(self.folder / PARAMS))
        single = (self.folder / _SINGLE).exists()
        shards = [_SINGLE] if single else sorted(p.name for p in self.folder.glob(_SEVERAL))
        self._files.open(shards)
        self._theirs = self._match()
        self.names = sorted(self._theirs)
        dtypes = {self._files.info(name)[0] for name in self._files.names}
        if wrong := dtypes - set(_DTYPES):
            raise CheckpointError(
                f"{self.folder} holds tensors of {', '.join(map(str, wrong))}, expected float32, bfloat16 or float16"
            )
        common = self._files.info("tok_embeddings.weight")[0]
        self.config["dtype"] = str(common).removeprefix("torch.")

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self._files.info(self._their(name))

    def shard(self, name: str) -> str:
        return self._files.shard(self._their(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        theirs = self._their(name)
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return self._files.rows(theirs, start, stop)
        width = self.config["head_dim"]
        first, last = start - start % width, stop + -stop % width
        heads = self._files.rows(theirs, first, last)
        halves = heads.view(-1, width // 2, 2, heads.shape[1]).transpose(1, 2).reshape(heads.shape)
        return halves[start - first : stop - first]

    def prefetch(self, name: str) -> None:
        self._files.prefetch(self._their(name))

    def identity(self) -> dict[str, Any]:
        params = (self.folder / PARAMS).read_bytes()
        return {PARAMS: hashlib.sha256(params).hexdigest(), **self._files.identity()}

    def check_unchanged(self) -> None:
        self._files.check_unchanged()

    def _their(self, name: str) -> str:
        if name not in self._theirs:
            raise CheckpointError(f"{self.folder} has no tensor for {name}")
        return self._theirs[name]

    def _match(self) -> dict[str, str]:
        """Hugging Face's name -> theirs, every tensor exactly once."""
        ours = {theirs: name for theirs in self._files.names if (name := our_name(theirs))}
        blocks = self.config["num_hidden_layers"]
        wanted = {f"layers.{i}.{short}" for i in range(blocks) for short in _BLOCK} | set(_ENDS)
        if self.config["tie_word_embeddings"]:
            wanted.discard("output.weight")
        found = set(self._files.names)
        if missing := sorted(wanted - found):
            raise CheckpointError(
                f"{self.folder}: {len(missing)} tensors that {PARAMS} asks for are missing: {listed(missing)}"
            )
        if extra := sorted(found - wanted):
            raise CheckpointError(
                f"{self.folder}: {len(extra)} tensors have no place in a Mistral: {listed(extra)}"
            )
        return {name: theirs for theirs, name in ours.items()}


def our_name(theirs: str) -> str | None:
    """Hugging Face's name for one of Mistral's, None for one that is not known."""
    if theirs in _ENDS:
        return _ENDS[theirs]
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", theirs)
    if match is None or match[2] not in _BLOCK:
        return None
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}"


def read_params(params: dict[str, Any], where: str) -> dict[str, Any]:
    """The config.json of a params.json.

    Raises:
        CheckpointError: a key is missing, or one is not known.
    """
    if missing := [key for key in _NEEDED if key not in params]:
        raise CheckpointError(f"{where} lacks {listed(missing)}")
    if unknown := sorted(key for key in set(params) - _KNOWN if params[key] is not None):
        raise CheckpointError(f"{where} has keys that a Mistral has no place for: {listed(unknown)}")
    if params.get("use_biases"):
        raise CheckpointError(f"{where}: use_biases is set, but a Mistral's Linear layers have none")
    window = params.get("sliding_window")
    # where the file does not say, mistral-inference takes 1e6, and 1e4 for the first models, which had a window
    theta = params.get("rope_theta") or (1_000_000.0 if window is None else 10_000.0)
    positions = next(
        (params[key] for key in ("max_position_embeddings", "model_max_length") if params.get(key)), 32768
    )
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": params["vocab_size"],
        "hidden_size": params["dim"],
        "intermediate_size": params["hidden_dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "head_dim": params["head_dim"],
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": params["norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(theta)},
        "sliding_window": window,
        "tie_word_embeddings": bool(params.get("tied_embeddings", False)),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
