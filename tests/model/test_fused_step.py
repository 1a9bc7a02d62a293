"""The decode step in five launches a layer: the text of the launches on their own and of transformers, by five."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig
from transformers import MistralForCausalLM as Peer

from brise.kernels import tuning
from brise.kernels.ops import pack_weight
from brise.model.decode_attend import StepAttention
from brise.model.decode_engine import Beginning, DecodeEngine
from brise.model.decode_step import DecodeModel
from brise.model.mistral import MistralForCausalLM
from brise.model.sampling import Sampling
from brise.quant import linear
from brise.quant.apply import quantize_model
from brise.quant.config import QuantConfig, QuantSpec, Rule
from brise.quant.linear import QuantLinear

NEW = 9
LAYERS = 2
PROMPTS = (5, 1, 11)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Weights as the Triton kernels read them, which a CPU has otherwise no use for."""
    monkeypatch.setattr(linear, "pack_weight", functools.partial(pack_weight, layout_name="tiles"))


def model_of(spec, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    values = {
        "vocab_size": 61, "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": LAYERS,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": None,
        "max_position_embeddings": 256, "initializer_range": 0.3, "eos_token_id": None, "pad_token_id": 0,
        "tie_word_embeddings": False, "rms_norm_eps": 1.0,
    }  # fmt: skip
    config = MistralConfig(**{**values, **changes})
    model = MistralForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "MistralRMSNorm":
                module.weight.uniform_(0.5, 2)
    if spec is not None:
        rules = (Rule(match=("*.layers.*",), spec=spec), Rule(match=("*",), spec=None))
        quantize_model(model, QuantConfig(rules=rules))
    return model


INT4 = QuantSpec(format="int4", group_size=16, symmetric=False)
NF4 = QuantSpec(format="nf4", group_size=16)
INT8 = QuantSpec(format="int8", group_size=None)


def peer_of(model):
    """transformers' own model with the weights that ours stands for."""
    peer = Peer(model.config).eval()
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            state[f"{name}.weight"] = module.quantized().dequantize(torch.float32)
    state |= {n: t for n, t in model.state_dict().items() if n in peer.state_dict()}
    peer.load_state_dict(state)
    return peer


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 61, (n,), generator=generator).tolist() for n in PROMPTS]


def engine_of(model, fused, **options):
    settings = {"rows": 3, "length": 40} | options
    made = DecodeModel(model, rows=3, fused=fused, invariant=settings.pop("invariant", False))
    assert (made.fused is not None) == bool(fused)
    return DecodeEngine(made, **settings)


def begin(engine, texts):
    plain = Sampling()
    return engine.start([Beginning(row, text, plain, NEW) for row, text in enumerate(texts)])


def written(engine, texts):
    first = begin(engine, texts)
    rows = engine.run(len(texts), NEW - 1)
    return [[token, *row] for token, row in zip(first, rows)]


@pytest.mark.parametrize("spec,window", [(INT4, None), (NF4, 6), (INT8, 6)], ids=["int4", "nf4", "int8"])
def test_the_text_is_that_of_transformers_and_of_separate_launches(spec, window):
    """Rows of different lengths, beyond the window, in fp32: token by token."""
    peer = peer_of(model_of(spec, sliding_window=window))
    texts, wanted = prompts(), []
    for text in texts:
        out = peer.generate(torch.tensor([text]), max_new_tokens=NEW, do_sample=False)
        wanted.append(out[0, len(text) :].tolist())
    for fused in (True, False):
        assert written(engine_of(model_of(spec, sliding_window=window), fused), texts) == wanted


def logits_of(dtype, fused, device="cpu", **options):
    """Of three steps with given tokens: a step alike whichever token the one before would have chosen."""
    engine = engine_of(model_of(INT4, dtype=dtype).to(device), fused, **options)
    begin(engine, prompts())
    out = []
    for step in range(3):
        tokens = torch.tensor([[7 + step], [20], [33 + step]], device=device)
        with torch.inference_mode():
            written = torch.ones(3, dtype=torch.int32, device=device)
            out.append(engine._forward(engine.cache, tokens, written).float().cpu())
    return torch.cat(out)


