"""The plug-in for transformers: after ``import brise.model.hf`` it reads, makes and writes quantized folders,
and knows the attention implementation ``brise``.

    import brise.model.hf
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained("folder-of-ours")
    AutoModelForCausalLM.from_pretrained("some/model", quantization_config=BriseConfig("nf4-dq"))

It knows no architecture: any model with plain Linear and Embedding modules will do. Without the import
transformers does not know the method ``brise``; it then fails (:func:`.quantization_entry.guard_of`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..quant.apply import find_targets, quantize_weight, replace_module, resolve, swap, tie_quantized
from ..quant.config import ConfigError, QuantConfig, QuantSpec
from ..quant.linear import QuantEmbedding, QuantLinear
from ..quant.tensor import layout
from . import attention_brise
from .quantization_entry import FORMAT_VERSION, METHOD, entry_of, guard_of, is_guard, read_entry
from .safetensors_header import CheckpointError, Entry, read_header

__all__ = ["BriseConfig", "BriseHfQuantizer"]

attention_brise.register()


@register_quantization_config(METHOD)
class BriseConfig(QuantizationConfigMixin):
    """What ``from_pretrained`` takes as ``quantization_config``.

    Args:
        config: a preset by name, a YAML or JSON file, or a QuantConfig.

    Attributes:
        config: the rules.
        specs: path -> spec of every quantized module, once a model was loaded.
    """

    quant_method = METHOD  # type: ignore[assignment]

    def __init__(self, config: str | Path | QuantConfig = "nf4") -> None:
        self.config = config if isinstance(config, QuantConfig) else QuantConfig.load(config)
        self.specs: dict[str, QuantSpec] | None = None
        self._entry: dict[str, Any] | None = None

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From what config.json holds, or from ``{"quant_method": "brise", "config": rules or a preset}``."""
        if "modules" in config_dict:
            rules, specs = read_entry(config_dict, "config.json")
            out = cls(rules)
            out.specs, out._entry = specs, dict(config_dict)
        else:
            rules = config_dict.get("config", "nf4")
            out = cls(QuantConfig.from_dict(rules) if isinstance(rules, Mapping) else rules)
        return (out, kwargs) if return_unused_kwargs else out

    def describe(self, model: nn.Module) -> None:
        """Take down what the modules of a model are now; this is what is saved."""
        self._entry = entry_of(model, self.config)
        self.specs = None if self._entry is None else read_entry(self._entry, "the model")[1]

    def to_dict(self) -> dict[str, Any]:
        if self._entry is not None:
            return dict(self._entry)
        return {"quant_method": METHOD, "format_version": FORMAT_VERSION, "config": self.config.to_dict()}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class _Quantize(ConversionOps):
    """Quantize a weight as it comes from the checkpoint, and put the quantized module in its place."""

    def __init__(self, quantizer: BriseHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        assert model is not None
        for name, value in input_dict.items():
            path = name.rpartition(".")[0]
            weight = value[0] if isinstance(value, list) else value
            module = model.get_submodule(path)
            q = quantize_weight(path, weight, self.quantizer.specs[path])
            if isinstance(module, nn.Embedding):
                new: nn.Module = QuantEmbedding.from_quantized(q, weight.dtype, module.padding_idx)
            else:
                new = QuantLinear.from_quantized(q, module.bias)  # type: ignore[arg-type]
            replace_module(model, path, new)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


@register_quantizer(METHOD)
class BriseHfQuantizer(HfQuantizer):
    """Loads quantized folders into any model class of transformers, and quantizes others while they load.

    Plain algorithms only in the second case: what needs calibration goes through ``brise quantize``.
    """

    requires_calibration = False
    quantization_config: BriseConfig

    def __init__(self, quantization_config: BriseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.specs: dict[str, QuantSpec] = {}
        # quantized heads that read the tensors of a quantized embedding: head -> embedding
        self.ties: dict[str, str] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized and self.quantization_config.config.needs_calibration:
            raise ConfigError(
                "this config needs calibration data, which from_pretrained has none of: run "
                "`brise quantize`, then load its folder"
            )
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError('quantized modules cannot be offloaded: leave "disk" out of device_map')

    def _process_model_before_weight_loading(  # type: ignore[override]
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        tied = {
            target.removesuffix(".weight"): source.removesuffix(".weight")
            for target, source in model.all_tied_weights_keys.items()
        }
        if self.pre_quantized:
            stored = _locate(self.quantization_config.specs or {}, model)
            self.specs = {path: spec for path, (_, spec) in stored.items()}
        else:
            model.tie_weights()
            resolved = resolve(self.quantization_config.config, find_targets(model))
            self.specs = {path: spec for path, (spec, _) in resolved.items() if spec is not None}
        for head, source in tied.items():
            if self.specs.get(head) != self.specs.get(source):
                raise CheckpointError(
                    f"{head} is tied to {source}, but config.json gives them different specs"
                )
            if head in self.specs:
                self.ties[head] = source
        if self.pre_quantized:
            _check_files(checkpoint_files, stored, model, set(self.ties))
            swap(model, self.specs, model.dtype)
            # the tensor that stops a transformers without this plug-in, see guard_of
            guards = {rf"^(.*\.)?{re.escape(name)}\.weight$" for name, _ in stored.values()}
            model._keys_to_ignore_on_load_unexpected = {
                *(model._keys_to_ignore_on_load_unexpected or ()),
                *guards,
            }
        else:
            swap(model, {head: self.specs[head] for head in self.ties}, model.dtype)
        self._untie(model)

    def _untie(self, model: PreTrainedModel) -> None:
        """Take tied, quantized heads from transformers' care: it ties parameters and saves every buffer."""
        for head in self.ties:
            module = model.get_submodule(head)
            module._non_persistent_buffers_set.update(name for name, _ in module.named_buffers())
            model.all_tied_weights_keys.pop(f"{head}.weight", None)
        if self.ties:
            known = dict(model._tied_weights_keys or {})
            model._tied_weights_keys = {k: v for k, v in known.items() if k not in _weights(self.ties)}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        path, _, leaf = param_name.rpartition(".")
        if self.pre_quantized or leaf != "weight" or path not in self.specs:
            return False
        module = model.get_submodule(path)
        return isinstance(module, nn.Linear | nn.Embedding) and not isinstance(module, QuantLinear)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes an element, to plan a device map: a weight that is yet to be quantized counts as its codes."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        spec = self.specs[param_name.rpartition(".")[0]]
        stored = layout(spec, (param.shape[0], param.shape[1])).values()
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in stored) / param.numel()

    def get_quantize_ops(self) -> _Quantize:
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for head, source in self.ties.items():
            _tie(model.get_submodule(head), model.get_submodule(source))
        left = [
            path
            for path in self.specs
            if not isinstance(model.get_submodule(path), QuantLinear | QuantEmbedding)
        ]
        if left:
            raise CheckpointError(f"the checkpoint holds no weight of {', '.join(left[:6])}, to be quantized")
        self.quantization_config.describe(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What save_pretrained writes; the entry of its config.json is brought up to date on the way."""
        self.quantization_config.describe(model)
        model.config.quantization_config = self.quantization_config
        state = model.state_dict()
        if (guard := guard_of(self.quantization_config.to_dict(), state)) is not None:
            state[guard[0]] = guard[1]
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for path, module in list(model.named_modules()):
            if not isinstance(module, QuantLinear | QuantEmbedding):
                continue
            n, k = module.shape
            weight: Any
            if path in self.ties:
                weight = model.get_submodule(self.ties[path]).weight
            else:
                weight = nn.Parameter(module.quantized().dequantize(dtype or model.dtype))
            with torch.device("meta"):
                new: nn.Module
                if isinstance(module, QuantEmbedding):
                    new = nn.Embedding(n, k, module.padding_idx)
                else:
                    new = nn.Linear(k, n, bias=False)
                    new.register_parameter("bias", module.bias)
            new.weight = weight
            replace_module(model, path, new.train(module.training))
        if self.ties:
            del model._tied_weights_keys
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top: the gradient flows through quantized modules, whose codes are fixed."""
        return True


def _weights(paths: Mapping[str, str]) -> set[str]:
    return {f"{path}.weight" for path in paths}


def _tie(head: nn.Module, source: nn.Module) -> None:
    """Let the head read the embedding's tensors, or copies of them where it lives on another device."""
    assert isinstance(head, QuantLinear) and isinstance(source, QuantEmbedding)
    q = source.quantized()
    device = head.get_buffer("qweight").device
    if device == q.tensors["qweight"].device or device.type == "meta":
        tie_quantized(head, source)
    else:
        head.set_quantized(type(q)(q.spec, q.shape, {n: t.to(device) for n, t in q.tensors.items()}))


def _locate(specs: Mapping[str, QuantSpec], model: PreTrainedModel) -> dict[str, tuple[str, QuantSpec]]:
    """Path in the model -> (path in the folder, spec): a base model's paths lack the prefix of the others.

    Heads that this class does not have are left out, as transformers leaves out their weights.

    Raises:
        CheckpointError: the folder quantizes a module of the body that the model does not have.
    """
    targets = {target.path for target in find_targets(model)}
    prefix = f"{model.base_model_prefix}."
    out = {}
    for path, spec in specs.items():
        options = (path, path.removeprefix(prefix), prefix + path)
        found = next((option for option in options if option in targets), None)
        if found is not None:
            out[found] = (path, spec)
        elif path.startswith(prefix) or "." in path:
            raise CheckpointError(
                f"config.json quantizes {path}, but {type(model).__name__} has no Linear or Embedding "
                "by that name: the folder belongs to another kind of model"
            )
    return out


def _check_files(
    files: list[str] | None,
    stored: Mapping[str, tuple[str, QuantSpec]],
    model: PreTrainedModel,
    tied: set[str],
) -> None:
    """Hold the tensors of quantized modules against their specs: transformers would fill gaps with noise."""
    found: dict[str, tuple[str, Entry]] = {}
    file = ""
    for file in files or []:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(f"{file}: quantized folders are read from safetensors only")
        with Path(file).open("rb") as opened:
            found.update((name, (str(file), entry)) for name, entry in read_header(opened, str(file)).items())
    if not found:
        raise CheckpointError("a quantized model is loaded from a folder or hub name, not from a state dict")
    for path, (name, spec) in stored.items():
        module = model.get_submodule(path)
        n, k = module.weight.shape  # type: ignore[misc, union-attr]
        expected = {} if path in tied else layout(spec, (n, k))
        for leaf, (dtype, shape) in expected.items():
            if f"{name}.{leaf}" not in found:
                raise CheckpointError(f"{Path(file).parent}: the tensor {name}.{leaf} is missing")
            where, entry = found[f"{name}.{leaf}"]
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise CheckpointError(
                    f"{where}: {name}.{leaf} is {entry.dtype} {list(entry.shape)}, but config.json asks for "
                    f"{dtype} {list(shape)}"
                )
        left = found.get(f"{name}.weight")
        if left is not None and not is_guard(left[1].dtype, left[1].shape):
            raise CheckpointError(f"{left[0]}: {name}.weight is there, but config.json has it quantized")
