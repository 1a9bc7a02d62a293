"""Proof by the peer: each library loads what is written here and gives our logits; what it writes is read here.

Run by ``make interop``, which makes an environment for every library. Elsewhere these tests are skipped; the golden
files of tests/golden/interop stand in for them.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from brise.model.checkpoint import load_model
from brise.model.foreign.doctor import examine
from brise.model.foreign.export import export_checkpoint
from brise.model.stream import quantize_checkpoint
from brise.quant.config import QuantConfig

ROOT = os.environ.get("BRISE_INTEROP")
pytestmark = pytest.mark.skipif(ROOT is None, reason="needs the peers' environments: make interop")
ORDER = {"algorithm": "gptq", "options": {"act_order": True, "static_groups": False}}
RULES = {
    "sym": {"format": "int4", "group_size": 32},
    "asym": {"format": "int4", "group_size": 32, "symmetric": False},
    "order": {"format": "int4", "group_size": 32, **ORDER},
    "int2": {"format": "int2", "group_size": 32},
    "int3": {"format": "int3", "group_size": 32},
    "row8": {"format": "int8"},
    "nf4-dq": {"format": "nf4", "double_quant": True},
    "fp4": {"format": "fp4"},
}
# (ours, format, library)
CASES = [
    ("sym", "gptq", "gptqmodel"),
    ("sym", "gptq_v2", "gptqmodel"),
    ("asym", "gptq_v2", "gptqmodel"),
    ("order", "gptq", "gptqmodel"),
    ("int2", "gptq", "gptqmodel"),
    ("int3", "gptq", "gptqmodel"),
    ("row8", "gptq", "gptqmodel"),
    ("asym", "awq", "gptqmodel"),
    ("sym", "awq", "gptqmodel"),
    ("sym", "compressed-tensors", "compressed-tensors"),
    ("asym", "compressed-tensors", "compressed-tensors-0.17"),
    ("row8", "compressed-tensors", "compressed-tensors"),
    ("nf4-dq", "bitsandbytes", "bitsandbytes"),
    ("fp4", "bitsandbytes", "bitsandbytes"),
    ("row8", "bitsandbytes-int8", "bitsandbytes"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("peers")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
        tie_word_embeddings=False,
        initializer_range=0.2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    MistralForCausalLM(config).save_pretrained(root / "source")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {role: alphabet[i] for i, role in enumerate(("bos_token", "eos_token", "pad_token"))}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(root / "source")
    torch.save(torch.randint(0, 256, (1, 24)), root / "ids.pt")
    for name, rule in RULES.items():
        chosen = QuantConfig.from_dict({"rules": [{"match": "*layers.*", **rule}]})
        ids = torch.randint(0, 256, (8, 32)) if chosen.needs_calibration else None
        quantize_checkpoint(root / "source", root / name, chosen, calibration=ids)
    return root


def peer(library: str, *args: object) -> None:
    python = Path(str(ROOT)) / library / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no environment of {library} in {ROOT}")
    command = [str(python), str(Path(__file__).parent / "peer.py"), *map(str, args)]
    # gptqmodel writes logs where it is started
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, cwd=Path(str(args[-1])).parent
    )
    assert done.returncode == 0, done.stderr[-3000:]


def logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, dtype=dtype)(ids).logits.float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name, format, library", CASES)
def test_the_peer_loads_what_is_written_here(root, tmp_path, name, format, library):
    assert export_checkpoint(root / name, tmp_path / "out", format).lossless
    peer(library, "load", library, tmp_path / "out", root / "ids.pt", tmp_path / "logits.pt")
    ids, (theirs, *fast) = torch.load(root / "ids.pt"), torch.load(tmp_path / "logits.pt")
    exact = logits(root / name, ids)
    if format == "bitsandbytes-int8":
        assert distance(theirs, exact) < 0.05, "LLM.int8 rounds the activations to 8 bits as well"
    elif library == "gptqmodel":  # it computes in float16
        half = distance(logits(root / name, ids, torch.float16), exact)
        assert distance(theirs, exact) < 2 * half + 2e-3
    else:
        assert distance(theirs, exact) < 1e-5
    if library == "bitsandbytes" and format != "bitsandbytes-int8":  # on its way through bfloat16
        half = distance(logits(root / name, ids, torch.bfloat16), exact)
        assert distance(fast[0], exact) < 2 * half


@pytest.mark.parametrize("library", ["gptqmodel", "bitsandbytes", "compressed-tensors"])
def test_what_the_peer_makes_is_read_here(root, tmp_path, library):
    peer(library, "make", library, root / "source", tmp_path / "theirs")
    assert examine(tmp_path / "theirs", root / "source").findings == []
    peer(library, "load", library, tmp_path / "theirs", root / "ids.pt", tmp_path / "logits.pt")
    ids, theirs = torch.load(root / "ids.pt"), torch.load(tmp_path / "logits.pt")[0]
    ours = logits(tmp_path / "theirs", ids)
    assert distance(theirs, ours) < (1e-2 if library == "gptqmodel" else 1e-5)