@pytest.mark.parametrize("int8", [False, True], ids=["float ring", "int8 ring"])
def test_the_logits_are_those_of_separate_launches(int8):
    fused, separate = (logits_of(torch.float32, fused, int8_cache=int8) for fused in (True, False))
    torch.testing.assert_close(fused, separate, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_separate_launches(dtype):
    exact = logits_of(torch.float32, False)
    errors = [float((logits_of(dtype, fused) - exact).norm()) for fused in (True, False)]
    assert 0 < errors[0] <= 2 * errors[1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_it_is_the_default_and_runs_in_a_graph(dtype):
    exact = logits_of(torch.float32, False)
    errors = [float((logits_of(dtype, fused, "cuda") - exact).norm()) for fused in (True, False)]
    assert 0 < errors[0] <= 2 * errors[1]
    made = DecodeModel(model_of(INT4, dtype=dtype).cuda(), rows=3)
    assert made.fused is not None and made.fused.rows == tuning.STEP_ROWS
    texts = prompts()
    first, second = (written(DecodeEngine(made, rows=3, length=40), texts) for _ in "ab")
    assert first == second


def test_drafts_are_verified_as_by_separate_launches():
    """Several tokens of a row at once, of which the last ones are taken back."""
    texts, found = prompts(), []
    for fused in (True, False):
        engine = engine_of(model_of(INT4, sliding_window=6), fused, drafts=2)
        begin(engine, texts)
        rows = [engine.verify([[3, 4], [], [9]]), engine.verify([[], [1, 2], [5]])]
        found.append(rows)
    assert found[0] == found[1]


def test_rows_that_must_not_depend_on_each_other_do_not():
    texts = prompts()
    engine = engine_of(model_of(INT4), True, invariant=True)
    together = written(engine, texts)
    states = [engine.cache.layers[1].keys[row].clone() for row in range(3)]
    for row, text in enumerate(texts):
        alone = engine_of(model_of(INT4), True, invariant=True, rows=1)
        assert written(alone, [text]) == [together[row]]
        assert torch.equal(alone.cache.layers[1].keys[0], states[row])


class Count(TorchDispatchMode):
    """The operators that are called, without those that only look at a tensor in another way."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.names.append(func.name())
        return out


def step_of(dtype=torch.float32, int8=False, fused=True):
    """One step's tokens, and what attends."""
    engine = engine_of(model_of(INT4, dtype=dtype), fused, int8_cache=int8)
    begin(engine, prompts())
    positions = engine.cache.advance(1)
    turn = engine.model.turn(positions[:, None])
    attend = StepAttention(engine.cache, engine.model.heads, turn, positions, False)
    return engine, torch.tensor([[3], [4], [5]]), attend


FIVE = ["matmul_rope_cache_write", "decode_attention", "matmul_residual", "matmul_swiglu", "matmul_residual"]
ROUND = ["rms_norm", "int4_matmul", "rope_cache_write"]
FIRST = {
    (torch.float32, False): (FIVE, FIVE),
    (torch.bfloat16, False): (FIVE, FIVE),
    (torch.float16, False): (
        [*FIVE[:3], "rms_norm", *FIVE[3:], "rms_norm"],
        [*FIVE[:3], "rms_norm", *FIVE[3:]],
    ),
    (torch.bfloat16, True): ([*ROUND[1:], *FIVE[1:], "rms_norm"], [*ROUND[1:], *FIVE[1:]]),
}


@pytest.mark.parametrize("dtype,int8", FIRST, ids=str)
def test_a_layer_takes_five_launches(dtype, int8):
    """Each op is one launch: test_interpreted.py counts those. fp16 and an int8 ring take seven."""
    engine, tokens, attend = step_of(dtype, int8)
    with torch.inference_mode(), Count() as count:
        x = engine.model._embed(tokens)
        count.names.clear()
        engine.model.fused.hidden(x, attend)
    inner, last = FIRST[dtype, int8]
    wanted = ["rms_norm", *inner * (LAYERS - 1), *last]
    assert count.names == [f"brise::{name}" for name in wanted]


def test_more_rows_than_the_table_says_go_by_separate_launches(monkeypatch):
    engine, tokens, attend = step_of()
    for rows, invariant, taken in ((3, False, True), (2, False, False), (2, True, True)):
        engine.model.fused.rows, engine.model.fused.invariant = rows, invariant
        assert engine.model.fused.takes(attend, 3) == taken
    engine.model.fused.rows, engine.model.fused.invariant = 2, False
    with torch.inference_mode(), Count() as count:
        engine.model.hidden(tokens, attend, chunk=False)
    assert not {f"brise::{name}" for name in FIVE if name != "decode_attention"} & set(count.names)


def test_why_steps_are_not_fused_is_said(monkeypatch):
    for model, why in (
        (model_of(None), "quantized"),
        (model_of(QuantSpec(format="nf4", group_size=16, double_quant=True)), "offset for each weight"),
        (model_of(INT4, hidden_act="gelu"), "gelu is no silu"),
        (model_of(INT4, head_dim=16), "heads of 16"),
    ):
        assert DecodeModel(model).fused is None
        with pytest.raises(ValueError, match=why):
            DecodeModel(model, fused=True)
    mixed = model_of(INT4, dtype=torch.bfloat16)
    for layer in mixed.model.layers:
        layer.post_attention_layernorm.float()
    with pytest.raises(ValueError, match=r"norms of torch.float32 beside activations of torch.bfloat16"):
        DecodeModel(mixed, fused=True)
    monkeypatch.setattr(linear, "pack_weight", pack_weight)
    with pytest.raises(ValueError, match="int4 is in layout portable"):
        DecodeModel(model_of(INT4), fused=True)
    assert min(tuning.CROSSOVER.values()) >= tuning.STEP_ROWS, "beyond, no product is fused at all"
