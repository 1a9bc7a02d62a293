"""Quantize a checkpoint block by block: read, quantize, write, free. The whole model is never in memory.

Blocks are read from the memory-mapped shards in the order in which they run. Plain algorithms read each tensor
once and see no data; under calibration the hidden states of all windows travel along, and each block is run once
(:mod:`.sequential`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..quant.apply import Outcome, Report, Target, find_targets, measure, quantize_weight, resolve
from ..quant.calibrate import HessianAccumulator
from ..quant.config import ConfigError, QuantConfig, QuantSpec
from ..quant.tensor import QuantizedTensor
from .quantization_entry import quantization_entry
from .reader import CheckpointReader
from .rope import MistralRotaryEmbedding
from .sequential import Activations, Specs, quantize_block, quantize_under
from .skeleton import check_depth, check_tensors, empty_model
from .walk import WalkContext, walk_context
from .writer import CheckpointWriter

Progress = Callable[[str, int, int], None]
REPORT = "quantization_report.json"


def quantize_checkpoint(
    src: Path,
    out: Path,
    config: QuantConfig,
    *,
    calibration: Tensor | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize the checkpoint in folder ``src`` into a new folder ``out``, which appears only when it is whole.

    Args:
        config: the rules; every module they leave out is copied as it is.
        calibration: token ids int64 [windows, length], needed where ``config.needs_calibration``.
        overwrite: replace ``out`` if it is there.
        progress: called with (what, done, total) after every block.

    Returns:
        What became of every module; also written to ``out`` as ``quantization_report.json``.

    Raises:
        ConfigError: the rules do not fit the model, or calibration data is missing.
        CheckpointError: ``src`` cannot be read, is quantized already, or ``out`` is there and is to stay.
        ValueError: token ids outside the vocabulary, a weight that is not finite, a Hessian that has no factor.
    """
    return _Job(src, out, config, calibration, progress or (lambda *_: None)).run(overwrite)


