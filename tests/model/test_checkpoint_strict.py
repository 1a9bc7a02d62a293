"""Damaged and hostile folders: each kind is planted, and refused by an error that names it."""

import json
import os
import pickle
import resource
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import MistralConfig

from brise.model.checkpoint import CheckpointError, CheckpointReader, load_model, load_tokenizer, save_model
from brise.model.mistral import MistralForCausalLM
from brise.quant.apply import quantize_model
from brise.quant.presets import PRESETS

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three good folders of one quantized model: a single file, shards with an index, and tied."""
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
def single(made, tmp_path):
    return Path(shutil.copytree(made / "single", tmp_path / "single"))


@pytest.fixture
def sharded(made, tmp_path):
    return Path(shutil.copytree(made / "sharded", tmp_path / "sharded"))


def refused(folder, *words):
    """Loading is refused by a message that has all the words, quickly and in one line's worth of text."""
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert len(message) < 2000 and time.monotonic() - start < 10


def read_raw(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(folder, change):
    header, data = read_raw(folder / ONE)
    write_raw(folder / ONE, change(header) or header, data)


def edit_tensors(folder, change, file=ONE):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def edit_json(folder, change, file="config.json"):
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))


def test_the_folders_are_good(made):
    for name in ("single", "sharded", "tied"):
        load_model(made / name)
    assert (made / "sharded" / INDEX).exists()


# --- a file that is cut, or whose header lies


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -1])
def test_truncated(single, keep):
    data = (single / ONE).read_bytes()
    (single / ONE).write_bytes(data[:keep])
    refused(single, ONE, "fetch it again")


def test_truncated_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(sharded, shard.name, "truncated")


def test_trailing_bytes(single):
    with (single / ONE).open("ab") as file:
        file.write(b"x")
    refused(single, ONE, "belongs to no tensor")


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 10**7])
def test_absurd_header_length(single, length):
    data = (single / ONE).read_bytes()
    (single / ONE).write_bytes(struct.pack("<Q", length) + data[8:])
    refused(single, ONE, str(length))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "header"),
        (b"[]", "expected a JSON object"),
        (b"\xff\xfe{}", "header"),
        (b"{" + b" " * 50, "header"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deep"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": 1, "a": 2}', "'a' comes twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "header"),
        (b'{"__metadata__": {"format": 1}}', "__metadata__"),
        (b'{"__metadata__": 3}', "__metadata__"),
    ],
)
def test_header_that_is_no_header(single, text, word):
    write_raw(single / ONE, text, b"")
    refused(single, ONE, word)


def entry(**changes):
    def change(header):
        header[NORM] = header[NORM] | changes
        for key in [k for k, v in changes.items() if v is ...]:
            del header[NORM][key]

    return change


BIG = 2**62


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (entry(dtype="F99"), "F99"),
        (entry(dtype=["F32"]), "dtype"),
        (entry(dtype=...), "must have dtype"),
        (entry(more=1), "must have dtype"),
        (entry(shape=[-32]), "-32"),
        (entry(shape=[32.0]), "32.0"),
        (entry(shape=[True] * 32), "sizes"),
        (entry(shape="32"), "sizes"),
        (entry(shape=[1] * 100 + [32]), "sizes"),
        (entry(shape=[BIG, BIG, 0]), "takes 0 bytes"),
        (entry(shape=[BIG, BIG]), "takes"),
        (entry(shape=[2**64 + 32]), "sizes"),
        (entry(shape=[33]), "takes 132 bytes"),
        (entry(data_offsets=[0]), "offsets"),
        (entry(data_offsets=[128, 0]), "offsets"),
        (entry(data_offsets=[-128, 0]), "offsets"),
        (entry(data_offsets=[0, 10**30]), "offsets"),
        (entry(data_offsets=[10**12, 10**12 + 128]), "belong to no tensor"),
        (lambda header: header.update({NORM: 5}), "must have dtype"),
        (lambda header: header.update(x={"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}), "overlaps"),
        (lambda header: header.update(x=dict(header[NORM])), "overlaps"),
    ],
)
def test_header_entries(single, change, word):
    edit_header(single, change)
    refused(single, ONE, word)


def test_offsets_past_the_end_and_gaps(single):
    header, data = read_raw(single / ONE)
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    begin, end = header[last]["data_offsets"]
    longer = {**header[last], "shape": [end - begin + 4], "dtype": "U8", "data_offsets": [begin, end + 4]}
    write_raw(single / ONE, {**header, last: longer}, data)
    refused(single, ONE, "truncated")
    moved = {**header[last], "data_offsets": [begin + 4, end + 4]}
    write_raw(single / ONE, {**header, last: moved}, data + b"0000")
    refused(single, ONE, last, "4 bytes between")


def test_huge_sparse_file(single):
    """A terabyte of nothing, well described but no tensor of the model's: it is never read."""
    size = 1 << 40
    described = {"lm_head.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    write_raw(single / ONE, described, b"")
    try:
        os.truncate(single / ONE, (single / ONE).stat().st_size + size)
    except OSError:
        pytest.skip("this file system has no files of a terabyte")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(single, "0 blocks")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_many_empty_tensors_are_bounded(single):
    header = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    write_raw(single / ONE, header, b"")
    refused(single, "0 blocks")


# --- tensors that are not the model's


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), [NORM, "missing"]),
        (lambda t: t.pop(f"{Q}.scales"), [f"{Q}.scales", "missing"]),
        (lambda t: t.update(extra=torch.ones(1)), ["extra", "no place"]),
        (lambda t: t.update({f"{Q}.zeros": torch.ones(1)}), [f"{Q}.zeros", "no place"]),
        (lambda t: t.update({f"{Q}.weight": torch.ones(32, 32)}), [f"{Q}.weight", "no place"]),
        (lambda t: t.update({NORM: torch.ones(33)}), [NORM, "[33]", "[32]"]),
        (lambda t: t.update({NORM: torch.ones(32, 1)}), [NORM, "[32, 1]", "[32]"]),
        (
            lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].T.contiguous()}),
            [f"{Q}.qweight", "[16, 32]"],
        ),
        (lambda t: t.update({NORM: torch.ones(32).half()}), [NORM, "float16", "float32"]),
        (lambda t: t.update({NORM: torch.ones(32).int()}), [NORM, "int32", "floating-point"]),
        (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].char()}), [f"{Q}.qweight", "int8", "uint8"]),
        (
            lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].float()}),
            [f"{Q}.scales", "float32", "float16"],
        ),
    ],
)
def test_tensors(single, change, words):
    edit_tensors(single, change)
    refused(single, *words)


