"""What fusing leaves of a model: its state dict, its files, transformers' generate, for every kind of weight."""

import pytest
import torch
from transformers import MistralConfig

from brise.kernels import native
from brise.model.checkpoint import load_model, save_model
from brise.model.decode_step import DecodeModel
from brise.model.generate import Generator, Request, generate
from brise.model.mistral import MistralForCausalLM
from brise.quant.apply import quantize_model
from brise.quant.presets import PRESETS


def model_of(preset, dtype=torch.float32):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=None, initializer_range=0.2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = MistralForCausalLM(config).to(dtype).eval()
    if preset is not None:
        quantize_model(model, PRESETS[preset])
    return model


KINDS = [None, "nf4", "nf4-dq-all", "int8", "int4-g64", "int4-g32-all"]


@pytest.mark.parametrize("preset", KINDS)
@pytest.mark.parametrize("repack", [True, False], ids=["repacked", "shared"])
def test_the_checkpoint_never_shows_it(preset, repack, tmp_path):
    model = model_of(preset)
    ids = torch.randint(1, 48, (2, 7))
    wanted = model.generate(ids, max_new_tokens=10, do_sample=False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tokens = generate(model, ids, max_new_tokens=10, repack=repack)
    assert tokens == wanted[:, 7:].tolist()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(t, before[n]) for n, t in after.items())
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), wanted)
    save_model(model, tmp_path / "ours")
    reloaded = load_model(tmp_path / "ours").state_dict()
    assert list(reloaded) == list(before) and all(torch.equal(t, before[n]) for n, t in reloaded.items())
    if preset is None:
        model.save_pretrained(tmp_path / "theirs")
        theirs = load_model(tmp_path / "theirs").state_dict()
        assert all(torch.equal(t, before[n]) for n, t in theirs.items())


def test_what_is_shared_is_stored_once():
    for preset in (None, "int4-g64"):
        model = model_of(preset)
        made = DecodeModel(model, repack=False)
        name = "weight" if preset is None else "qweight"
        attention = model.model.layers[0].self_attn
        parts = [getattr(attention, f"{p}_proj") for p in "qkv"]
        assert len({getattr(p, name).untyped_storage().data_ptr() for p in parts}) == 1
        assert made.separate == {} and made.repacked_bytes == 0
    weights = sum(p.nbytes for n, p in model_of(None).named_parameters() if "proj" in n or "lm_head" in n)
    assert DecodeModel(model_of(None), rows=17, repack=True).repacked_bytes == weights
    with native.without():
        assert DecodeModel(model_of(None), repack=True).repacked_bytes == weights
    if native.active() is not None:
        assert DecodeModel(model_of(None), repack=True).repacked_bytes == 0


def test_what_stays_separate_is_named():
    made = DecodeModel(model_of("nf4-dq"))
    assert set(made.separate) == {f"layers.{i}.{n}" for i in range(2) for n in ("self_attn", "mlp")}
    assert all("offset for each weight" in reason for reason in made.separate.values())


def test_an_adapted_layer_is_called_as_it_is():
    model = model_of(None)

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) * 1.5

    layer = model.model.layers[1].self_attn
    layer.v_proj = Adapted(layer.v_proj)
    ids = torch.randint(1, 48, (1, 5))
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)[:, 5:].tolist()
    generator = Generator(model)
    assert [c.tokens for c in generator.complete([Request(ids[0].tolist(), 8)])] == wanted
    assert "Adapted" in generator.model.separate["layers.1.self_attn"]


def test_half_precision_goes_through_the_same_loop():
    model = model_of("int4-g64", torch.bfloat16)
    ids = torch.randint(1, 48, (3, 6))
    first = generate(model, ids, max_new_tokens=1)
    with torch.inference_mode():
        logits = model(ids).logits[:, -1].float()
    for row, (token,) in enumerate(first):  # two ways to round may part where two tokens are nearly as likely
        assert float(logits[row].max() - logits[row, token]) <= 0.1 * float(logits[row].std())
    assert generate(model, ids, max_new_tokens=6) == generate(model, ids, max_new_tokens=6)
