"""``quantization_config`` as the other libraries write it, for what was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ...quant.config import QuantSpec
from ...quant.formats import FORMATS
from ...quant.interop.gptq import permutes
from ..safetensors_header import CheckpointError


@dataclass(frozen=True)
class Written:
    """What an export wrote: spec by path, the Linears that were kept, the model's dtype by torch's name."""

    specs: Mapping[str, QuantSpec]
    kept: tuple[str, ...]
    dtype: str

    def most(self, what: str) -> Any:
        """The commonest value of a field of the specs."""
        return Counter(getattr(spec, what) for spec in self.specs.values()).most_common(1)[0][0]

    def only(self, what: str, library: str) -> Any:
        """The one value of a field of the specs.

        Raises:
            CheckpointError: there are several.
        """
        values = sorted({getattr(spec, what) for spec in self.specs.values()}, key=str)
        if len(values) > 1:
            raise CheckpointError(
                f"{library} has one {what} for all modules, this model has {', '.join(map(str, values))}"
            )
        return values[0]


def bits4(written: Written) -> dict[str, Any]:
    """BitsAndBytesConfig of 4 bits; its double quantization says how the commonest weight is stored."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": written.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": written.most("format"),
        "bnb_4bit_use_double_quant": written.most("double_quant"),
        **_llm_int8(written),
    }


def int8(written: Written) -> dict[str, Any]:
    """BitsAndBytesConfig of LLM.int8."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        **_llm_int8(written),
    }


def gptq_1(written: Written) -> dict[str, Any]:
    """gptqmodel's config of version 1."""
    return _gptq(written, "gptq")


def gptq_2(written: Written) -> dict[str, Any]:
    """gptqmodel's config of version 2."""
    return _gptq(written, "gptq_v2")


def _gptq(written: Written, label: str) -> dict[str, Any]:
    bits = Counter(FORMATS[spec.format].bits for spec in written.specs.values()).most_common(1)[0][0]
    group = written.most("group_size")
    dynamic: dict[str, dict[str, Any]] = {
        f"-:^{_escape(path)}$": {} for path in written.kept if _in_block(path)
    }
    for path, spec in written.specs.items():
        own = {"bits": FORMATS[spec.format].bits, "group_size": spec.group_size or -1}
        if own != {"bits": bits, "group_size": group or -1}:
            dynamic[f"+:^{_escape(path)}$"] = own
    out = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group or -1,
        "desc_act": any(permutes(spec) for spec in written.specs.values()),
        "sym": all(spec.symmetric for spec in written.specs.values()),
        "lm_head": False,
        "checkpoint_format": label,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"brise:{version('brise')}"], "static_groups": False, "true_sequential": True},
    }
    return {**out, "dynamic": dynamic} if dynamic else out


def awq(written: Written) -> dict[str, Any]:
    """AutoAWQ's config of the GEMM layout."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": written.only("group_size", "AWQ") or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(written.kept) or None,
    }


def compressed_tensors(written: Written) -> dict[str, Any]:
    """compressed-tensors' config: one group for all, or groups that name their modules."""
    kinds: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for path, spec in written.specs.items():
        weights = {
            "num_bits": FORMATS[spec.format].bits,
            "type": "int",
            "symmetric": spec.symmetric,
            "strategy": "channel" if spec.group_size is None else "group",
            "group_size": spec.group_size,
            "dynamic": False,
            "actorder": None,
        }
        kinds.setdefault(str(weights), (weights, []))[1].append(path)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(kinds) == 1 else paths,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
        for i, (weights, paths) in enumerate(kinds.values())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(written.kept),
        "kv_cache_scheme": None,
    }


def _llm_int8(written: Written) -> dict[str, Any]:
    return {
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(written.kept) or None,
        "llm_int8_threshold": 6.0,
    }


def _in_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _escape(path: str) -> str:
    """A module path as a regular expression."""
    return path.replace(".", r"\.")