class _Job:
    """One run of :func:`quantize_checkpoint`: where tensors come from and go to, and what was done so far."""

    def __init__(
        self, src: Path, out: Path, config: QuantConfig, calibration: Tensor | None, progress: Progress
    ) -> None:
        self.reader = CheckpointReader(src)
        if "quantization_config" in self.reader.config:
            raise ConfigError(f"{src} is quantized already: quantize the checkpoint that it was made from")
        self.out = out
        self.config = config
        self.progress = progress
        check_depth(self.reader)
        self.model = empty_model(self.reader.config, str(src / "config.json"), attn_implementation="sdpa")
        ties = self.model.get_expanded_tied_weights_keys(all_submodels=True)
        check_tensors(self.reader, self.model, None, {k.removesuffix(".weight"): v for k, v in ties.items()})
        self.targets = {target.path: target for target in find_targets(self.model)}
        self.specs: Specs = resolve(config, self.targets.values())
        self.left = set(self.reader.names)
        self.outcomes: dict[str, Outcome] = {}
        self.blocks = _blocks(self.model)
        self.calibrated = [
            p for p, (spec, _) in self.specs.items() if spec is not None and spec.needs_hessian
        ]
        self.context: WalkContext | None = None
        self.calibration = self._check_calibration(calibration) if self.calibrated else None

    def run(self, overwrite: bool) -> Report:
        with CheckpointWriter(self.out, overwrite=overwrite) as self.writer, torch.no_grad():
            total = len(self.blocks) + 2
            activations = self._embed()
            self.progress("embedding", 1, total)
            for index, (path, layer) in enumerate(self.blocks):
                activations = self._block(index, path, layer, activations)
                self.progress(path, index + 2, total)
            self._rest(activations)
            self.progress("head", total, total)
            report = Report([self._outcome(t) for t in self.targets.values()])
            self.writer.finish(
                {**self.reader.config, "quantization_config": quantization_entry(self.config, self.specs)},
                copy_from=self.reader.folder,
                extra_files={REPORT: json.dumps(report.to_dict(), indent=1) + "\n"},
            )
        return report

    def _check_calibration(self, ids: Tensor | None) -> Tensor:
        names = ", ".join(self.calibrated[:3])
        if ids is None:
            raise ConfigError(
                f"{names} and {len(self.calibrated) - 1} more need calibration data: pass token ids"
            )
        unknown = [p for p in self.calibrated if not self._has_inputs(p)]
        if unknown:
            raise ConfigError(
                f"no calibration inputs are gathered for {', '.join(unknown)}: give a rule with rtn"
            )
        vocabulary = self.reader.config["vocab_size"]
        if ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            raise ValueError(
                f"calibration must be int64 [windows, length], got {ids.dtype} {list(ids.shape)}"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise ValueError(
                f"calibration ids must be 0..{vocabulary - 1}, got {int(ids.min())}..{int(ids.max())}: "
                "they come from another tokenizer"
            )
        return ids

    def _has_inputs(self, path: str) -> bool:
        return path == "lm_head" or any(path.startswith(block + ".") for block, _ in self.blocks)

    def _read(self, name: str) -> Tensor:
        self.left.discard(name)
        return self.reader.tensor(name)

    def _write(self, path: str, q: QuantizedTensor, outcome: Outcome) -> None:
        self.left.discard(f"{path}.weight")
        for name, tensor in q.tensors.items():
            self.writer.add(f"{path}.{name}", tensor)
        self.outcomes[path] = outcome

    def _copy(self, names: list[str]) -> None:
        for name in names:
            self.writer.add(name, self._read(name))

    def _plain(self, path: str) -> QuantizedTensor:
        """Quantize a weight that needs no calibration, straight from its shard."""
        spec, reason = self.specs[path]
        assert spec is not None
        weight = self._read(f"{path}.weight")
        q = quantize_weight(path, weight, spec)
        self._write(path, q, measure(path, weight, q, reason))
        return q

    def _embed(self) -> Activations | None:
        """Write the embedding; under calibration return the windows' hidden states in front of the first block."""
        path = next((p for p, t in self.targets.items() if t.kind == "embedding"), None)
        if path is None:
            return None
        q = self._plain(path) if self.specs[path][0] is not None else None
        if q is None:
            self._copy([f"{path}.weight"])
        if self.calibration is None:
            return None
        source = self.reader.tensor(f"{path}.weight")
        full = nn.functional.embedding(self.calibration, source).to(torch.float32)
        hidden = full
        if q is not None:
            hidden = nn.functional.embedding(self.calibration, q.dequantize(torch.float32))
        wants_full = self.config.calibration.target == "full"
        return Activations(hidden, full.clone() if wants_full else None)

    def _block(
        self, index: int, path: str, layer: nn.Module, activations: Activations | None
    ) -> Activations | None:
        names = [n for n in self.reader.names if n.startswith(path + ".")]
        quantized = [p for p in self.targets if p.startswith(path + ".") and self.specs[p][0] is not None]
        if activations is None or not self._needed_from(index):
            for p in quantized:
                self._plain(p)
            self._copy([n for n in names if n in self.left])
            return None
        _fill(layer, {n[len(path) + 1 :]: self._read(n).to(torch.float32) for n in names})
        if self.context is None:
            rotary = MistralRotaryEmbedding(self.model.config)  # type: ignore[arg-type]
            self.context = walk_context(rotary.config, rotary, activations.hidden.shape[1], torch.float32)
        done = quantize_block(
            layer,  # type: ignore[arg-type]
            self.specs,
            activations,
            self.context,
            self.config.calibration,
            path,
        )
        for p, result in done.items():
            self._write(p, result.tensor, result.outcome)
        self._copy([n for n in names if n.removesuffix(".weight") not in done])
        layer.to("meta")
        return activations

    def _needed_from(self, index: int) -> bool:
        """Whether anything from block ``index`` on is quantized under calibration."""
        later = [path for path, _ in self.blocks[index:]]
        return any(p == "lm_head" or any(p.startswith(b + ".") for b in later) for p in self.calibrated)

    def _rest(self, activations: Activations | None) -> None:
        """The final norm, the head, and whatever else the checkpoint holds."""
        for path, (spec, reason) in self.specs.items():
            if spec is None or path in self.outcomes or self.targets[path].tied_to is not None:
                continue
            if not spec.needs_hessian:
                self._plain(path)
                continue
            assert activations is not None
            self._head(path, spec, reason, activations)
        self._copy(sorted(self.left))

    def _head(self, path: str, spec: QuantSpec, reason: str, activations: Activations) -> None:
        norm = self.model.get_submodule("model.norm")
        _fill(norm, {"weight": self.reader.tensor("model.norm.weight").to(torch.float32)})
        accumulator = HessianAccumulator(activations.hidden.shape[-1], cross=activations.full is not None)
        for i in range(activations.hidden.shape[0]):
            full = None if activations.full is None else norm(activations.full[i])
            accumulator.add(norm(activations.hidden[i]), full)
        weight = self._read(f"{path}.weight").to(torch.float32)
        (result,) = quantize_under([path], [weight], spec, reason, accumulator)
        self._write(path, result.tensor, result.outcome)

    def _outcome(self, target: Target) -> Outcome:
        spec, reason = self.specs[target.path]
        if target.path in self.outcomes:
            return self.outcomes[target.path]
        # tied: the owner's tensors serve, so no bytes of its own
        return Outcome(target.path, target.shape, spec, reason, 0 if spec is not None else None)


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks with their paths, in the order in which they run."""
    layers = next(((p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList)), None)
    if layers is None:
        raise ConfigError(f"{type(model).__name__} has no list of decoder blocks")
    path, modules = layers
    return [(f"{path}.{i}", block) for i, block in enumerate(modules)]


def _fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a module on the meta device its parameters; they must be exactly these."""
    module.load_state_dict(tensors, strict=True, assign=True)
