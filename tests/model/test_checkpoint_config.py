"""A config.json that lies, code in a folder, and what chance finds: each is refused by a clear error."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brise.model.checkpoint import CheckpointError, CheckpointReader, load_model, load_tokenizer

from .damage import INDEX, ONE, Q, edit_json, edit_tensors, refused

# --- config.json


def in_entry(**changes):
    return lambda config: config["quantization_config"].update(changes)


def in_spec(**changes):
    return lambda config: config["quantization_config"]["specs"][0].update(changes)


def drop(config):
    del config["quantization_config"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(num_hidden_layers=3), ["num_hidden_layers is 3", "2 blocks"]),
        (lambda c: c.update(num_hidden_layers=1), ["num_hidden_layers is 1", "2 blocks"]),
        (lambda c: c.update(num_hidden_layers=10**12), ["2 blocks"]),
        (lambda c: c.pop("num_hidden_layers"), ["num_hidden_layers is 32", "2 blocks"]),
        (lambda c: c.update(hidden_size=64, head_dim=16), ["shape"]),
        (lambda c: c.update(hidden_size="32"), ["hidden_size"]),
        (lambda c: c.update(hidden_size=-32), ["config.json"]),
        (lambda c: c.update(intermediate_size=96), ["mlp.down_proj", "[32, 32]", "[32, 48]"]),
        (lambda c: c.update(vocab_size=41), ["[40, 32]", "[41, 32]"]),
        (lambda c: c.update(vocab_size=10**17), ["config.json", "100000000000000000"]),
        (lambda c: c.update(vocab_size=10**30), ["config.json"]),
        (lambda c: c.update(num_key_value_heads=2), ["k_proj"]),
        (lambda c: c.update(head_dim=10**9), ["k_proj", "1000000000"]),
        (lambda c: c.update(rope_parameters={"rope_type": "spiral"}), ["spiral"]),
        (lambda c: c.update(hidden_act="no such"), ["config.json"]),
        (lambda c: c.update(dtype="float99"), ["float99"]),
        (lambda c: c.update(dtype="int8"), ["int8"]),
        (lambda c: c.update(dtype="float16"), ["float32", "float16"]),
        (lambda c: c.update(dtype=7), ["dtype is 7"]),
        (lambda c: c.update(model_type="llama"), ["'mistral'", "'llama'"]),
        (lambda c: c.pop("model_type"), ["'mistral'", "None"]),
        (
            lambda c: c.update(architectures=["MistralForNothing"]),
            ["MistralForNothing", "MistralForCausalLM"],
        ),
        (lambda c: c.update(architectures="MistralForCausalLM"), ["architectures"]),
        (lambda c: c.update(architectures=["MistralForQuestionAnswering"]), ["qa_outputs", "missing"]),
        (drop, ["q_proj.weight", "missing"]),
        (lambda c: c.update(quantization_config=None), ["q_proj.weight", "missing"]),
        (lambda c: c.update(quantization_config=[1]), ["quantization_config", "list"]),
        (in_entry(quant_method="gptq"), ["bits of quantization_config", "integer"]),
        (in_entry(quant_method=None), ["'None'", "known are brise"]),
        (in_entry(format_version=2), ["format_version", "2"]),
        (in_entry(format_version="1"), ["format_version"]),
        (lambda c: c["quantization_config"].pop("format_version"), ["format_version", "None"]),
        (in_entry(colour="blue"), ["colour"]),
        (lambda c: c["quantization_config"].pop("specs"), ["specs"]),
        (in_entry(specs={}), ["specs"]),
        (in_entry(specs=[5]), ["specs"]),
        (in_entry(modules=[]), ["modules"]),
        (in_entry(modules={}), ["modules"]),
        (in_entry(config={"rules": []}), ["config"]),
        (lambda c: c["quantization_config"]["modules"].update({Q: 1}), [Q, "0..0"]),
        (lambda c: c["quantization_config"]["modules"].update({Q: True}), [Q, "0..0"]),
        (lambda c: c["quantization_config"]["modules"].update({Q: -1}), [Q, "0..0"]),
        (
            lambda c: c["quantization_config"]["modules"].update({"model.layers.7.mlp": 0}),
            ["model.layers.7.mlp"],
        ),
        (
            lambda c: c["quantization_config"]["modules"].update({"model.norm": 0}),
            ["model.norm", "no Linear"],
        ),
        (lambda c: c["quantization_config"]["modules"].update({"": 0}), ["no Linear"]),
        (lambda c: c["quantization_config"]["modules"].update({"../x": 0}), ["../x"]),
        (lambda c: c["quantization_config"]["modules"].pop(Q), [f"{Q}.weight", "missing"]),
        (
            lambda c: c["quantization_config"]["modules"].update({"lm_head": 0}),
            ["lm_head.qweight", "missing"],
        ),
        (in_spec(format="int5"), ["int5"]),
        (in_spec(format="int8"), ["qweight", "shape"]),
        (in_spec(group_size=16), ["scales", "[32, 2]"]),
        (in_spec(group_size=24), ["24"]),
        (in_spec(symmetric=False), ["zeros", "missing"]),
        (in_spec(double_quant=True), ["scales_absmax", "missing"]),
        (in_spec(scale_dtype="float32"), ["scales", "float16", "float32"]),
        (in_spec(algorithm="magic"), ["magic"]),
        (in_spec(unknown=1), ["unknown"]),
    ],
)
def test_config(single, change, words):
    edit_json(single, change)
    refused(single, *words)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (None, "missing"),
        ("", "JSON object"),
        ("{", "JSON object"),
        ("[]", "list"),
        ("{" + '"a":{' * 10**5, "deep"),
    ],
)
def test_config_that_is_none(single, text, word):
    (single / "config.json").unlink()
    if text is not None:
        (single / "config.json").write_text(text)
    refused(single, "config.json", word)


def test_config_beyond_all_size(single):
    (single / "config.json").write_text(" " * (17 << 20) + "{}")
    refused(single, "config.json", "larger than")


@pytest.mark.parametrize(
    "bad", [{"max_new_tokens": "x"}, {"compile_config": 5}, {"watermarking_config": 3}, []]
)
def test_generation_config_that_is_none(single, bad):
    (single / "generation_config.json").write_text(json.dumps(bad))
    refused(single, "generation_config.json")


def test_ties_that_disagree(made, single, tmp_path):
    tied = Path(shutil.copytree(made / "tied", tmp_path / "tied"))
    good = (tied / "config.json").read_text()
    edit_json(tied, lambda c: c["quantization_config"]["modules"].pop("lm_head"))
    refused(tied, "lm_head is tied to model.embed_tokens", "different specs")
    (tied / "config.json").write_text(good)
    edit_json(tied, lambda c: c.update(tie_word_embeddings=False))
    refused(tied, "lm_head.qweight", "missing")
    (tied / "config.json").write_text(good)
    edit_tensors(tied, lambda t: t.update({"lm_head.scales": torch.ones(1)}))
    refused(tied, "lm_head.scales", "tie_word_embeddings")
    edit_json(single, lambda c: c.update(tie_word_embeddings=True))
    refused(single, "lm_head.weight", "tie_word_embeddings")


# --- code in a folder


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_and_never_read(single, name, tmp_path):
    (single / ONE).unlink()
    (single / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    refused(single, name, "pickle", "safetensors")
    assert not (tmp_path / "ran").exists()


def test_remote_code_is_never_run(single, tmp_path):
    code = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass C: pass\nclass M: pass\n"
    (single / "modeling.py").write_text(code)
    auto_map = {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}
    edit_json(single, lambda c: c.update(auto_map=auto_map))
    load_model(single)
    edit_json(single, lambda c: c.update(architectures=["M"]))
    refused(single, "'M'")
    tokenizer = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["modeling.M", None]}}
    (single / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError):
        load_tokenizer(single)
    assert not (tmp_path / "ran").exists()


def test_folders_of_other_kinds(single):
    with pytest.raises(CheckpointError, match="no folder"):
        CheckpointReader(single / "nothing")
    (single / ONE).unlink()
    refused(single, ONE, INDEX)
    (single / "x.gguf").write_bytes(b"GGUF")
    refused(single, "x.gguf", "cut short")


# --- anything else that chance finds


@settings(max_examples=120)
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(made, tmp_path_factory, data):
    """Whatever bytes change in any file: a CheckpointError, or tensors of the shapes that the model has."""
    source = made / data.draw(st.sampled_from(["single", "sharded", "tied"]), label="folder")
    folder = tmp_path_factory.mktemp("damaged") / "m"
    shutil.copytree(source, folder)
    file = folder / data.draw(st.sampled_from(sorted(p.name for p in folder.iterdir())), label="file")
    content = bytearray(file.read_bytes())
    head = min(len(content), 4000)  # the part where structure is
    for _ in range(data.draw(st.integers(1, 4), label="edits")):
        at = min(data.draw(st.integers(0, head - 1), label="at"), len(content) - 1)
        kind = data.draw(st.sampled_from(["set", "insert", "delete"]), label="kind")
        byte = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'{}[]",:0129-')), label="byte")
        if kind == "set":
            content[at] = byte
        elif kind == "insert":
            content.insert(at, byte)
        else:
            del content[at]
    file.write_bytes(content)
    try:
        reader = CheckpointReader(folder)
        for name, tensor in reader.tensors():
            assert (tensor.dtype, tuple(tensor.shape)) == reader.info(name)
        load_model(folder)
    except CheckpointError as error:
        assert str(error)
    finally:
        shutil.rmtree(folder)