def test_no_dtype_is_cast_unasked(single):
    edit_tensors(single, lambda t: t.update({NORM: torch.full((32,), 2.0).half()}))
    assert load_model(single, dtype=torch.float32).model.norm.weight.dtype == torch.float32
    with pytest.raises(CheckpointError, match="int32"):
        edit_tensors(single, lambda t: t.update({NORM: torch.ones(32).int()}))
        load_model(single, dtype=torch.float32)


# --- the index


def edit_map(folder, change):
    edit_json(folder, lambda index: change(index["weight_map"]), INDEX)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "a/../../x.safetensors", "..", ""]
)
def test_index_names_a_file_outside(sharded, name):
    shutil.copy(next(sharded.glob("model-*")), sharded.parent / "outside.safetensors")
    edit_map(sharded, lambda m: m.update({NORM: name}))
    refused(sharded, "in this folder" if name.endswith("s") else INDEX)


@pytest.mark.parametrize("which", ["shard", "index", "config"])
def test_link_that_leads_out(sharded, which):
    name = {"shard": sorted(sharded.glob("model-*"))[0].name, "index": INDEX, "config": "config.json"}[which]
    (sharded / name).rename(sharded.parent / "elsewhere")
    (sharded / name).symlink_to(sharded.parent / "elsewhere")
    refused(sharded, name, "leads out of the folder")
    (sharded / name).unlink()
    (sharded / name).symlink_to(name)
    refused(sharded, name, "leads nowhere")


def test_link_within_the_folder_is_fine(sharded):
    shard = sorted(sharded.glob("model-*"))[0]
    shard.rename(sharded / "blob")
    shard.symlink_to("blob")
    load_model(sharded)


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
def test_shard_that_is_none(sharded, kind):
    shard = sorted(sharded.glob("model-*"))[1]
    shard.unlink()
    if kind == "folder":
        shard.mkdir()
    elif kind == "fifo":
        os.mkfifo(shard)
    refused(sharded, shard.name, "missing" if kind == "missing" else "no regular file")


def test_index_and_shards_disagree(sharded):
    good = (sharded / INDEX).read_text()
    weight_map = json.loads(good)["weight_map"]
    first, second = sorted(set(weight_map.values()))[:2]
    in_first = next(n for n, f in weight_map.items() if f == first)

    edit_map(sharded, lambda m: m.update({in_first: second}))
    refused(sharded, INDEX, f"{second} holds {in_first}, but {first} does")
    (sharded / INDEX).write_text(good)
    edit_map(sharded, lambda m: m.update({"ghost": second}))
    refused(sharded, INDEX, "ghost", "does not")
    (sharded / INDEX).write_text(good)
    edit_map(sharded, lambda m: m.pop(in_first))
    refused(sharded, in_first, "does not list")
    (sharded / INDEX).write_text(good)
    edit_map(sharded, lambda m: m.update({in_first: "weights.bin"}))
    refused(sharded, "weights.bin", ".safetensors")
    for bad in ({"weight_map": []}, {"weight_map": {"a": 1}}, {}, {"metadata": {}}):
        (sharded / INDEX).write_text(json.dumps(bad))
        refused(sharded, INDEX, "weight_map")
    (sharded / INDEX).write_text("[]")
    refused(sharded, INDEX, "JSON object")
    (sharded / INDEX).unlink()
    refused(sharded, INDEX, "fetch the index")


def test_tensor_in_two_shards(sharded):
    first, second = sorted(p.name for p in sharded.glob("model-*"))[:2]
    name = next(iter(load_file(sharded / first)))
    edit_tensors(sharded, lambda t: t.update({name: torch.ones(1)}), second)
    refused(sharded, name, "two shards", first, second)


def test_single_file_beside_a_foreign_index(made, sharded):
    shutil.copy(made / "single" / ONE, sharded)
    refused(sharded, ONE, INDEX, "which one")


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
        (in_entry(quant_method="gptq"), ["'brise'", "gptq"]),
        (in_entry(quant_method=None), ["'brise'", "None"]),
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
    refused(single, "x.gguf", "convert")


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
        at = data.draw(st.integers(0, head - 1), label="at")
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
