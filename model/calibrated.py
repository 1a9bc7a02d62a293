"""Steps under calibration: the windows' hidden states go through the model as it is quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..quant.apply import Target
from ..quant.calibrate import HessianAccumulator
from ..quant.config import Calibration, ConfigError
from ..quant.dequantize import decode_packed
from ..quant.tensor import Params, QuantizedTensor, layout
from .activations import MODES, InFiles, InMemory, Store
from .device_copy import pieces_on
from .group import Group, share
from .job_plan import Step, blocks_of
from .plain import PlainSteps, Resolved, StepResult
from .rope import MistralRotaryEmbedding
from .sequential import Activations, quantize_block, replay_block
from .shards import ShardFiles
from .solve import Setting, quantize_under, reduce
from .source import Source, whole
from .trouble import Policy, in_words, look_at
from .walk import STAGES, WalkContext, walk_context

# rows of the embedding that are looked at at once
_ROWS = 4096


def check_calibration(ids: Tensor | None, needy: list[str], steps: list[Step], vocabulary: int) -> Tensor:
    """The windows, after a look at them and at the modules that need them.

    Raises:
        ConfigError: there are none, or a module has no inputs that could be gathered.
        ValueError: not int64 [windows, length], or ids that are no tokens of the model.
    """
    if ids is None:
        raise ConfigError(
            f"{', '.join(needy[:3])} and {len(needy) - 1} more need calibration data: pass token ids"
        )
    in_blocks = {path for step in steps[1:-1] for path in step.targets}
    if unknown := [path for path in needy if path not in in_blocks and path != "lm_head"]:
        raise ConfigError(
            f"no calibration inputs are gathered for {', '.join(unknown)}: give a rule with rtn"
        )
    if ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
        raise ValueError(f"calibration must be int64 [windows, length], got {ids.dtype} {list(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(
            f"calibration ids must be 0..{vocabulary - 1}, got {int(ids.min())}..{int(ids.max())}: "
            "they come from another tokenizer"
        )
    return ids


class CalibratedSteps(PlainSteps):
    """Computes steps of which each needs the one before it; processes share the windows out.

    Hidden states stay where ``memory`` says: on another device than the CPU they go there window by window.

    Args:
        ids: all windows, int64 [windows, length]. memory: ``memory`` or ``file``.
    """

    shared_out = False

    def __init__(
        self,
        source: Source,
        model: nn.Module,
        targets: Mapping[str, Target],
        resolved: Resolved,
        policy: Policy,
        device: torch.device,
        group: Group,
        calibration: Calibration,
        ids: Tensor,
        memory: str,
    ) -> None:
        super().__init__(source, targets, resolved, policy, device)
        if memory not in MODES:
            raise ConfigError(f"memory must be {' or '.join(MODES)}, got {memory!r}")
        self.model = model
        self.layers = dict(blocks_of(model))
        self.group = group
        self.calibration = calibration
        self.ids = ids[list(share(len(ids), group))]
        self.memory = memory
        self.setting = Setting(resolved, policy, group, calibration.true_sequential)
        self.activations: Activations | None = None
        self.context: WalkContext | None = None
        blocks = list(self.layers)
        needy = [p for p, (spec, _) in resolved.items() if spec is not None and spec.needs_hessian]
        # the last step that anything is calibrated in; behind it the hidden states are not needed
        self.last = max(
            len(blocks) + 1
            if path == "lm_head"
            else next(i for i, b in enumerate(blocks, 1) if path.startswith(b + "."))
            for path in needy
        )

    def resume(self, folder: Path, shards: ShardFiles, done: list[Step]) -> None:
        """Bring the hidden states to where the finished steps left them: from their file, or by running them again."""
        self.shards = shards
        self.store: Store = InMemory()
        if self.memory == "file":
            width = self.targets["model.embed_tokens"].shape[1]
            shape = (self.ids.shape[0], self.ids.shape[1], width)
            self.store = InFiles(folder, shape, self.calibration.target == "full", self.group.rank)
        behind = len(done)
        if not behind or behind > self.last:
            return
        self.activations = self.store.load(behind)
        if self.activations is not None:
            return
        self.activations = self.store.put(1, self._embedded(self._stored("model.embed_tokens")))
        for number, step in enumerate(done[1:], 2):
            self.activations = self.store.work_on(number, self.activations)
            layer = self._layer(step)
            replay_block(
                layer,  # type: ignore[arg-type]
                partial(self._load, step),
                partial(self._decoded, step),
                self.activations,
                self._walk(),
            )
            layer.to("meta")
            self.store.forget_before(number)

    def compute(self, step: Step, index: int) -> StepResult:
        if step.name == "embedding":
            return self._embedding(step, index)
        if index > self.last or self.activations is None:
            self.activations = None
            return super().compute(step, index)
        if step.name == "head":
            return self._head(step)
        return self._block(step, index)

    def sync(self, index: int) -> None:
        if index < self.last:
            self.store.sync(index + 1)

    def on_record(self, index: int) -> None:
        self.store.forget_before(index + 1)

    def _embedding(self, step: Step, index: int) -> StepResult:
        result = StepResult()
        q = None
        for path in step.targets:
            if self.resolved[path][0] is not None:
                with pieces_on(self.device) as workers:
                    done = self.round(path, workers)
                result.add(path, done, self.resolved[path][0])
                q = done.tensor
        self.activations = self.store.put(index + 1, self._embedded(q))
        return result

    def _embedded(self, q: QuantizedTensor | None) -> Activations:
        """The windows in front of the first block; ``q`` is the embedding where it is quantized."""
        tokens, where = torch.unique(self.ids, return_inverse=True)
        name = "model.embed_tokens.weight"
        table = torch.empty(len(tokens), self.targets["model.embed_tokens"].shape[1])
        for start in range(0, self.targets["model.embed_tokens"].shape[0], _ROWS):
            inside = (tokens >= start) & (tokens < start + _ROWS)
            if bool(inside.any()):
                stop = int(tokens[inside].max()) + 1
                table[inside] = self.source.rows(name, start, stop).to(torch.float32)[tokens[inside] - start]
        full = nn.functional.embedding(where, table)
        hidden = full
        if q is not None:
            params = q.params()
            taken = Params(
                params.scale[tokens], None if params.zero is None else params.zero[tokens], params.g_idx
            )
            codes = q.tensors["qweight"][tokens]
            rows = decode_packed(codes, taken, q.spec, q.shape[1], torch.float32)
            hidden = nn.functional.embedding(where, rows)
        if self.calibration.target != "full":
            return Activations(hidden)
        return Activations(hidden, full.clone())

    def _block(self, step: Step, index: int) -> StepResult:
        assert self.activations is not None
        self.activations = self.store.work_on(index + 1, self.activations)
        layer = self._layer(step)
        done = quantize_block(
            layer,  # type: ignore[arg-type]
            partial(self._load, step),
            self.setting,
            self.activations,
            self._walk(),
            step.name,
        )
        layer.to("meta")
        result = StepResult()
        for path in step.targets:
            if path in done:
                result.add(path, done[path], self.resolved[path][0])
        return result

    def _head(self, step: Step) -> StepResult:
        assert self.activations is not None
        result = StepResult()
        plain = [p for p in step.targets if (s := self.resolved[p][0]) is not None and not s.needs_hessian]
        if plain:
            result = super().compute(dataclasses.replace(step, targets=tuple(plain)), -1)
        norm = self.model.get_submodule("model.norm")
        norm.load_state_dict({"weight": self._copied("model.norm.weight")}, assign=True)
        streams = self.activations
        accumulator = HessianAccumulator(streams.hidden.shape[-1], streams.full is not None, self.device)
        for i in range(streams.hidden.shape[0]):
            full = None if streams.full is None else norm(streams.full[i].to(self.device))
            accumulator.add(norm(streams.hidden[i].to(self.device)), full)
        reduce(accumulator, self.group)
        self.activations = None
        weight = self._weight("lm_head.weight")
        (done,) = quantize_under(["lm_head"], [weight], self.setting, accumulator)
        result.add("lm_head", done, self.resolved["lm_head"][0])
        return result

    def _layer(self, step: Step) -> nn.Module:
        """A block with its norms; the weights of the walk's stages come and go."""
        layer = self.layers[step.name]
        staged = {f"{step.name}.{name}.weight" for stage in STAGES for name in stage}
        rest = {name[len(step.name) + 1 :]: self._copied(name) for name in step.names if name not in staged}
        layer.load_state_dict(rest, strict=False, assign=True)
        return layer

    def _weight(self, name: str) -> Tensor:
        """A tensor of the source in fp32, where it is computed with."""
        return whole(self.source, name).to(self.device).to(torch.float32)

    def _copied(self, name: str) -> Tensor:
        """A norm or a bias; NaN in it would be said of the Hessians behind it, and is said of itself."""
        w = self._weight(name)
        if look_at(w) == "nonfinite":
            self.policy.decide(name.removesuffix(".weight"), "nonfinite", in_words("nonfinite", w))
        return w

    def _load(self, step: Step, name: str) -> Tensor:
        return self._weight(f"{step.name}.{name}.weight")

    def _decoded(self, step: Step, name: str) -> Tensor:
        q = self._stored(f"{step.name}.{name}")
        return self._load(step, name) if q is None else q.dequantize(torch.float32).to(self.device)

    def _stored(self, path: str) -> QuantizedTensor | None:
        """A weight that a finished step quantized."""
        spec, shape = self.resolved[path][0], self.targets[path].shape
        if spec is None:
            return None
        return QuantizedTensor(
            spec, shape, {part: self.shards.read(f"{path}.{part}") for part in layout(spec, shape)}
        )

    def _walk(self) -> WalkContext:
        if self.context is None:
            rotary = MistralRotaryEmbedding(self.model.config)  # type: ignore[arg-type]
            self.context = walk_context(rotary.config, rotary, self.ids.shape[1], torch.float32, self.device)
        return self.context
