"""What fusing leaves of a model: its state dict, its files, transformers' generate, for every kind of weight."""

import pytest
import torch
from transformers import BitsAndBytesConfig, MistralConfig

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


KINDS = [
    None,
    "nf4",
    "nf4-dq-all",
    "fp4",
    "int8",
    "int4-g64",
    "int4-g32-all",
    "int4-g32-asym",
    "int3-g32",
    "int2-g32",
]


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


def test_what_a_layer_keeps_of_a_call_can_still_be_trained_with():
    model = model_of(None)

    class Repacking(torch.nn.Linear):
        """As bitsandbytes' 4-bit layers on a CPU: the first call brings the weight into another form."""

        def forward(self, x):
            if not hasattr(self, "kept"):
                self.kept = self.weight.detach() * 1.0
            return torch.nn.functional.linear(x, self.kept)

    layer = model.model.layers[1].mlp
    layer.down_proj.__class__ = Repacking
    generate(model, [[1, 2, 3]], max_new_tokens=2)
    assert hasattr(layer.down_proj, "kept")
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert bool(layer.up_proj.weight.grad.any())


def test_what_was_frozen_stays_so_and_nothing_else():
    model = model_of(None)
    for layer in model.model.layers:
        layer.self_attn.k_proj.requires_grad_(False)
        layer.mlp.gate_proj.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    DecodeModel(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
def test_four_bit_layers_of_bitsandbytes(tiny_checkpoint, kind, double):
    """Called as they are, and left as transformers leaves them."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="its layers are under test")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    ids = torch.randint(1, 256, (2, 9), generator=torch.Generator().manual_seed(0))

    def loaded(fused):
        model = MistralForCausalLM.from_pretrained(
            tiny_checkpoint, quantization_config=config, dtype=torch.float32
        ).eval()
        layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        assert len(layers) == 14
        for layer in layers:
            # its product in bf16, which some processors have, depends on how many rows there are
            layer.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu and fused
        return model

    for fused in (False, True):
        theirs, ours = loaded(fused), loaded(fused)
        wanted = theirs.generate(ids, max_new_tokens=10, do_sample=False)
        generator = Generator(ours, batch_size=2, eos=())
        assert "Linear4bit" in generator.model.separate["layers.0.self_attn"]
        done = generator.complete([Request(row, 10) for row in ids.tolist()])
        if not fused:
            assert [c.tokens for c in done] == wanted[:, 9:].tolist()
        # it keeps the scales of what it has re-packed in bf16
        left, right = ours.state_dict(), theirs.state_dict()
        assert list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)
        assert not any(p.is_inference() for p in ours.parameters())


def test_half_precision_goes_through_the_same_loop():
    model = model_of("int4-g64", torch.bfloat16)
    ids = torch.randint(1, 48, (3, 6))
    first = generate(model, ids, max_new_tokens=1)
    with torch.inference_mode():
        logits = model(ids).logits[:, -1].float()
    for row, (token,) in enumerate(first):  # two ways to round may part where two tokens are nearly as likely
        assert float(logits[row].max() - logits[row, token]) <= 0.1 * float(logits[row].std())
    assert generate(model, ids, max_new_tokens=6) == generate(model, ids, max_new_tokens=6)
