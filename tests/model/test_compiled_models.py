"""Whole quantized models under torch.compile: one graph for every length, padding included, and eager's logits."""

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend

from brise.model import attention_brise, mistral
from brise.quant.apply import quantize_model
from brise.quant.presets import PRESETS

attention_brise.register()


@pytest.mark.parametrize("module", [transformers, mistral], ids=["transformers", "ours"])
def test_quantized_and_padded_it_is_one_graph_for_every_length(module):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
        initializer_range=0.3,
    )
    model = module.MistralForCausalLM._from_config(config, attn_implementation="brise").eval()
    quantize_model(model, PRESETS["nf4-dq"])
    torch.compiler.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counted)
    graphs = []
    with torch.no_grad():
        for length in (9, 13, 40):
            ids, mask = torch.randint(0, 61, (3, length)), torch.ones(3, length, dtype=torch.long)
            mask[0, :4] = mask[1, : length - 1] = 0
            got = compiled(ids, attention_mask=mask, use_cache=False).logits
            assert torch.equal(got, model(ids, attention_mask=mask, use_cache=False).logits)
            graphs.append(counted.frame_count)
    # the first product packs the weights, and may be seen once
    assert graphs[0] <= 2 and len(set(graphs)) == 1, graphs
