"""What is wrong with a checkpoint, ours or another library's, module by module.

The readers are strict already; what they refuse becomes a finding. Beyond that the numbers are looked at: scales,
zero points against what their label makes of them, codes, g_idx, what is not quantized, and, where the source is at
hand, every weight against its original.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...quant.config import QuantSpec
from ...quant.formats import FORMATS
from ...quant.integer import IntegerFormat
from ...quant.interop.gptq import permutes
from ...quant.minimum import MinimumFormat
from ...quant.tensor import QuantizedTensor
from ..reader import CheckpointReader
from ..safetensors_header import CheckpointError
from ..skeleton import UNFIT, check_depth, check_labels
from .reader import ForeignReader, open_checkpoint, quantized, shape_of, specs_of

Progress = Callable[[str, int, int], None]

# ||W - Q||^2 / ||W||^2 that rounding to so many bits does not exceed: several times what was seen of real models
_WORST = {8: 2e-3, 4: 6e-2, 3: 0.25, 2: 0.9}
# so much worse than the median of the modules of its kind is damage, not rounding
_BEYOND_MEDIAN = 8.0
# a scale so far from the median of its module is a flipped bit of an exponent
_OUTLIER = 1000.0
# distance of the mean zero point from the middle of the grid; a wrong version label makes it 1
_ZERO_SHIFT = 0.5
_ENOUGH_ZEROS = 64
# fewer weights in a group can be equal by chance
_ENOUGH_CODES = 16
_ROWS = 1 << 10
# last names of the tensors of a module, in any format
_LEAVES = {
    *("qweight", "qzeros", "scales", "zeros", "g_idx", "scales_absmax", "scales_offset", "minimums"),
    *("weight", "bias", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state"),
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    *("SCB", "weight_format"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: the module or tensor (or "the folder"), and what about it."""

    module: str
    what: str

    def __str__(self) -> str:
        return f"{self.module}: {self.what}"


@dataclass
class Examination:
    """All findings, the number of modules looked at, and path -> squared relative error against the source."""

    findings: list[Finding] = field(default_factory=list)
    modules: int = 0
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        return not self.findings

    def add(self, module: str, what: str) -> None:
        self.findings.append(Finding(module, what))


def examine(source: Path, against: Path | None = None, progress: Progress | None = None) -> Examination:
    """Look at everything in a checkpoint.

    Args:
        source: a folder of any format that is read here, or a GGUF file.
        against: the checkpoint it was made from.
        progress: called with (path, done, total) after every module.
    """
    out = Examination()
    try:
        reader = open_checkpoint(source)
        specs = {p: s for p, s in specs_of(reader).items() if f"{p}.qweight" in reader.names}
    except CheckpointError as error:
        out.add(*_located(error))
        return out
    original = None
    if against is not None:
        original = open_checkpoint(against)  # its damage is not this folder's: the error goes up
    _check_model(reader, specs, out)
    kept = [n for n in reader.names if n.rpartition(".")[0] not in specs or n.endswith(".bias")]
    total = len(specs) + len(kept)
    for done, (path, spec) in enumerate(specs.items(), 1):
        out.modules += 1
        try:
            q = quantized(reader, path, spec)
        except CheckpointError as error:
            out.add(path, str(error))
            continue
        for what in _wrong_with(q):
            out.add(path, what)
        if original is not None:
            _compare(reader, original, path, q, out)
        if progress is not None:
            progress(path, done, total)
    for done, name in enumerate(kept, len(specs) + 1):
        _check_kept(reader, original, name, out)
        if progress is not None:
            progress(name, done, total)
    if isinstance(reader, ForeignReader):
        _check_order_label(reader, out)
    _check_errors(specs, out)
    return out


def _located(error: CheckpointError) -> tuple[str, str]:
    """Which module a reader's complaint is about, as far as it names one."""
    text = str(error)
    found = re.search(r"\b((?:model\.|transformer\.)?(?:layers|h|blk)\.\d+(?:\.[A-Za-z_]\w*)+)", text)
    if found is None:
        return "the folder", text
    parts = found[1].split(".")
    while parts[-1] in _LEAVES or parts[-1].startswith("bitsandbytes__"):
        parts.pop()
    return ".".join(parts), text


