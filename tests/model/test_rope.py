"""Rotary embeddings of every type against transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import MistralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding as Theirs
from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

from brise.model.mistral import MistralForCausalLM
from brise.model.rope import MistralRotaryEmbedding, apply_rotary

TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 2.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


def config_of(kind: str) -> MistralConfig:
    return MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        sliding_window=None,
        initializer_range=0.3,
        rope_parameters={"rope_type": kind, "rope_theta": 1000.0, **TYPES[kind]},
    )


def test_every_type_is_covered() -> None:
    assert set(TYPES) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("kind", TYPES)
def test_angles_in_order_of_growing_and_shrinking_lengths(kind: str) -> None:
    """dynamic and longrope keep state: they rescale past the trained length and come back."""
    theirs, ours = Theirs(config_of(kind)), MistralRotaryEmbedding(config_of(kind))
    assert ours.attention_scaling == theirs.attention_scaling
    for length in (8, 20, 50, 40, 8):
        for dtype in (torch.float32, torch.bfloat16):
            x, positions = torch.zeros(1, 1, dtype=dtype), torch.arange(length).unsqueeze(0)
            for got, expected in zip(ours(x, positions), theirs(x, positions)):
                assert got.dtype == dtype
                assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", TYPES)
def test_models_with_each_type(kind: str) -> None:
    torch.manual_seed(0)
    theirs = transformers.MistralForCausalLM(config_of(kind)).eval()
    ours = MistralForCausalLM(config_of(kind)).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        for length in (6, 40, 6):
            got, expected = ours(ids[:, :length]).logits, theirs(ids[:, :length]).logits
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(
        ours.generate(ids[:, :10], max_new_tokens=30, do_sample=False),
        theirs.generate(ids[:, :10], max_new_tokens=30, do_sample=False),
    )


def test_rotation() -> None:
    """By complex numbers: pair (i, i + d/2) turns by position * theta^(-2i/d)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 9, 11, 13, 20]])
    rates = 1000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angles = positions[..., None] * rates
    cos, sin = angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(apply_rotary(x, cos, sin), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(apply_rotary(x, cos, sin), apply_rotary_pos_emb(x, x, cos, sin)[0])


def test_angles_are_taken_in_fp32() -> None:
    """In bf16 positions 256 and 257 would be one."""
    rotary = MistralRotaryEmbedding(config_of("default"))
    cos, _ = rotary(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([[256, 257]]))
    assert not torch.equal(cos[0, 0], cos[0, 1])


def test_frequencies_stay_fp32_and_out_of_the_checkpoint() -> None:
    model = MistralForCausalLM(config_of("default")).to(torch.bfloat16)
    assert not any("inv_freq" in name for name in model.state_dict())
    reference = MistralRotaryEmbedding(config_of("default"))
    loaded = MistralForCausalLM.from_pretrained(
        None, config=config_of("default"), state_dict=model.state_dict(), dtype=torch.bfloat16
    )
    assert torch.equal(loaded.model.rotary_emb.inv_freq, reference.inv_freq)


def test_unknown_type() -> None:
    config = config_of("default")
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1000.0}
    with pytest.raises(ValueError, match="'spiral', expected one of"):
        MistralRotaryEmbedding(config)
