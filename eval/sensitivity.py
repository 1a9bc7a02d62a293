"""How much each module's quantization moves the model's predictions, from one pass over a calibration text.

Quantizing one weight W to Q changes its outputs by (Q - W) x. To second order the divergence of the predictions is
half the change's square under the Fisher information, and that is an expectation over the gradients g of log p(y) with
y drawn from the model itself (K-FAC, arXiv:1503.05671, section 2; HAWQ-V2, arXiv:1911.03852, for its use). So

    KL(W -> Q) is about 1/2 mean_t (g_t^T (Q - W) x_t)^2,    in nats a token,

with x_t and g_t of every calibration token t. One pass forwards and one back give them for all modules and formats,
block by block: no more than a block is in memory. For the head, whose outputs are the logits, the expectation over y
is taken exactly. What tokens, and modules, do together is left out: losses are taken to add up.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.job_plan import Step, blocks_of, plan_steps
from ..model.rope import MistralRotaryEmbedding
from ..model.skeleton import empty_model
from ..model.source import Source, whole
from ..model.walk import WalkContext, walk_context
from ..quant.apply import Target, find_targets, quantize_weight
from ..quant.calibrate import HessianAccumulator
from ..quant.config import QuantSpec

Progress = Callable[[str, int, int], None]
Losses = dict[str, dict[str, float]]
_ROWS = 1024


def measure_sensitivities(
    source: Source,
    ids: Tensor,
    candidates: Mapping[str, QuantSpec],
    cache: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Losses:
    """Predicted KL, in nats a token, of quantizing one module alone: path -> candidate's name -> loss.

    A module tied to another counts with it. Embeddings take the candidates without their Hessian.

    Args:
        ids: calibration windows int64 [windows, length].
        cache: a folder; what was measured of the same source, windows and candidates is taken from it, and every block
            that is done is put there at once.
        seed: of the tokens drawn from the model.
        progress: called with ("sensitivity", steps done, steps in all).
    """
    identity = [version("brise"), source.identity(), candidates_to_dict(candidates), seed, list(ids.shape)]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode() + ids.numpy().tobytes()).hexdigest()
    file = cache / f"sensitivity-{digest[:16]}.json"
    done: Losses = json.loads(file.read_text()) if file.exists() else {}
    job = _Measurement(source, ids, candidates, seed, done)
    if not all(path in done for path in job.wanted):
        cache.mkdir(parents=True, exist_ok=True)
        job.run(progress or (lambda *_: None), lambda: _save(file, done))
    return {path: done[path] for path in job.wanted}


def candidates_to_dict(candidates: Mapping[str, QuantSpec]) -> dict[str, Any]:
    return {name: spec.to_dict() for name, spec in candidates.items()}


def _save(file: Path, losses: Losses) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(losses))
    os.replace(temporary, file)


@dataclass
class _Seen:
    """Inputs [tokens, K] and gradients of the outputs [tokens, N] of one Linear, a list entry a window."""

    inputs: list[Tensor]
    gradients: list[Tensor]


class _Measurement:
    def __init__(
        self, source: Source, ids: Tensor, candidates: Mapping[str, QuantSpec], seed: int, done: Losses
    ) -> None:
        self.source, self.ids, self.candidates, self.done = source, ids, candidates, done
        self.model = empty_model(source.config, attn_implementation="sdpa")
        self.targets: dict[str, Target] = {t.path: t for t in find_targets(self.model)}
        self.steps: list[Step] = plan_steps(source, self.model, self.targets)
        self.layers = dict(blocks_of(self.model))
        self.wanted = [t.path for t in self.targets.values() if t.tied_to is None]
        self.tied = any(t.path == "lm_head" and t.tied_to for t in self.targets.values())
        self.generator = torch.Generator().manual_seed(seed)
        rotary = MistralRotaryEmbedding(self.model.config)  # type: ignore[arg-type]
        self.context: WalkContext = walk_context(rotary.config, rotary, ids.shape[1], torch.float32)

    def run(self, progress: Progress, save: Callable[[], None]) -> None:
        total = 2 * len(self.layers) + 2
        table = whole(self.source, "model.embed_tokens.weight").to(torch.float32)
        hidden = [nn.functional.embedding(self.ids, table)]
        del table
        with torch.no_grad():
            for number, path in enumerate(self.layers):
                layer = self._fill(self.layers[path], path)
                hidden.append(torch.cat([self._forward(layer, h) for h in hidden[-1].split(1)]))
                layer.to("meta")
                progress("sensitivity", number + 1, total)
        gradient, head = self._head(hidden.pop())
        progress("sensitivity", len(self.layers) + 1, total)
        if not self.tied:
            self.done["lm_head"] = head
        for number, path in enumerate(reversed(self.layers)):
            gradient = self._block(path, hidden.pop(), gradient)
            save()
            progress("sensitivity", len(self.layers) + 2 + number, total)
        losses = self._embedding(gradient)
        self.done["model.embed_tokens"] = {
            name: loss + (head[name] if self.tied else 0.0) for name, loss in losses.items()
        }
        save()
        progress("sensitivity", total, total)

    def _forward(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        out: Tensor = layer(
            hidden,
            attention_mask=self.context.attention_mask,
            position_embeddings=self.context.position_embeddings,
        )
        return out

    def _fill(self, module: nn.Module, prefix: str) -> nn.Module:
        tensors = {
            name: whole(self.source, f"{prefix}.{name}").to(torch.float32) for name in module.state_dict()
        }
        module.load_state_dict(tensors, assign=True)
        return module.requires_grad_(False)

    def _head(self, hidden: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The gradient in front of the final norm [W, T, D], and the head's losses."""
        norm = self._fill(self.model.get_submodule("model.norm"), "model.norm")
        name = "model.embed_tokens.weight" if self.tied else "lm_head.weight"
        weight = whole(self.source, name).to(torch.float32)
        inputs, gradients = [], []
        accumulator = HessianAccumulator(weight.shape[1])
        with torch.enable_grad():
            for window in hidden.split(1):
                start = window.detach().requires_grad_()
                x = norm(start)
                log_p = torch.log_softmax(x[0] @ weight.t(), dim=-1)
                drawn = torch.multinomial(log_p.detach().exp(), 1, generator=self.generator)
                log_p.gather(1, drawn).sum().backward()
                assert start.grad is not None
                gradients.append(start.grad)
                inputs.append(x[0].detach())
                accumulator.add(inputs[-1])
        losses: dict[str, float] = {}
        if self.tied or "lm_head" not in self.done:
            for candidate, spec in self.candidates.items():
                chosen = without_hessian(spec) if self.tied else spec
                error = self._error("lm_head", weight, chosen, accumulator)
                losses[candidate] = (
                    sum(float(_logit_loss(x, weight, error)) for x in inputs) / self.ids.numel()
                )
        else:
            losses = self.done["lm_head"]
        return torch.cat(gradients), losses

    def _block(self, path: str, hidden: Tensor, gradient: Tensor) -> Tensor:
        """The gradient in front of a block, [W, T, D]; the losses of its Linears on the way."""
        layer = self._fill(self.layers[path], path)
        targets = [t for t in self.wanted if t.startswith(path + ".")]
        new = [t for t in targets if t not in self.done]
        seen = {t: _Seen([], []) for t in new}
        hooks = [
            layer.get_submodule(t[len(path) + 1 :]).register_forward_hook(_watcher(seen[t])) for t in new
        ]
        back = []
        with torch.enable_grad():
            for window, above in zip(hidden.split(1), gradient.split(1), strict=True):
                start = window.detach().requires_grad_()
                self._forward(layer, start).backward(above)
                assert start.grad is not None
                back.append(start.grad)
        for hook in hooks:
            hook.remove()
        shared: dict[int, HessianAccumulator] = {}
        for target in new:
            x, g = torch.cat(seen[target].inputs), torch.cat(seen[target].gradients)
            accumulator = shared.setdefault(seen[target].inputs[0].data_ptr(), HessianAccumulator(x.shape[1]))
            if not accumulator.tokens:
                accumulator.add(x)
            weight = layer.get_submodule(target[len(path) + 1 :]).weight
            assert isinstance(weight, Tensor)
            self.done[target] = {
                name: float(_loss(x, g, self._error(target, weight, spec, accumulator)))
                for name, spec in self.candidates.items()
            }
        layer.to("meta")
        return torch.cat(back)

    def _embedding(self, gradient: Tensor) -> dict[str, float]:
        weight = whole(self.source, "model.embed_tokens.weight").to(torch.float32)
        losses = {}
        for name, spec in self.candidates.items():
            error = self._error("model.embed_tokens", weight, without_hessian(spec), None)
            moved = (nn.functional.embedding(self.ids, error) * gradient).sum(-1)
            losses[name] = 0.5 * float(moved.square().mean())
        return losses

    def _error(
        self, path: str, weight: Tensor, spec: QuantSpec, accumulator: HessianAccumulator | None
    ) -> Tensor:
        """Q - W, fp32 [N, K]."""
        hessian = accumulator.hessian if accumulator is not None and spec.needs_hessian else None
        with torch.no_grad():
            return quantize_weight(path, weight, spec, hessian).dequantize(torch.float32) - weight


