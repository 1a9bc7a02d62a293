"""Adapters of peft on a model whose weights are quantized: the gradient passes through the products."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from brise.model.hf import BriseConfig
from brise.quant.linear import QuantLinear

peft = pytest.importorskip("peft", reason="adapters are trained with peft")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["nf4-dq", "int4-g32"])
def test_lora_steps_lower_the_loss_and_leave_the_codes_alone(tiny_checkpoint, preset, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint, quantization_config=BriseConfig(preset), dtype=dtype
    )
    quantized = [module for module in model.modules() if isinstance(module, QuantLinear)]
    before = {module: module.state_dict()["qweight"].clone() for module in quantized}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=True)
    adapted = peft.get_peft_model(model, config)
    wrapped = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(wrapped) == 6 and all(isinstance(m.base_layer, QuantLinear) for m in wrapped)
    ids = torch.randint(0, 256, (2, 24))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1, losses
    for module, codes in before.items():
        assert torch.equal(module.state_dict()["qweight"], codes)
