"""What all tests share: no hub, no deadlines on a shared machine, and a reason for every skipped GPU test."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# a hub name that slips into a test fails at once instead of waiting for a network
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("brise", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
settings.load_profile("brise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral of two blocks, tied, width 64, with a tokenizer of bytes. Not to be written to."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=None,
            tie_word_embeddings=True,
            max_position_embeddings=128,
            # large enough that predictions differ from one another, and quantization shows
            initializer_range=0.2,
        )
        MistralForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 40 paragraphs, no two alike."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(
        "\n\n".join(f"Passage {i}: " + f"the wind is {i % 7} and light. " * 12 for i in range(40))
    )
    return path
