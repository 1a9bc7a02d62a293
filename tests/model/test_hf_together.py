"""Our quantized models under what people put on top of transformers: peft, torch.compile, lm-eval."""

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
def test_lora_trains_on_top_and_its_adapter_comes_back(folders, tmp_path, family):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(folders / family)
    before = {n: b.clone() for n, b in base.state_dict().items()}
    plain = base(IDS).logits.detach()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    assert torch.equal(model(IDS).logits, plain), "an adapter begins as nothing"
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 8 and all("lora_" in n for n in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[n.replace("q_proj.", "q_proj.base_layer.").replace(
        "down_proj.", "down_proj.base_layer.")], t) for n, t in before.items())  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(folders / family)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_whole_it_gives_the_same(folders, family):
    model = AutoModelForCausalLM.from_pretrained(folders / family, device_map="auto")
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 14
    with torch.no_grad():
        eager = model(IDS, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(IDS, use_cache=False).logits
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_lm_eval_takes_it_as_any_model_of_transformers(folders, tiny_checkpoint):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, quantization_config=BriseConfig("nf4"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    lm = HFLM(pretrained=quantized, tokenizer=tokenizer, batch_size=1, device="cpu")
    request = Instance("loglikelihood", {}, ("the wind", " is light"), 0)
    ((value, _),) = lm.loglikelihood([request], disable_tqdm=True)
    ids = tokenizer("the wind is light", return_tensors="pt").input_ids
    start = len(tokenizer("the wind").input_ids)
    with torch.no_grad():
        logprobs = quantized(ids).logits.log_softmax(-1)[0]
    expected = sum(float(logprobs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
    assert value == pytest.approx(expected, rel=1e-4)
