"""Our quantized models of other architectures, saved by save_pretrained, under torch.compile."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from brise.model.hf import BriseConfig
from brise.quant.linear import QuantLinear

IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A quantized folder of each family, made while loading and saved by save_pretrained."""
    root = tmp_path_factory.mktemp("together")
    for family, (cls, config) in FAMILIES.items():
        torch.manual_seed(0)
        cls(config(**SMALL)).save_pretrained(root / f"{family}-plain")
        model = AutoModelForCausalLM.from_pretrained(
            root / f"{family}-plain", quantization_config=BriseConfig("nf4-dq")
        )
        model.save_pretrained(root / family)
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_whole_it_gives_the_same(folders, family):
    model = AutoModelForCausalLM.from_pretrained(folders / family, device_map="auto")
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 14
    with torch.no_grad():
        eager = model(IDS, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(IDS, use_cache=False).logits
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
