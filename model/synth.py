"""Checkpoints of true shapes and names with random weights, for tests and benchmarks of size.

Linear weights are normal with the spread of a trained model's, 0.02 and less for the layers that join the residual,
and one input channel in 256 is an outlier, 8 or 16 times as large, as trained models have them (LLM.int8(),
arXiv:2208.07339, section 4). Every value is an entry of a table that is chosen by bits of Philox, times a power of two:
nothing depends on the machine, the number of threads or a library's sums, so a seed always gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..quant.workers import Workers
from .job import JobFolder
from .sentencepiece import save_tokenizer
from .shards import Planned, ShardFiles
from .writer import complete_folder

Progress = Callable[[str, int, int], None]
# weights drawn at once, by one thread, from a stream of their own
_PIECE = 1 << 20
_OUTLIERS = 256
_SPREAD = 0.02


@dataclass(frozen=True)
class Size:
    """The shape of a Mistral."""

    width: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    positions: int = 32768
    window: int | None = 4096

    def config(self) -> dict[str, Any]:
        """Its config.json, as of Mistral-7B-v0.1."""
        return {
            "architectures": ["MistralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "dtype": "bfloat16",
            "eos_token_id": 2,
            "head_dim": self.width // self.heads,
            "hidden_act": "silu",
            "hidden_size": self.width,
            "initializer_range": 0.02,
            "intermediate_size": self.inner,
            "max_position_embeddings": self.positions,
            "model_type": "mistral",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.blocks,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "sliding_window": self.window,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }

    def tensors(self) -> list[Planned]:
        """Name, dtype and shape of every tensor, in the order in which the model runs."""
        d, kv = self.width, self.width // self.heads * self.kv_heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, d)}
        for block in range(self.blocks):
            prefix = f"model.layers.{block}"
            shapes |= {
                f"{prefix}.input_layernorm.weight": (d,),
                f"{prefix}.self_attn.q_proj.weight": (d, d),
                f"{prefix}.self_attn.k_proj.weight": (kv, d),
                f"{prefix}.self_attn.v_proj.weight": (kv, d),
                f"{prefix}.self_attn.o_proj.weight": (d, d),
                f"{prefix}.post_attention_layernorm.weight": (d,),
                f"{prefix}.mlp.gate_proj.weight": (self.inner, d),
                f"{prefix}.mlp.up_proj.weight": (self.inner, d),
                f"{prefix}.mlp.down_proj.weight": (d, self.inner),
            }
        shapes |= {"model.norm.weight": (d,), "lm_head.weight": (self.vocabulary, d)}
        return [Planned(name, torch.bfloat16, shape) for name, shape in shapes.items()]


SIZES = {
    "mistral-7b": Size(4096, 14336, 32, 32, 8),
    "mistral-1b": Size(2048, 7168, 18, 16, 4),
    "mistral-100m": Size(768, 2688, 6, 12, 4),
    "mistral-tiny": Size(128, 448, 4, 4, 2),
}


def write_synth(
    size: Size,
    out: str | Path,
    tokenizer: Path | None,
    *,
    seed: int = 0,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> int:
    """Write a checkpoint of random weights in bf16; the same arguments give the same bytes.

    Args:
        tokenizer: a sentencepiece ``tokenizer.model`` that goes along; None leaves the folder without one.
        progress: called with ("write", bytes done, bytes in all).
    Returns:
        Parameters of the model.
    Raises:
        CheckpointError: ``out`` is there and is to stay, or another process is writing it.
        OSError: there is not enough room on the disk.
    """
    tensors = size.tensors()
    identity = {"synth": dataclasses.asdict(size), "seed": seed, "max_shard_bytes": max_shard_bytes}
    job = JobFolder(out, identity, overwrite=overwrite)
    try:
        shards = ShardFiles(job.folder, tensors, max_shard_bytes, 0, create=True)
        shards.open()
        done, total = 0, shards.nbytes
        with Workers() as workers, ThreadPoolExecutor(1) as writer:
            synced = None
            for tensor in tensors:
                draw = _Draw(tensor, seed)
                starts = list(range(0, draw.count, _PIECE))
                workers.map(partial(_write, shards, draw), starts)
                done += tensor.nbytes
                if synced is None or synced.done():  # the disk works along, and is not waited for
                    synced = writer.submit(shards.sync, [tensor.name])
                if progress is not None:
                    progress("write", done, total)
        shards.sync(shards.tensors)
        shards.close()
        files = [(shards.path(i).name, list(shard.begins)) for i, shard in enumerate(shards.shards)]
        made = None
        if tokenizer is not None:
            made = job.path / "tokenizer"
            made.mkdir()
            save_tokenizer(tokenizer, made, size.positions)
            shutil.copyfile(tokenizer, made / "tokenizer.model")
        ids = '{\n  "bos_token_id": 1,\n  "eos_token_id": 2\n}\n'
        extra = {"generation_config.json": ids}
        complete_folder(job.folder, files, shards.nbytes, size.config(), made, extra)
        job.commit()
    except BaseException:
        job.discard()
        raise
    return sum(torch.Size(tensor.shape).numel() for tensor in tensors)


def _write(shards: ShardFiles, draw: _Draw, start: int) -> None:
    shards.write(draw.name, draw.piece(start), 2 * start)


class _Draw:
    """The values of one tensor, a piece at a time."""

    def __init__(self, tensor: Planned, seed: int) -> None:
        self.name = tensor.name
        self.count = torch.Size(tensor.shape).numel()
        self.width = tensor.shape[-1]
        # the seed of a tensor is its name's: neither its place nor the other tensors matter
        digest = hashlib.sha256(f"{seed} {tensor.name}".encode()).digest()
        self._key = np.frombuffer(digest[:16], dtype="<u8")
        self._norm = len(tensor.shape) == 1
        joins = tensor.name.endswith(("o_proj.weight", "down_proj.weight"))
        self._table = _normal_table(_SPREAD / 4 if joins else _SPREAD)
        self._channels = None if self._norm or "embed" in tensor.name else self._outliers()

    def piece(self, start: int) -> memoryview:
        """The bytes of the bf16 values ``start`` to ``start + _PIECE``."""
        count = min(_PIECE, self.count - start)
        index = self._bits(start, count)
        if self._norm:
            # around one, in steps that bf16 holds
            values = ((index & 31).to(torch.float32) / 64 + 0.75).to(torch.bfloat16)
        else:
            values = self._table.index_select(0, index)
            if self._channels is not None:
                first = start % self.width
                rows = -(-(first + count) // self.width)
                values *= self._channels.repeat(rows)[first : first + count]
        out: memoryview = values.view(torch.uint8).numpy().data
        return out

    def _bits(self, start: int, count: int) -> Tensor:
        """16 random bits for each value, int32."""
        stream = np.random.Philox(key=self._key, counter=[0, 0, start // _PIECE, 0])
        words = stream.random_raw(-(-count // 4)).astype("<u8", copy=False)
        signed = torch.from_numpy(words.view(np.int16))[:count].to(torch.int32)
        return signed.add_(1 << 15)

    def _outliers(self) -> Tensor:
        """What each input channel is multiplied by: 1, and for a few 8 or 16; bf16 [K]."""
        word = np.random.Philox(key=self._key, counter=[0, 0, 0, 1]).random_raw(self.width)
        factor = np.where(word % _OUTLIERS == 0, np.where(word & (1 << 20), 8.0, 16.0), 1.0)
        return torch.from_numpy(factor).to(torch.bfloat16)


def _normal_table(spread: float) -> Tensor:
    """The middles of 65536 equally likely slices of a normal distribution: bf16 [65536]."""
    p = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    return (torch.special.ndtri(p) * spread).to(torch.bfloat16)
