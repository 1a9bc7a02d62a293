"""The table of other libraries' formats: the one place where a new one is named, for reading and for writing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ...quant.config import QuantSpec
from ...quant.interop import awq, bitsandbytes, compressed_tensors, gptq
from ...quant.interop.ggml import BLOCKS, NoBlock
from ...quant.tensor import Params, QuantizedTensor, Shape
from ..quantization_entry import METHOD
from ..reader import CheckpointReader
from . import entries, find
from .stored import Stored

Finder = Callable[[CheckpointReader, Mapping[str, Any], str], dict[str, Stored]]

# quant_method in config.json -> what finds the quantized weights of such a folder
METHODS: dict[str, Finder] = {
    "gptq": find.find_gptq,
    "awq": find.find_awq,
    "bitsandbytes": find.find_bitsandbytes,
    "compressed-tensors": find.find_compressed_tensors,
}


class Target(Protocol):
    """What a format makes of a spec (:mod:`brise.quant.interop`)."""

    def target(self, spec: QuantSpec, shape: Shape) -> QuantSpec: ...


class WeightWriter(Target, Protocol):
    """How one weight is written: tensor by last name."""

    def write(self, q: QuantizedTensor) -> dict[str, Tensor]: ...


@runtime_checkable
class Admitting(Protocol):
    """A writer that has more to say of a weight's parameters: Unfit, or how much more it rounds the scales."""

    def admit(self, params: Params) -> float: ...


class AsItIs:
    """Our own folders hold every spec."""

    def target(self, spec: QuantSpec, shape: Shape) -> QuantSpec:
        return spec


@dataclass(frozen=True)
class ForeignFormat:
    """One row of the table.

    Attributes:
        name: what ``brise export --format`` takes.
        title: for people.
        weight: given the model's dtype by torch's name, the :class:`WeightWriter` (for GGUF: the block).
        entry: ``quantization_config`` of config.json.
        fresh: the spec for a weight that has to be quantized anew; its group is made to fit.
        kind: the type of a GGUF file; "brise" for a folder of ours; None for a folder of another library.
        loads: how to load a folder, a line a tool: (tool, code). FOLDER stands for the folder.
    """

    name: str
    title: str
    weight: Callable[[str], Any]
    entry: Callable[[entries.Written], dict[str, Any]]
    fresh: QuantSpec
    loads: tuple[tuple[str, str], ...]
    kind: str | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether it is a file of llama.cpp's."""
        return self.kind not in (None, "brise")

    @property
    def decodes(self) -> bool:
        """Whether no weight of it is quantized."""
        return self.kind == "F16"

    def fresh_for(self, widths: Iterable[int]) -> QuantSpec:
        """:attr:`fresh` with the largest usual group that divides all ``widths``: one file, one group size."""
        group = self.fresh.group_size
        if group is None:
            return self.fresh
        fits = [g for g in (128, 64, 32) if g <= group and all(width % g == 0 for width in widths)]
        return dataclasses.replace(self.fresh, group_size=fits[0] if fits else None)


_TRANSFORMERS = (
    "transformers",
    'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("FOLDER")',
)
_BRISE = ("brise", 'from brise.model.checkpoint import load_model\n\nmodel = load_model("FOLDER")')
_VLLM = ("vLLM", 'from vllm import LLM\n\nllm = LLM("FOLDER")')
_GPTQMODEL = ("gptqmodel", 'from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("FOLDER")')
_LLAMA_CPP = ("llama.cpp", "llama-cli -m FOLDER/FOLDER-KIND.gguf")
_BRISE_GGUF = (
    "brise",
    'from brise.model.checkpoint import load_model\n\nmodel = load_model("FOLDER/FOLDER-KIND.gguf")',
)


def _gguf(kind: str) -> ForeignFormat:
    spec = BLOCKS[kind].spec if kind in BLOCKS else QuantSpec(format="int8")
    loads = tuple((tool, code.replace("KIND", kind)) for tool, code in (_LLAMA_CPP, _BRISE_GGUF))
    return ForeignFormat(
        f"gguf-{kind.lower()}",
        f"GGUF, {kind}",
        lambda dtype: BLOCKS.get(kind, NoBlock()),
        lambda written: {"quant_method": "gguf"},
        spec,
        loads,
        kind,
    )


FORMATS: dict[str, ForeignFormat] = {
    row.name: row
    for row in (
        ForeignFormat(
            "bitsandbytes",
            "bitsandbytes 4-bit (nf4 or fp4)",
            bitsandbytes.Bits4Weight,
            entries.bits4,
            QuantSpec(format="nf4"),
            (_TRANSFORMERS, _VLLM, _BRISE),
        ),
        ForeignFormat(
            "bitsandbytes-int8",
            "bitsandbytes LLM.int8",
            lambda dtype: bitsandbytes.Int8Weight(),
            entries.int8,
            QuantSpec(format="int8", scale="absmax_narrow", scale_dtype="float32"),
            (_TRANSFORMERS, _BRISE),
        ),
        ForeignFormat(
            "gptq",
            "GPTQ version 1",
            lambda dtype: gptq.GPTQWeight(1),
            entries.gptq_1,
            QuantSpec(format="int4"),
            (_GPTQMODEL, _VLLM, _TRANSFORMERS, _BRISE),
        ),
        ForeignFormat(
            "gptq_v2",
            "GPTQ version 2",
            lambda dtype: gptq.GPTQWeight(2),
            entries.gptq_2,
            QuantSpec(format="int4", symmetric=False),
            (_GPTQMODEL, _VLLM, _BRISE),
        ),
        ForeignFormat(
            "awq",
            "AWQ, GEMM layout",
            lambda dtype: awq.AWQWeight(),
            entries.awq,
            QuantSpec(format="int4", symmetric=False),
            (_GPTQMODEL, _VLLM, _TRANSFORMERS, _BRISE),
        ),
        ForeignFormat(
            "compressed-tensors",
            "compressed-tensors, pack-quantized",
            compressed_tensors.PackedWeight,
            entries.compressed_tensors,
            QuantSpec(format="int4"),
            (_TRANSFORMERS, _VLLM, _BRISE),
        ),
        ForeignFormat(
            "brise",
            "brise",
            lambda dtype: AsItIs(),
            lambda written: {"quant_method": METHOD},
            QuantSpec(format="int4"),
            (_BRISE,),
            "brise",
        ),
        *(_gguf(kind) for kind in ("Q4_0", "Q4_1", "Q8_0", "F16")),
    )
}
