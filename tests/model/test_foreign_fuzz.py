"""Every reader under random damage: it reads, or it says CheckpointError; never anything else, never for long.

BRISE_FUZZ is the number of damaged checkpoints a test tries; ``make fuzz`` tries many.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import MistralConfig

from brise.model.checkpoint import CheckpointError, save_model
from brise.model.foreign.doctor import examine
from brise.model.foreign.export import export_checkpoint
from brise.model.foreign.reader import open_checkpoint
from brise.model.mistral import MistralForCausalLM
from brise.quant.apply import quantize_model
from brise.quant.config import QuantConfig

EXAMPLES = int(os.environ.get("BRISE_FUZZ", "12"))
MADE = {
    "brise": ("int4", None),
    "gptq": ("int4", "gptq"),
    "gptq_v2": ("asym", "gptq_v2"),
    "awq": ("asym", "awq"),
    "compressed-tensors": ("asym", "compressed-tensors"),
    "bitsandbytes": ("nf4", "bitsandbytes"),
    "bitsandbytes-int8": ("int8", "bitsandbytes-int8"),
    "gguf": ("int4", "gguf-q4_0"),
}
RULES = {
    "int4": {"format": "int4", "group_size": 32},
    "asym": {"format": "int4", "group_size": 32, "symmetric": False},
    "nf4": {"format": "nf4", "group_size": 32, "double_quant": True},
    "int8": {"format": "int8"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    for name, rule in RULES.items():
        torch.manual_seed(0)
        model = MistralForCausalLM(
            MistralConfig(
                vocab_size=32,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                sliding_window=None,
            )
        )
        quantize_model(model, QuantConfig.from_dict({"rules": [{"match": "*layers.*", **rule}]}))
        save_model(model, root / f"src-{name}")
    for name, (source, format) in MADE.items():
        if name == "gguf":
            pytest.importorskip("gguf")
        if format is None:
            shutil.copytree(root / f"src-{source}", root / name)
        else:
            export_checkpoint(root / f"src-{source}", root / name, format)
    (root / "work").mkdir()
    return root


def read_all(folder: Path) -> None:
    """Open it and read every tensor; CheckpointError is an answer."""
    try:
        reader = open_checkpoint(folder)
        for name in reader.names:
            dtype, shape = reader.info(name)
            tensor = reader.tensor(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
    except CheckpointError as error:
        assert 0 < len(str(error)) < 3000
    for finding in examine(folder).findings:
        assert 0 < len(str(finding)) < 4000


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-5, 2**40), max_size=4),
)


@st.composite
def damage(draw):
    """What is done to one file: bytes changed, cut out or put in; or a value of a JSON changed or removed."""
    kind = draw(st.sampled_from(["bytes", "bytes", "cut", "insert", "json", "json", "json", "drop"]))
    at = draw(st.integers(0, 2**30))
    early = draw(st.booleans())
    return kind, at, early, draw(st.binary(min_size=1, max_size=12)), draw(values)


def places(value, path=()):
    """Paths to every value in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def apply(folder: Path, what) -> None:
    kind, at, early, data, value = what
    if kind in ("json", "drop"):
        document = json.loads((folder / "config.json").read_text())
        found = list(places(document))
        if early:  # rather in what says how it is quantized
            found = [p for p in found if p[0] == "quantization_config"] or found
        *way, last = found[at % len(found)]
        inner = document
        for key in way:
            inner = inner[key]
        if kind == "json":
            inner[last] = value
        else:
            del inner[last]
        (folder / "config.json").write_text(json.dumps(document))
        return
    file = next(p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".gguf"))
    raw = bytearray(file.read_bytes())
    at %= min(len(raw), 3000) if early else len(raw)
    if kind == "bytes":
        raw[at : at + len(data)] = data
    elif kind == "cut":
        del raw[at : at + len(data)]
    else:
        raw[at:at] = data
    file.write_bytes(raw)


@pytest.mark.timeout(0 if EXAMPLES > 100 else 120)
@pytest.mark.parametrize("name", MADE)
def test_a_damaged_checkpoint_is_read_or_refused(folders, name):
    @given(st.lists(damage(), min_size=1, max_size=2))
    @settings(derandomize=True, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    def check(changes):
        work = folders / "work" / name
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folders / name, work)
        for change in changes:
            apply(work, change)
        read_all(work)

    check()
