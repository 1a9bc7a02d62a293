"""Which models the compiled decode step of a CPU takes, and their weights as it reads them (kernels/native_step.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import native
from ..kernels.native_step import NativeStep, StepBlock, StepWeight
from ..kernels.reference import Weight
from ..quant.double_quant import dynamic_map
from ..quant.formats import IMPORTED
from ..quant.linear import QuantLinear
from .decode_attend import Heads
from .fused_linears import FEW_ROWS
from .mistral import MistralForCausalLM
from .rope import CosSin
from .static_cache import StaticRollingCache

_LAYERS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# rows up to which it is taken before products that decode into memory, or have a copy of a dense weight in blocks
_FEW_ROWS, _FEW_ROWS_DENSE = 64, FEW_ROWS


class WholeStep:
    """All blocks of a model in one call; where that cannot be, ``step`` is None and ``refused`` says why."""

    def __init__(self, model: MistralForCausalLM, heads: Heads, rows: int) -> None:
        self.step: NativeStep | None = None
        self.refused: str | None = None
        found = self._made(model, heads, rows)
        if isinstance(found, str):
            self.refused = found
        else:
            self.step = found

    @staticmethod
    def _made(model: MistralForCausalLM, heads: Heads, rows: int) -> NativeStep | str:
        norm, config = model.model.norm.weight, model.config
        if not norm.is_cpu or norm.dtype != torch.float32:
            return f"it computes in fp32 on a CPU, and the model is {norm.dtype} on {norm.device.type}"
        library = native.active()
        if library is None:
            return "there is no compiled code on this machine"
        if config.hidden_act != "silu":
            return f"it knows silu, not {config.hidden_act}"
        if any(
            size % library.brise_lanes()
            for size in (heads.width, config.hidden_size, config.intermediate_size)
        ):
            return f"it takes widths of whole vectors of {library.brise_lanes()}"
        blocks: list[StepBlock] = []
        for i, block in enumerate(model.model.layers[: config.num_hidden_layers]):
            norms = (block.input_layernorm.weight.detach(), block.post_attention_layernorm.weight.detach())
            if any(n.dtype != torch.float32 or not n.is_contiguous() for n in norms):
                return f"the norms of layers.{i} are no plain fp32 vectors"
            parts: dict[str, StepWeight] = {}
            for name, path in _LAYERS.items():
                weight = _weight(block.get_submodule(path))
                part = weight if isinstance(weight, str) else StepWeight.of(weight, library)
                if part is None or isinstance(part, str):
                    reason = part or "in a format, or in groups, for which there is no compiled product"
                    return f"layers.{i}.{path} is {reason}"
                if rows > (_FEW_ROWS_DENSE if part.bits == 32 else _FEW_ROWS):
                    return f"{rows} rows at once are more than it is fast for"
                parts[name] = part
            blocks.append(StepBlock(*norms, *(parts[name] for name in _LAYERS)))
        if not blocks:
            return "the model has no blocks"
        scale = heads.width**-0.5
        return NativeStep(
            blocks, heads.queries, heads.groups, heads.width, config.rms_norm_eps, scale, library
        )

    def __call__(self, x: Tensor, cache: StaticRollingCache, turn: CosSin, first: Tensor) -> Tensor:
        """x fp32 [B, T, D], embedded; the cache has counted the tokens -> [B, T, D] before the last norm."""
        assert self.step is not None
        keys, values = ([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))
        return self.step(x, keys, values, *turn, first, cache.rows.seen, cache.rows.reach)


def _weight(layer: nn.Module) -> Tensor | Weight | str:
    """A layer's weight, or what is in the way of reading it."""
    if getattr(layer, "bias", None) is not None:
        return "a layer with a bias"
    if type(layer) is nn.Linear:
        return layer.weight.detach()
    if not isinstance(layer, QuantLinear):
        return f"a {type(layer).__name__}, neither plain nor quantized"
    if layer.spec.format in IMPORTED:
        return f"{layer.spec.format}, which no kernel reads"
    stored = layer.quantized()
    scales_map = dynamic_map(torch.device("cpu")) if layer.spec.double_quant else None
    return Weight(layer.spec.format, stored.shape, **stored.tensors, scales_map=scales_map)
