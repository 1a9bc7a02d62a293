"""Memory, byte by byte: what a checkpoint will take, what it takes, and what a process took.

The ledger lists every tensor with its place in the model and what it is for. It is predicted from the
configurations of model and quantization before anything runs, and read back from the headers of the files on
disk; the two must agree to the byte.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..model.foreign.reader import open_checkpoint
from ..quant.apply import find_targets, resolve
from ..quant.config import QuantConfig, QuantSpec
from ..quant.tensor import layout

# what a stored tensor is for, by the last part of its name
KINDS = {
    "qweight": "codes",
    "scales": "scales",
    "scales_absmax": "double_quant",
    "scales_offset": "double_quant",
    "zeros": "zeros",
    "minimums": "zeros",
    "g_idx": "order",
    "weight": "kept",
    "bias": "kept",
}
PARTS = ("linear", "embedding", "head", "norm")
GIB = 1 << 30


class LedgerError(ValueError):
    """Tensors that no ledger knows, or a prediction that the files contradict."""


@dataclass(frozen=True)
class Entry:
    """One stored tensor: ``kind`` is a value of :data:`KINDS`, ``part`` one of :data:`PARTS`."""

    name: str
    part: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Ledger:
    """All stored tensors of a model.

    Attributes:
        entries: in the model's order. A tied head is stored once, as the embedding.
        parameters: weights of the model before quantization, a tied one counted once.
        quantized_parameters: those of them that are stored as codes.

    Codebooks are no entries: the 16 numbers of NF4 and FP4 are constants of the code and are stored nowhere.
    """

    entries: tuple[Entry, ...]
    parameters: int
    quantized_parameters: int

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Of the whole model: every stored bit (scales, zeros, embedding, head, norms) over every weight."""
        return 8 * self.nbytes / self.parameters

    @property
    def bits_per_quantized_weight(self) -> float | None:
        """Codes, scales, zeros and order over the weights that became codes; None where none did."""
        if not self.quantized_parameters:
            return None
        return 8 * sum(e.nbytes for e in self.entries if e.kind != "kept") / self.quantized_parameters

    def by_kind(self) -> dict[str, int]:
        """Bytes of codes, scales, double_quant, zeros, order and kept tensors."""
        totals = dict.fromkeys(KINDS.values(), 0)
        for entry in self.entries:
            totals[entry.kind] += entry.nbytes
        return totals

    def by_part(self) -> dict[str, int]:
        """Bytes of the linear layers, the embedding, the head and the norms."""
        totals = dict.fromkeys(PARTS, 0)
        for entry in self.entries:
            totals[entry.part] += entry.nbytes
        return totals

    def to_dict(self) -> dict[str, Any]:
        return {
            "bytes": self.nbytes,
            "by_kind": self.by_kind(),
            "by_part": self.by_part(),
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_quantized_weight": self.bits_per_quantized_weight,
        }


def predict_ledger(
    model_config: Any,
    quant_config: QuantConfig | Mapping[str, QuantSpec] | None,
    dtype: torch.dtype | None = None,
) -> Ledger:
    """The ledger of a model that does not exist yet.

    Args:
        model_config: a ``MistralConfig``.
        quant_config: rules; or resolved specs by module path, as a checkpoint's config.json holds; or None.
        dtype: of what is kept; None is the model configuration's own.

    Raises:
        ConfigError: the rules do not fit the model, see :func:`brise.quant.apply.resolve`.
        LedgerError: neither ``dtype`` nor ``model_config.dtype`` says what the kept weights are stored in.
    """
    model = _skeleton(model_config)
    kept = dtype or _dtype_of(model_config)
    specs = _specs(model, quant_config)
    entries: list[Entry] = []
    parameters = quantized = 0
    for path, name, parameter in _weights(model):
        parameters += parameter.numel()
        shape = tuple(parameter.shape)
        spec = specs.get(path) if name == "weight" else None
        if spec is None:
            entries.append(_entry(f"{path}.{name}", kept, shape))
            continue
        quantized += parameter.numel()
        for part, (stored, size) in layout(spec, (shape[0], shape[1])).items():
            entries.append(_entry(f"{path}.{part}", stored, size))
    return Ledger(tuple(entries), parameters, quantized)


def ledger_of_checkpoint(folder: str | Path) -> Ledger:
    """The ledger of a checkpoint on disk, from the headers of its safetensors files; no tensor is read.

    What another library wrote is counted as it is once it is read here, in our layout.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        LedgerError: another architecture, or a tensor of a name that is not known here.
    """
    from transformers import MistralConfig

    reader = open_checkpoint(Path(folder))
    data = {key: value for key, value in reader.config.items() if key != "quantization_config"}
    if data.get("model_type") != "mistral":
        raise LedgerError(f"expected a checkpoint of model_type mistral, got {data.get('model_type')!r}")
    stored = [_entry(name, *reader.info(name)) for name in reader.names]
    weights = {f"{path}.{name}": p for path, name, p in _weights(_skeleton(MistralConfig.from_dict(data)))}
    coded = {_path(entry) for entry in stored if entry.kind == "codes"}
    quantized = sum(p.numel() for name, p in weights.items() if name.removesuffix(".weight") in coded)
    order = {name.rpartition(".")[0]: i for i, name in enumerate(weights)}
    entries = sorted(stored, key=lambda entry: order.get(_path(entry), len(order)))
    return Ledger(tuple(entries), sum(p.numel() for p in weights.values()), quantized)