def without_hessian(spec: QuantSpec) -> QuantSpec:
    """What an embedding, or a head that is tied to one, takes in the place of a spec."""
    from ..model.trouble import plain

    return plain(spec) if spec.needs_hessian else spec


def _watcher(seen: _Seen) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.inputs.append(inputs[0].detach().flatten(0, -2))
        output.register_hook(lambda gradient: seen.gradients.append(gradient.flatten(0, -2)))

    return hook


def _loss(x: Tensor, gradient: Tensor, error: Tensor) -> Tensor:
    """1/2 mean over tokens of (g^T E x)^2: x [T, K], g [T, N], E [N, K]."""
    moved = torch.zeros(x.shape[0], dtype=torch.float64)
    for start in range(0, x.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        moved[part] = torch.linalg.vecdot(x[part] @ error.t(), gradient[part]).double()
    return 0.5 * moved.square().mean()


def _logit_loss(x: Tensor, weight: Tensor, error: Tensor) -> Tensor:
    """Sum over tokens x [T, K] of half the variance, under the model's distribution, of the logits' change."""
    p = torch.softmax(x @ weight.t(), dim=-1)
    change = x @ error.t()
    mean = torch.linalg.vecdot(p, change)
    return 0.5 * torch.linalg.vecdot(p, (change - mean[:, None]).square()).sum()
