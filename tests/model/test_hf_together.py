"""Quantized models saved by save_pretrained, under torch.compile, peft and lm-eval."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from brise.model.checkpoint import load_model
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


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_of_every_linear_is_trained_saved_and_read_again(folders, family, tmp_path):
    peft = pytest.importorskip("peft", reason="adapters are trained with peft")
    model = AutoModelForCausalLM.from_pretrained(folders / family)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    wrapped = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(wrapped) == 14 and all(isinstance(m.base_layer, QuantLinear) for m in wrapped)
    # a trained adapter, by hand: its own product must be what it adds
    with torch.no_grad():
        for module in wrapped:
            module.lora_B["default"].weight.normal_(std=0.2)
        base = wrapped[0].base_layer
        x = torch.randn(3, base.in_features)
        low = module_delta(wrapped[0])
        torch.testing.assert_close(wrapped[0](x), base(x) + x @ low.T, rtol=1e-5, atol=1e-5)
        expected = adapted(IDS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders / family), tmp_path / "adapter"
    )
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)


def module_delta(module) -> torch.Tensor:
    """What a LoRA adds to its weight: scaling * B A."""
    return (
        module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
    ).detach()


def test_lm_eval_scores_a_folder_by_its_name(tiny_checkpoint, tmp_path):
    """``--model hf --model_args pretrained=FOLDER`` of lm-eval: log-likelihoods against a sum over the logits."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint, quantization_config=BriseConfig("nf4-dq")
    ).save_pretrained(tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(0)  # lm-eval asks for one, though it adds none here
    tokenizer.save_pretrained(tmp_path / "m")
    lm = HFLM(pretrained=str(tmp_path / "m"), device="cpu", dtype="float32", add_bos_token=False)
    pairs = [("The wind is", " light"), ("A", "b"), ("one two three", " four five")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    model = load_model(tmp_path / "m")
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        head, ids = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        scored = range(len(head), len(ids))
        assert value == pytest.approx(sum(float(logp[i - 1, ids[i]]) for i in scored), rel=1e-5)
        assert greedy == all(int(logp[i - 1].argmax()) == ids[i] for i in scored)
