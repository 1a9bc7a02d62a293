"""The model as the decode loop runs it: its own weights, arranged once, and one function from tokens to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..kernels import native
from ..kernels.ops import rms_norm, swiglu
from ..quant.linear import QuantEmbedding
from .backbone import MistralModel
from .decode_attend import Attention, Heads
from .fused_linears import Projection, project
from .fused_step import FusedStep, fused_step
from .mistral import MistralForCausalLM
from .rope import CosSin, head_dim_of
from .static_cache import StaticRollingCache
from .whole_step import WholeStep

# types whose angles depend on how long the text has become, so that no step is like the one before
_LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class LayerWeights:
    """One block; norms are vectors [D]."""

    attention_norm: Tensor
    qkv: Projection
    o: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection


class DecodeModel:
    """A MistralForCausalLM with q, k, v and gate, up fused, for prompts and for decode steps.

    Args:
        model: stays as it is to whoever calls it; see :mod:`.fused_linears`. One that is moved or re-quantized
            afterwards needs a new DecodeModel.
        rows: that are multiplied at once in a decode step.
        invariant: no row of a step depends, in any bit, on the others.
        repack: on a CPU, copy dense fp32 weights into the layout that is fastest there.
        fused: on a GPU, steps in five launches a layer, see :func:`.fused_step.fused_step`.

    Attributes:
        separate: path of a block's layers -> why they could not be fused.
        whole: the compiled step, or why there is none.
        repacked_bytes: of the weights that are there a second time.

    Raises:
        TypeError: another architecture.
        ValueError: RoPE of a type whose angles change with the length of the text, or ``fused`` where it cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rows: int = 1,
        invariant: bool = False,
        repack: bool = True,
        fused: bool | None = None,
    ) -> None:
        if not isinstance(model, MistralForCausalLM):
            raise TypeError(
                f"the decode loop runs brise.model.mistral.MistralForCausalLM, got {type(model).__name__}; "
                "load it with brise.model.checkpoint.load_model, or use its own generate()"
            )
        self.backbone: MistralModel = model.model
        if self.backbone.rotary_emb.rope_type in _LENGTH_DEPENDENT:
            raise ValueError(
                f"RoPE of type {self.backbone.rotary_emb.rope_type!r} turns by angles that change with the length of "
                "the text, which the decode loop has no way for; use model.generate()"
            )
        self.config = model.config
        self.dtype = self.backbone.norm.weight.dtype
        self.device = self.backbone.norm.weight.device
        self.invariant = invariant
        self.vocab = model.config.vocab_size
        self.heads = Heads(
            model.config.num_attention_heads, model.config.num_key_value_heads, head_dim_of(model.config)
        )
        self.eps = model.config.rms_norm_eps
        self.silu = model.config.hidden_act == "silu"
        self.act: Callable[[Tensor], Tensor] = ACT2FN[model.config.hidden_act]
        # where operators are so small that calling them is what costs, they are called directly
        self.lean = self.device.type == "cpu"
        self.separate: dict[str, str] = {}
        self.whole = WholeStep(model, self.heads, rows)
        self.repacked_bytes = 0
        options = {
            "rows": 1 if invariant else rows,
            "dtype": self.dtype,
            "repack": repack,
            "invariant": invariant,
        }
        self.steps: list[LayerWeights] = []
        self.chunks: list[LayerWeights] = []
        with torch.inference_mode(False), torch.no_grad():
            for i, block in enumerate(self.backbone.layers[: model.config.num_hidden_layers]):
                made: list[tuple[Projection, Projection]] = []
                for names in (
                    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                    ("self_attn.o_proj",),
                    ("mlp.gate_proj", "mlp.up_proj"),
                    ("mlp.down_proj",),
                ):
                    made.append(project(block, names, **options))
                    self._note(f"layers.{i}.{names[0].rpartition('.')[0]}", made[-1][0])
                for where, which in ((self.steps, 0), (self.chunks, 1)):
                    qkv, o, gate_up, down = (pair[which] for pair in made)
                    norms = (
                        block.input_layernorm.weight.detach(),
                        block.post_attention_layernorm.weight.detach(),
                    )
                    where.append(LayerWeights(norms[0], qkv, o, norms[1], gate_up, down))
            self.head, self.chunk_head = project(model, ("lm_head",), **options)
            self._note("lm_head", self.head)
            self.fused: FusedStep | None = fused_step(self, fused)
        self.lean = self.lean and self.fused is None

    def _note(self, path: str, made: Projection) -> None:
        self.repacked_bytes += made.nbytes
        if made.separate is not None:
            self.separate[path] = made.separate

    def turn(self, positions: Tensor) -> CosSin:
        """cos and sin [B, T, head_dim] at ``positions`` [B, T]."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return self.backbone.rotary_emb(like, positions)

    def hidden(self, tokens: Tensor, attend: Attention, *, chunk: bool) -> Tensor:
        """tokens int64 [B, T], all in the vocabulary -> hidden states [B, T, D] before the last norm.

        Args:
            chunk: they are part of one prompt, rather than steps of several texts.
        """
        x = self._embed(tokens)
        batch, length, width = x.shape
        if not chunk and self.fused is not None and self.fused.takes(attend, batch * length):
            return self.fused.hidden(x, attend)  # type: ignore[arg-type]
        x = x.flatten(0, 1)
        branch: Tensor | None = None
        for i, w in enumerate(self.chunks if chunk else self.steps):
            h, x = self._norm(x, w.attention_norm, branch)
            context = attend(i, w.qkv(h).view(batch, length, -1))
            h, x = self._norm(x, w.mlp_norm, w.o(context.flatten(0, 1)))
            branch = w.down(self._gated(w.gate_up(h)))
        return (x if branch is None else x + branch).view(batch, length, width)

    def advance(self, tokens: Tensor, cache: StaticRollingCache, turn: CosSin, first: Tensor) -> Tensor:
        """As :meth:`hidden`, by the compiled step: tokens int64 [B, T] of texts, which the cache has counted."""
        return self.whole(self._embed(tokens), cache, turn, first)

    def logits(self, hidden: Tensor, *, chunk: bool) -> Tensor:
        """hidden [R, D] -> [R, vocab]."""
        h, _ = self._norm(hidden, self.backbone.norm.weight, None)
        return (self.chunk_head if chunk else self.head)(h)

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self.backbone.embed_tokens
        if isinstance(table, QuantEmbedding):
            return table.lookup(tokens)
        return table(tokens)

    def _norm(self, x: Tensor, weight: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + branch, and that sum."""
        if not self.lean or weight.dtype != x.dtype or x.dtype != torch.float32:
            return rms_norm(x, weight, self.eps, branch)
        library = native.active()
        if library is not None and x.shape[-1] % library.brise_lanes() == 0:
            return native.rms_norm(x, weight, self.eps, branch, library)
        if branch is not None:
            x = x + branch
        return torch.rms_norm(x, (x.shape[-1],), weight, self.eps), x

    def _gated(self, gate_up: Tensor) -> Tensor:
        """[R, 2 F] -> [R, F]."""
        if not self.silu:
            gate, up = gate_up.chunk(2, dim=-1)
            return self.act(gate) * up
        if not self.lean:
            return swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)