def _check_model(reader: CheckpointReader, specs: dict[str, QuantSpec], out: Examination) -> None:
    """Names and shapes against the model that config.json describes."""
    try:
        check_depth(reader)
        check_labels(reader.config, "config.json")
        wanted, tied = _expected(reader.config)
    except (CheckpointError, *UNFIT, RuntimeError, ImportError) as error:
        out.add("config.json", f"describes no model that these tensors are of: {error}")
        return
    found: dict[str, tuple[int, ...]] = {}
    for name in reader.names:
        path, _, leaf = name.rpartition(".")
        if path not in specs or leaf == "bias":
            found[name] = reader.info(name)[1]
    for path, spec in specs.items():
        try:
            found[f"{path}.weight"] = shape_of(reader, path, spec)
        except CheckpointError:  # said again, and reported, when the module is read
            wanted.pop(f"{path}.weight", None)
    for name in sorted(set(wanted) | set(found)):
        path = name.removesuffix(".weight")
        if name in tied and name not in found:
            continue
        if name not in found:
            out.add(path, "the model of config.json has it, the folder does not")
        elif name not in wanted:
            out.add(path, "the folder has it, the model of config.json does not")
        elif wanted[name] != found[name]:
            out.add(path, f"is {list(found[name])}, config.json asks for {list(wanted[name])}")


def _expected(config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Name -> shape of every tensor of the model, and the names of those that are tied to others."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map", "model_type")}
    parsed = AutoConfig.for_model(config["model_type"], **plain)
    names = config.get("architectures") or []
    with torch.device("meta"):
        known = getattr(transformers, str(names[0]), None) if names else None
        if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
            model = known(parsed)
        else:
            model = AutoModelForCausalLM.from_config(parsed, trust_remote_code=False)
    tied = set(model.get_expanded_tied_weights_keys(all_submodels=True))
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}, tied


