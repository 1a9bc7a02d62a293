"""Runs in a peer's environment, without ours: load a folder with its library, or make one.

peer.py load LIBRARY FOLDER IDS.pt LOGITS.pt    writes a list: the logits, and those of a second way to compute them
peer.py make LIBRARY SOURCE FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch


def load(library: str, folder: str, ids: torch.Tensor) -> list[torch.Tensor]:
    if library == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        method = json.loads(Path(folder, "config.json").read_text())["quantization_config"]["quant_method"]
        backend = BACKEND.TORCH_AWQ if method == "awq" else BACKEND.TORCH
        model = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.float16).model
    else:
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
    out = []
    with torch.no_grad():
        if library == "bitsandbytes":
            # where the CPU has bfloat16, it rounds inputs and absmax to that behind the caller's back; first without
            fast = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
            for module in fast:
                module.support_avx512bf16_for_cpu = False
            out.append(model(ids).logits.float())
            for module in fast:
                module.support_avx512bf16_for_cpu = True
        out.append(model(ids).logits.float())
    return out


def make(library: str, source: str, folder: str) -> None:
    if library == "bitsandbytes":
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(folder)
    elif library == "gptqmodel":
        from gptqmodel import GPTQModel, QuantizeConfig

        model = GPTQModel.load(source, QuantizeConfig(bits=4, group_size=32, desc_act=False, device="cpu"))
        rows = [{"input_ids": list(range(i, i + 64)), "attention_mask": [1] * 64} for i in range(0, 128, 8)]
        model.quantize(rows, batch_size=1)
        model.save(folder)
    else:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source)
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        config = QuantizationConfig(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
        )
        apply_quantization_config(model, config)
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                grouped = module.weight.data.unflatten(1, (-1, 32))
                module.weight_scale.data = grouped.abs().amax(-1) / 7.5
        compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)


if __name__ == "__main__":
    os.cpu_count = lambda: 8  # gptqmodel refuses to start with two
    what, library, *rest = sys.argv[1:]
    if what == "load":
        torch.save(load(library, rest[0], torch.load(rest[1])), rest[2])
    else:
        make(library, *rest)
