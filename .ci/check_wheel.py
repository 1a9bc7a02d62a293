"""Run where the wheel is installed without extras: import every module, and make a tiny checkpoint to quantize."""

import importlib
import importlib.util
import pkgutil
import sys

EXTRAS = ("bitsandbytes", "datasets", "lm_eval", "matplotlib", "gguf", "scipy", "pytest")
PACKAGES = ("quant", "model", "eval", "kernels", "cli")


def main(folder: str) -> None:
    for name in EXTRAS:
        assert importlib.util.find_spec(name) is None, (
            f"{name} is here: this tells nothing about the core alone"
        )
    count = 0
    for package in PACKAGES:
        root = importlib.import_module(f"brise.{package}")
        assert "site-packages" in next(iter(root.__path__)), f"brise.{package} comes from {root.__path__}"
        for module in pkgutil.walk_packages(root.__path__, f"brise.{package}."):
            importlib.import_module(module.name)
            count += 1
    print(f"{count} modules imported without {', '.join(EXTRAS)}")

    from transformers import MistralConfig

    from brise.model.mistral import MistralForCausalLM

    config = MistralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    MistralForCausalLM(config).save_pretrained(folder)


main(sys.argv[1])