def _wrong_with(q: QuantizedTensor) -> Iterator[str]:
    params = q.params()
    scale = params.scale
    bad = int((~scale.isfinite()).sum())
    if bad:
        yield f"{bad} scales are NaN or infinite"
        return
    fmt = FORMATS[q.spec.format]
    if not isinstance(fmt, IntegerFormat) and not q.spec.double_quant and bool((scale < 0).any()):
        yield f"{int((scale < 0).sum())} absmax are negative"
    median = float(scale[scale != 0].abs().median()) if bool((scale != 0).any()) else 0.0
    far = int((scale.abs() > _OUTLIER * median).sum()) if median else 0
    if far:
        yield f"{far} scales are more than {_OUTLIER:g} times the median, up to {float(scale.abs().max()):.3g}"
    zero = params.zero
    if zero is not None and isinstance(fmt, IntegerFormat) and zero.numel() >= _ENOUGH_ZEROS:
        shift = float(zero.float().mean()) - fmt.top / 2
        # zero points that are all one are a symmetric grid, written as an asymmetric one
        if abs(shift) > _ZERO_SHIFT and not bool((zero == fmt.middle).all()):
            yield (
                f"its zero points lie {shift:+.2f} from the middle of the grid on average: they are stored as "
                "another version's (zero minus one), or belong to other codes"
            )
    if params.g_idx is not None:
        counts = torch.bincount(params.g_idx.long(), minlength=scale.shape[1])
        if counts.numel() != scale.shape[1] or bool((counts != q.shape[1] // scale.shape[1]).any()):
            yield f"g_idx gives its groups {int(counts.min())} to {int(counts.max())} channels each"
            return
    yield from _wrong_codes(q, scale)


def _wrong_codes(q: QuantizedTensor, scale: Tensor) -> Iterator[str]:
    """Groups of equal codes: a scale of zero may have them at zero, a stretch of lost bytes has them anywhere."""
    codes, params = q.codes(), q.params()
    if params.g_idx is not None:
        codes = codes[:, torch.argsort(params.g_idx.long(), stable=True)]
    grouped = codes.unflatten(1, (scale.shape[1], -1))
    low, high = grouped.aminmax(dim=2)
    same = low == high
    lost = int(((scale == 0) & ~same).sum())
    if lost:
        yield f"{lost} scales are 0, but their codes are not those of zeros"
    if grouped.shape[2] < _ENOUGH_CODES:
        return
    fmt = FORMATS[q.spec.format]
    zero = None if params.zero is None else params.zero
    unit = scale if isinstance(fmt, MinimumFormat) else torch.ones((), dtype=torch.float32)
    value = fmt.decode(low, unit, zero)
    constant = int((same & (value != 0) & (scale != 0)).sum())
    if constant:
        yield f"in {constant} groups all {grouped.shape[2]} codes are the same: bytes were lost"


def _check_kept(
    reader: CheckpointReader, original: CheckpointReader | None, name: str, out: Examination
) -> None:
    path = name.removesuffix(".weight")
    try:
        tensor = reader.tensor(name)
    except CheckpointError as error:
        out.add(path, str(error))
        return
    if not tensor.is_floating_point():
        out.add(path, f"is {tensor.dtype}, expected floats")
        return
    if bad := int((~tensor.isfinite()).sum()):
        out.add(path, f"{bad} values are NaN or infinite")
        return
    if tensor.numel() and not bool(tensor.any()) and not name.endswith(".bias"):
        out.add(path, "is all zeros")
    if original is not None and name in original.names:
        source = original.tensor(name)
        if source.shape != tensor.shape:
            out.add(path, f"is {list(tensor.shape)}, in the source {list(source.shape)}")
        elif not torch.equal(source.to(tensor.dtype), tensor):
            lost = _relative(source.float(), tensor.float())
            if lost > torch.finfo(tensor.dtype).eps ** 2:
                out.add(path, f"is not quantized and yet differs from the source, by {lost:.2e} (squared)")


def _compare(
    reader: CheckpointReader, original: CheckpointReader, path: str, q: QuantizedTensor, out: Examination
) -> None:
    source_specs = specs_of(original)
    if f"{path}.qweight" in original.names:
        source = quantized(original, path, source_specs[path]).dequantize(torch.float32)
    elif f"{path}.weight" in original.names:
        source = original.tensor(f"{path}.weight").float()
    else:
        out.add(path, "the source has no such weight")
        return
    if tuple(source.shape) != q.shape:
        out.add(path, f"is {list(q.shape)}, in the source {list(source.shape)}")
        return
    out.errors[path] = _relative(source, q.dequantize(torch.float32))


def _check_errors(specs: dict[str, QuantSpec], out: Examination) -> None:
    """Each module's error against what its bits allow, and against the other modules of its kind."""
    by_format: dict[str, list[float]] = {}
    for path, error in out.errors.items():
        by_format.setdefault(specs[path].format, []).append(error)
    for path, error in out.errors.items():
        format = specs[path].format
        worst = _WORST[FORMATS[format].bits]
        median = float(torch.tensor(by_format[format]).median())
        beyond = len(by_format[format]) >= 4 and error > _BEYOND_MEDIAN * median and error > worst / 10
        if not error <= worst or beyond:
            out.add(
                path,
                f"differs from the source by {error:.2e} (squared, of its norm); {format} makes {median:.1e} "
                f"of the others, at most {worst:g}",
            )


def _check_order_label(reader: ForeignReader, out: Examination) -> None:
    entry = reader.foreign or {}
    if entry.get("quant_method") != "gptq" or entry.get("desc_act") is not False:
        return
    for path, stored in reader.stored.items():
        if stored.spec is not None and permutes(stored.spec):
            out.add(path, "desc_act is false, but its g_idx is not k // group_size")


def _relative(source: Tensor, other: Tensor) -> float:
    """||W - Q||^2 / ||W||^2, summed over pieces of rows."""
    error = norm = 0.0
    for start in range(0, max(1, source.shape[0]), _ROWS):
        w, q = source[start : start + _ROWS], other[start : start + _ROWS]
        error += float((w - q).double().square().sum())
        norm += float(w.double().square().sum())
    return error / norm if norm else float(error > 0)
