"""The GPU benchmark's cases from end to end: Mistral-7B with random weights, prompts in, tokens out."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.apply import replace_module
from ..quant.config import QuantSpec
from ..quant.linear import QuantLinear
from ..quant.rtn import rtn
from .gpu_matmul import SPECS
from .gpu_protocol import Case, Goal, Problem, Side

MISTRAL_7B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}
SHORT, LONG, NEW = 128, 4096, 512
# (format, None: none; rows at once; tokens of the prompt)
GOALS = {
    ("int4", 1, SHORT): Goal(1114, 550, 750, "tok/s", higher=True),
    ("nf4", 1, SHORT): Goal(1027, 450, 620, "tok/s", higher=True),
    ("int8", 1, SHORT): Goal(594, 380, 460, "tok/s", higher=True),
    (None, 1, SHORT): Goal(302, 230, 265, "tok/s", higher=True),
    ("int4", 32, LONG): Goal(6540, 4400, 5500, "tok/s", higher=True),
}
# how far the logit of a written token may lie below the largest, in spreads of the logits: two ways to multiply
# round otherwise, so where two tokens are nearly as likely, either may come
REGRET = 0.1


def cases() -> list[Case]:
    return [generate_case(name, batch, prompt, NEW, goal) for (name, batch, prompt), goal in GOALS.items()]


def generate_case(
    name: str | None,
    batch: int,
    prompt: int,
    new: int,
    goal: Goal | None = None,
    dtype: str = "float16",
    size: dict[str, Any] | None = None,
) -> Case:
    spec = None if name is None else SPECS[name]
    labels = {"format": name or dtype, "dtype": dtype, "batch": batch, "prompt": prompt, "new": new}
    make = functools.partial(
        make_generation, spec, batch, prompt, new, getattr(torch, dtype), size or MISTRAL_7B
    )
    text = f"{name or dtype} b{batch} {prompt} in {new} out"
    return Case("generate", text, labels, make, goal, 2, eager=True, rounds=3)


def make_generation(
    spec: QuantSpec | None,
    batch: int,
    prompt: int,
    new: int,
    dtype: torch.dtype,
    size: dict[str, Any],
    device: torch.device,
) -> Problem:
    from ..model.generate import Generator
    from ..model.requests import Request

    model = random_model(spec, dtype, size, device)
    ids = torch.randint(size["vocab_size"], (batch, prompt), generator=torch.Generator().manual_seed(0))
    writer = Generator(model, batch_size=batch, eos=())
    requests = [Request(row, new) for row in ids.tolist()]

    def write() -> Tensor:
        return torch.tensor([completion.tokens for completion in writer.complete(requests)])

    @torch.no_grad()
    def pick(written: Tensor) -> Tensor:
        """1 and what each token of the first row fell short of the best, by the model's own plain forward pass."""
        whole = torch.cat([ids[0], written[0]]).to(device)
        logits = model(whole[None]).logits[0, prompt - 1 : -1].float()
        short = logits.amax(-1) - logits.gather(1, whole[prompt:, None])[:, 0]
        return 1 + short / logits.std(-1)

    exact = torch.ones(new, device=device, dtype=torch.float64)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    return Problem(
        {"ours": Side([write])}, exact, pick=pick, allowed=REGRET, tokens=float(batch * new),
        nbytes=float(weights * new),
    )  # fmt: skip


def random_model(
    spec: QuantSpec | None, dtype: torch.dtype, size: dict[str, Any], device: torch.device
) -> nn.Module:
    """A Mistral whose blocks' Linear layers are quantized one by one as they are made; the ends stay dense."""
    from transformers import MistralConfig

    from ..model.mistral import MistralForCausalLM
    from ..model.rope import MistralRotaryEmbedding

    config = MistralConfig(**size, tie_word_embeddings=False)
    with torch.device("meta"):
        model = MistralForCausalLM(config).to(dtype)  # type: ignore[arg-type]
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: torch.Size) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * 0.02).to(dtype)

    for path, module in list(model.named_modules()):
        if spec is not None and isinstance(module, nn.Linear) and ".layers." in path:
            q = rtn(draw(module.weight.shape).float(), spec)
            replace_module(model, path, QuantLinear.from_quantized(q))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.ones(parameter.shape, device=device, dtype=dtype)
            value = value if parameter.ndim == 1 else draw(parameter.shape)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        if isinstance(module, MistralRotaryEmbedding):
            for name, buffer in MistralRotaryEmbedding(config).named_buffers():
                module._buffers[name] = buffer.to(device)
    return model.eval()