def check_ledger(predicted: Ledger, found: Ledger) -> None:
    """Raise LedgerError where the prediction and the files differ in a tensor's presence, dtype or shape."""
    left = {e.name: (e.dtype, e.shape) for e in predicted.entries}
    right = {e.name: (e.dtype, e.shape) for e in found.entries}
    wrong = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    if wrong:
        name = wrong[0]
        raise LedgerError(
            f"{len(wrong)} tensors are not as the configuration predicts, the first {name}: expected "
            f"{left.get(name, 'none')}, found {right.get(name, 'none')}"
        )


def kv_cache_bytes(
    model_config: Any, length: int, *, batch: int = 1, dtype: torch.dtype | None = None
) -> int:
    """Bytes of the keys and values of ``length`` positions; no more than the window's where there is one.

    2 x layers x batch x KV heads x head width x min(length, window) x bytes of ``dtype`` (None: the model's).
    """
    window = getattr(model_config, "sliding_window", None)
    held = length if window is None else min(length, window)
    width = (
        getattr(model_config, "head_dim", None)
        or model_config.hidden_size // model_config.num_attention_heads
    )
    item = (dtype or _dtype_of(model_config)).itemsize
    return 2 * model_config.num_hidden_layers * batch * model_config.num_key_value_heads * width * held * item


def kv_cache_grid(
    model_config: Any, contexts: Iterable[int], windows: Iterable[int | None]
) -> list[dict[str, int | None]]:
    """Bytes of the cache of one text of each context under each sliding window; None is the configuration's own."""
    own, grid = model_config.sliding_window, list(windows)
    out: list[dict[str, int | None]] = []
    for context in contexts:
        for window in grid:
            like = copy.copy(model_config)
            like.sliding_window = window if window is not None else own
            out.append({"context": context, "window": window, "bytes": kv_cache_bytes(like, context)})
    return out


def loaded_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers in memory, a shared one counted once.

    By the tensors and not by their storages: weights that are maps of a file share the file's.
    """
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return sum(sizes.values())


def reset_peak() -> bool:
    """Let :func:`process_peak` begin anew at what the process holds now; False where that cannot be.

    Linux only, through /proc/self/clear_refs; without it the peak is that of the whole process.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def process_peak() -> int | None:
    """The most bytes of main memory the process has held (VmHWM), None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0][1]) * 1024 if lines else None


def gpu_peak(device: torch.device) -> int | None:
    """The most bytes of GPU memory held in tensors, None on a device that is no CUDA GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _dtype_of(config: Any) -> torch.dtype:
    """The dtype in a model's config, which transformers keeps now as a dtype, now by name."""
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype):
        raise LedgerError(f"expected a dtype in the model's config, got {dtype!r}; name one")
    return dtype


def _skeleton(config: Any) -> nn.Module:
    """The model without memory for its weights."""
    from ..model.mistral import MistralForCausalLM

    with torch.device("meta"):
        return MistralForCausalLM(config)


def _weights(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(module path, name, parameter), a tied one once, at its first place."""
    for full, parameter in model.named_parameters(remove_duplicate=True):
        path, _, name = full.rpartition(".")
        yield path, name, parameter


def _specs(
    model: nn.Module, config: QuantConfig | Mapping[str, QuantSpec] | None
) -> Mapping[str, QuantSpec | None]:
    if config is None:
        return {}
    if isinstance(config, QuantConfig):
        return {path: spec for path, (spec, _) in resolve(config, find_targets(model)).items()}
    return config


def _path(entry: Entry) -> str:
    return entry.name.rpartition(".")[0]


def _entry(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Entry:
    path, _, suffix = name.rpartition(".")
    if suffix not in KINDS:
        raise LedgerError(f"the tensor {name} has no place in the ledger; known endings: {', '.join(KINDS)}")
    if path.endswith("embed_tokens"):
        part = "embedding"
    elif path in ("lm_head", "score", "qa_outputs"):
        part = "head"
    else:
        part = "norm" if path.endswith("norm") else "linear"
    return Entry(name, part, KINDS[suffix], dtype, shape)


def human_bytes(n: int) -> str:
    """Decimal and binary: ``"134.5 MB (128.3 MiB)"``."""
    for decimal, binary, names in ((10**9, GIB, ("GB", "GiB")), (10**6, 1 << 20, ("MB", "MiB"))):
        if n >= decimal:
            return f"{n / decimal:.3g} {names[0]} ({n / binary:.3g} {names[1]})"
    return f"{n} B"


def ledger_of_tensors(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], parameters: int, quantized_parameters: int
) -> Ledger:
    """The ledger of tensors (name, dtype, shape) that are to be written.

    Raises:
        LedgerError: a tensor of a name that is not known here.
    """
    entries = tuple(_entry(name, dtype, shape) for name, dtype, shape in tensors)
    return Ledger(entries, parameters, quantized_parameters)
