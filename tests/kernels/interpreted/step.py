"""Run by test_interpreted.py under TRITON_INTERPRET=1: a whole decode step by five kernels a layer, and no others."""

import torch
from matmul import poison
from transformers import MistralConfig
from triton.runtime.interpreter import InterpretedFunction

from brise.eval.gpu_step import plain_step
from brise.kernels import launch, ops
from brise.kernels.budget import check_budget
from brise.model.decode_attend import StepAttention
from brise.model.decode_step import DecodeModel
from brise.model.mistral import MistralForCausalLM
from brise.model.static_cache import StaticRollingCache
from brise.quant import linear
from brise.quant.apply import quantize_model
from brise.quant.config import QuantConfig, QuantSpec, Rule

LAYERS = 2
KERNELS = ["matmul_rope_kernel", "decode_kernel", "matmul_residual_kernel", "matmul_swiglu_kernel"]
# queries, groups, width: heads in one program, and a head in two
SHAPES = ((3, 1, 32), (2, 1, 64))


def model_of(heads, groups, width):
    config = MistralConfig(
        vocab_size=40, hidden_size=96, intermediate_size=80, num_hidden_layers=LAYERS, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=width, sliding_window=6, initializer_range=0.3, rms_norm_eps=0.1,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 2)
    spec = QuantSpec(format="int4", group_size=16, symmetric=False)
    rules = (Rule(match=("*.layers.*",), spec=spec), Rule(match=("*",), spec=None))
    quantize_model(model, QuantConfig(rules=rules))
    return model


@torch.inference_mode()
def check(shape):
    torch.manual_seed(1)
    model = model_of(*shape)
    made = DecodeModel(model, rows=3, fused=True)
    cache = StaticRollingCache(made.config, 3, dtype=made.dtype)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    # the ring gone round, half full, and a row that rests
    cache.seen.copy_(torch.tensor([9, 2, 4]))
    positions = cache.advance(torch.tensor([1, 1, 0]))
    attend = StepAttention(cache, made.heads, made.turn(positions.clamp_min(0)[:, None]), positions, False)
    tokens = torch.tensor([[3], [4], [5]])
    # what the plain step writes, it writes into copies
    exact, eager = (plain_step(model, tokens, attend, kind) for kind in (torch.float64, torch.float32))
    resting = cache.layers[1].keys[2].clone()
    started = []
    run = InterpretedFunction.run

    def counted(self, *args, **kwargs):
        started.append(self.__name__)
        return run(self, *args, **kwargs)

    InterpretedFunction.run = counted
    made.fused.impl = "triton"
    out = made.hidden(tokens, attend, chunk=False)[:, 0]
    InterpretedFunction.run = run
    assert started == ["rms_norm_kernel", *[*KERNELS, "matmul_residual_kernel"] * LAYERS], started
    assert torch.equal(cache.layers[1].keys[2], resting)
    # the third row rests: what comes of it is of no account, but it must be something finite
    assert bool(out[2].isfinite().all())
    check_budget(out[:2], eager[:2], exact[:2], f"a step, heads {shape}")


if __name__ == "__main__":
    assert launch.interpreting()
    poison()
    pack = ops.pack_weight
    linear.pack_weight = lambda *args, **more: pack(*args, **more, layout_name="tiles")
    for shape in SHAPES:
        check(shape)
    print("interpreted step: all within budget")
