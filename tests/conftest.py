"""What all tests share: no hub, no deadlines on a shared machine, and a reason for every skipped GPU test."""

import os
import shutil
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


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good folders of one quantized model: a single file, shards with an index, and tied."""
    import torch
    from transformers import MistralConfig

    from brise.model.checkpoint import save_model
    from brise.model.mistral import MistralForCausalLM
    from brise.quant.apply import quantize_model
    from brise.quant.presets import PRESETS

    root = tmp_path_factory.mktemp("made")
    for name, tied in (("single", False), ("sharded", False), ("tied", True)):
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
        model = MistralForCausalLM(config)
        quantize_model(model, PRESETS["int4-g32-all" if tied else "int4-g32"])
        save_model(model, root / name, max_shard_bytes=9_000 if name == "sharded" else 10**9)
    return root


@pytest.fixture
def single(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "single", tmp_path / "single"))


@pytest.fixture
def sharded(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "sharded", tmp_path / "sharded"))
