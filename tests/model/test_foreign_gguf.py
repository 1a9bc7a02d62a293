"""GGUF written and read: blocks against the gguf package, tokenizers round trip, damaged headers in bounded time."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

from brise.model.checkpoint import CheckpointError, load_model, load_tokenizer, save_model
from brise.model.foreign.export import export_checkpoint, plan_export
from brise.model.foreign.plan import Verdict
from brise.model.foreign.reader import open_checkpoint
from brise.model.gguf import convert_gguf, open_gguf
from brise.model.mistral import MistralForCausalLM
from brise.model.reader import CheckpointReader
from brise.model.stream import quantize_checkpoint
from brise.quant.apply import quantize_model
from brise.quant.config import ConfigError, QuantConfig
from brise.quant.interop.ggml import BLOCKS
from brise.quant.linear import QuantLinear
from brise.quant.presets import PRESETS
from brise.quant.rtn import rtn

gguf = pytest.importorskip("gguf")
IDS = torch.arange(12)[None] * 7 % 40


def tiny(tied: bool = False) -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=None,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            bos_token_id=256,
            eos_token_id=257,
            max_position_embeddings=64,
        )
    )


def add_tokenizer(folder) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"<s>": 256, "</s>": 257, "he": 258, "Ġt": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = "{{ messages }}"
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for name, tied, format in (("q4_0", False, "int4"), ("q8_0", True, "int8"), ("dense", False, None)):
        model = tiny(tied)
        if format is not None:
            rule = {"match": "*", "format": format, "group_size": 32}
            quantize_model(model, QuantConfig.from_dict({"rules": [rule]}))
        save_model(model, root / name)
        add_tokenizer(root / name)
    return root


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_blocks_are_what_the_gguf_package_reads_and_writes(kind):
    block = BLOCKS[kind]
    q = rtn(torch.randn(6, 128), block.spec)
    rows = block.write(q)
    stored = gguf.GGMLQuantizationType[kind]
    assert np.array_equal(gguf.dequantize(rows.numpy(), stored), q.dequantize().numpy())
    theirs = torch.from_numpy(gguf.quantize(torch.randn(6, 128).numpy(), stored))
    read = block.read(theirs, block.spec, (6, 128))
    assert torch.equal(block.write(read), theirs)
    assert np.array_equal(gguf.dequantize(theirs.numpy(), stored), read.dequantize().numpy())
    with pytest.raises(ValueError, match="takes uint8"):
        block.read(theirs[:, 1:], block.spec, (6, 128))


def test_a_file_is_quantized_again_from_what_it_decodes_to(sources, tmp_path):
    """Against transformers' own reader of the file, and plain rounding."""
    export_checkpoint(sources / "q8_0", tmp_path / "out", "gguf-q8_0")
    file = tmp_path / "out" / "out-Q8_0.gguf"
    report = quantize_checkpoint(file, tmp_path / "q", PRESETS["int4-g32-all"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=file.name, dtype=torch.float32)
    made = CheckpointReader(tmp_path / "q")
    assert len(report.quantized) == 2 * 7 + 2
    for path in [o.path for o in report.quantized if o.path != "lm_head"]:  # which is tied
        expected = rtn(theirs.get_submodule(path).weight.detach(), PRESETS["int4-g32-all"].rules[0].spec)
        for name, tensor in expected.tensors.items():
            assert torch.equal(made.tensor(f"{path}.{name}"), tensor), path
    ours, of_file = load_tokenizer(tmp_path / "q"), load_tokenizer(file)
    assert ours("the wind")["input_ids"] == of_file("the wind")["input_ids"]


def test_a_minimum_in_place_of_a_zero_point(sources, tmp_path):
    """Q4_1 is read with its own codes, scales and minimums; int4 with zero points becomes Q4_1, rounded."""
    model = tiny()
    rule = {"match": "*layers.*", "format": "int4", "group_size": 32, "symmetric": False}
    quantize_model(model, QuantConfig.from_dict({"rules": [rule]}))
    save_model(model, tmp_path / "asym")
    plan = export_checkpoint(tmp_path / "asym", tmp_path / "out", "gguf-q4_1")
    assert {s.verdict for s in plan.steps} == {Verdict.ROUNDED} and 0 < plan.rounding <= 2**-11
    file = tmp_path / "out" / "out-Q4_1.gguf"
    for stored in open_gguf(file).tensors:
        if stored.tensor_type.name == "Q4_1" and "ffn_down" in stored.name:
            path = f"model.layers.{stored.name.split('.')[1]}.mlp.down_proj"
            q = load_model(file).get_submodule(path).quantized()
            assert q.spec.format == "int4_min"
            assert np.array_equal(gguf.dequantize(stored.data, stored.tensor_type), q.dequantize().numpy())
            exact = model.get_submodule(path).quantized().dequantize()
            torch.testing.assert_close(q.dequantize(), exact, rtol=0, atol=float(exact.abs().max()) * 2**-9)
    export_checkpoint(file, tmp_path / "ours", "brise")
    again = export_checkpoint(tmp_path / "ours", tmp_path / "again", "gguf-q4_1")
    assert again.lossless
    assert (tmp_path / "again" / "again-Q4_1.gguf").read_bytes() == file.read_bytes()
    torch.testing.assert_close(load_model(tmp_path / "ours")(IDS).logits, load_model(file)(IDS).logits)
    sym = export_checkpoint(sources / "q4_0", tmp_path / "sym", "gguf-q4_1")
    assert sym.lossless, "8 times a float16 is one"
    for format, why in (("gptq_v2", "not int4_min"), ("awq", "another grid"), ("gguf-q8_0", "another grid")):
        with pytest.raises(CheckpointError, match=why):
            export_checkpoint(file, tmp_path / "x", format)
    with pytest.raises(ConfigError, match="choose one of nf4"):
        quantize_model(tiny(), QuantConfig.from_dict({"rules": [{"match": "*", "format": "int4_min",
                                                                 "symmetric": False}]}))  # fmt: skip


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_a_file_gives_the_model_that_was_written(sources, tmp_path, kind):
    plan = export_checkpoint(sources / kind, tmp_path / "out", f"gguf-{kind}")
    assert plan.lossless and {s.verdict for s in plan.steps} == {Verdict.EXACT}
    file = tmp_path / "out" / f"out-{kind.upper()}.gguf"
    before, after = load_model(sources / kind), load_model(file)
    for path, module in before.named_modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(
                module.quantized().dequantize(), after.get_submodule(path).quantized().dequantize()
            )
    torch.testing.assert_close(before(IDS).logits, after(IDS).logits, rtol=1e-5, atol=1e-5)
    # transformers' own reader, which undoes the interleaving of Q and K in a way of its own
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=file.name)
    torch.testing.assert_close(before(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    export_checkpoint(file, tmp_path / "ours", "brise")
    again = export_checkpoint(tmp_path / "ours", tmp_path / "again", f"gguf-{kind}")
    assert again.lossless
    written = (tmp_path / "again" / f"again-{kind.upper()}.gguf").read_bytes()
    assert written == file.read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"llama-cli -m out/out-{kind.upper()}.gguf" in card


def test_halves_and_what_is_not_quantized(sources, tmp_path):
    with pytest.raises(CheckpointError, match="not quantized; pass --requantize"):
        export_checkpoint(sources / "dense", tmp_path / "out", "gguf-q4_0")
    plan = export_checkpoint(sources / "dense", tmp_path / "half", "gguf-f16")
    assert not plan.lossless and f"{2**-11:.2e}" in plan.describe()
    exact, half = tiny(), load_model(tmp_path / "half" / "half-F16.gguf")
    for (name, a), b in zip(exact.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(b, a if a.ndim == 1 else a.half().float()), name
    export_checkpoint(sources / "dense", tmp_path / "out", "gguf-q8_0", requantize=True)
    stored = {t.name: t.tensor_type.name for t in open_gguf(tmp_path / "out" / "out-Q8_0.gguf").tensors}
    assert stored["blk.0.attn_q.weight"] == "Q8_0"
    assert stored["token_embd.weight"] == stored["output_norm.weight"] == "F32"
    assert plan_export(sources / "q8_0", "gguf-q4_0").of(Verdict.REQUANTIZED)


def test_a_window_goes_along_and_what_llama_cpp_makes_of_it_is_said(sources, tmp_path):
    model = tiny()
    model.config.sliding_window = 5
    save_model(model, tmp_path / "src")
    add_tokenizer(tmp_path / "src")
    plan = export_checkpoint(tmp_path / "src", tmp_path / "out", "gguf-f16")
    file = tmp_path / "out" / "out-F16.gguf"
    stored = open_gguf(file).fields["llama.attention.sliding_window"]
    assert stored.contents() == 5 and stored.types == [gguf.GGUFValueType.UINT32]
    again = load_model(file)
    assert again.config.sliding_window == 5
    torch.testing.assert_close(
        again(IDS).logits, load_model(tmp_path / "src")(IDS).logits, rtol=0.01, atol=0.01
    )
    assert (
        json.loads((convert_gguf(file, tmp_path / "dense") / "config.json").read_text())["sliding_window"]
        == 5
    )
    for text in (plan.describe(), (tmp_path / "out" / "README.md").read_text()):
        assert "window of 5, but llama.cpp" in text and "beyond 5 positions" in text
    # nothing to say: full attention, a window as long as the model, another format
    assert not plan_export(sources / "dense", "gguf-f16").notes
    assert not plan_export(tmp_path / "src", "gptq_v2").notes
    assert "llama.attention.sliding_window" not in open_gguf(written(sources, tmp_path)).fields
    model.config.sliding_window = 64
    save_model(model, tmp_path / "long")
    assert not plan_export(tmp_path / "long", "gguf-f16").notes


def written(sources, tmp_path):
    export_checkpoint(sources / "dense", tmp_path / "full", "gguf-f16")
    return tmp_path / "full" / "full-F16.gguf"


@pytest.mark.parametrize(
    "change, says",
    [({"hidden_act": "gelu"}, "hidden_act is 'gelu'"), ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
     ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'linear'")],
)  # fmt: skip
def test_what_a_llama_section_cannot_say_is_refused(sources, tmp_path, change, says):
    shutil.copytree(sources / "dense", tmp_path / "src")
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    (tmp_path / "src" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=says):
        export_checkpoint(tmp_path / "src", tmp_path / "out", "gguf-f16")
    assert not (tmp_path / "out").exists()


def unusual(**changes) -> MistralForCausalLM:
    """A model none of whose sizes and constants is what it would be by default."""
    torch.manual_seed(1)
    config = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
              "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24, "max_position_embeddings": 77,
              "rms_norm_eps": 3e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 123.0},
              "sliding_window": 9, "initializer_range": 0.2, "bos_token_id": 7, "eos_token_id": 8,
              "pad_token_id": 9}  # fmt: skip
    return MistralForCausalLM(MistralConfig(**config | changes))


def test_every_size_and_constant_goes_along(tmp_path):
    model = unusual()
    save_model(model, tmp_path / "src")
    (tmp_path / "src" / "LICENSE").write_text("Do as you like.")
    export_checkpoint(tmp_path / "src", tmp_path / "out", "gguf-f16")
    file = tmp_path / "out" / "out-F16.gguf"
    again = load_model(file)
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                "max_position_embeddings", "rms_norm_eps", "sliding_window", "vocab_size"):  # fmt: skip
        assert getattr(again.config, key) == getattr(model.config, key), key
    assert again.config.rope_parameters["rope_theta"] == 123.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.half())
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    # enum llama_ftype of llama.h
    assert open_gguf(file).fields["general.file_type"].contents() == 1
    export_checkpoint(tmp_path / "src", tmp_path / "q4", "gguf-q4_0", requantize=True)
    assert open_gguf(tmp_path / "q4" / "q4-Q4_0.gguf").fields["general.file_type"].contents() == 2
    assert (tmp_path / "out" / "LICENSE").read_text() == "Do as you like."


@pytest.mark.parametrize(
    "change, says",
    [(lambda s: s.pop("model.norm.weight"), "the tensor model.norm.weight is missing"),
     (lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "1 tensors have no place"),
     (lambda s: s["lm_head.weight"].__setitem__((0, 0), 1e6), "do not fit torch.float16")],
)  # fmt: skip
def test_tensors_that_make_no_file(sources, tmp_path, change, says):
    shutil.copytree(sources / "dense", tmp_path / "src")
    stored = load_file(tmp_path / "src" / "model.safetensors")
    change(stored)
    save_file(stored, tmp_path / "src" / "model.safetensors")
    with pytest.raises(CheckpointError, match=says):
        export_checkpoint(tmp_path / "src", tmp_path / "out", "gguf-f16")
    assert not (tmp_path / "out").exists()


def test_types_without_a_spec_are_decoded(sources, tmp_path):
    convert = tmp_path / "k.gguf"
    export_checkpoint(sources / "q8_0", tmp_path / "out", "gguf-q8_0")
    reader = open_gguf(tmp_path / "out" / "out-Q8_0.gguf")
    kind, changed = gguf.GGMLQuantizationType.Q5_0, {}
    for tensor in reader.tensors:
        if "ffn_up" in tensor.name:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            changed[tensor.name] = (gguf.quantize(values, kind), kind)
    rewritten(reader, convert, changed)
    opened = open_checkpoint(convert)
    assert opened.decoded == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert opened.info("model.layers.0.mlp.up_proj.weight") == (torch.float32, (96, 64))
    dense = load_model(convert_gguf(convert, tmp_path / "dense"))
    torch.testing.assert_close(load_model(convert)(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, halves", [("Q4_K", (0, 2)), ("Q6_K", (208,)), ("Q2_K", (80, 82))])
def test_k_quants_are_decoded_as_the_gguf_package_does(tmp_path, kind, halves):
    """Their blocks of 256, random bytes but for the scales in half precision; each row and column as it lies."""
    stored = gguf.GGMLQuantizationType[kind]
    model = unusual(intermediate_size=256)
    save_model(model, tmp_path / "src")
    add_tokenizer(tmp_path / "src")
    export_checkpoint(tmp_path / "src", tmp_path / "out", "gguf-f16")
    reader = open_gguf(tmp_path / "out" / "out-F16.gguf")
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (64, gguf.GGML_QUANT_SIZES[stored][1]), dtype=np.uint8)
    for at in halves:
        blocks[:, at : at + 2] = rng.random((64, 1)).astype(np.float16).view(np.uint8)
    file = rewritten(reader, tmp_path / "k.gguf", {"blk.0.ffn_down.weight": (blocks, stored)})
    opened = open_checkpoint(file)
    path = "model.layers.0.mlp.down_proj"
    assert opened.decoded == [path]
    theirs = gguf.dequantize(blocks, stored)
    assert np.array_equal(opened.tensor(f"{path}.weight").numpy(), theirs) and theirs.shape == (64, 256)
    assert torch.equal(load_model(file).get_submodule(path).weight, torch.from_numpy(theirs))
    plan = plan_export(file, "gguf-q4_0")
    assert [s.why for s in plan.steps if s.path == path] == ["its blocks have no spec here"]


def rewritten(reader, path, changed):
    """A copy of a GGUF file with other tensors: name -> (bytes, type)."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        data, kind = changed.get(tensor.name, (tensor.data, tensor.tensor_type))
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def header(*parts: bytes, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(parts)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "no GGUF": (b"GGML" + bytes(100), "does not begin"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "version"),
    "keys without end": (header(keys=2**60), "claims"),
    "tensors without end": (header(tensors=2**60), "claims"),
    "a name of an exabyte": (header(struct.pack("<Q", 2**60), keys=1), "string of"),
    "an array of 2^40 bytes": (header(string(b"a"), struct.pack("<IIQ", 9, 0, 2**40), keys=1), "claims"),
    "strings of nothing, 2^22": (header(string(b"a"), struct.pack("<IIQ", 9, 8, 2**22), keys=1), "cut short"),
    "arrays in arrays": (
        header(string(b"a"), struct.pack("<IIQ", 9, 9, 1), bytes(20), keys=1),
        "array of the",
    ),
    "a key twice": (header(*[string(b"a") + struct.pack("<II", 4, 1)] * 2, keys=2), "comes twice"),
    "a tensor twice": (header(*[tensor(b"t", (8,))] * 2, bytes(96), tensors=2), "comes twice"),
    "overlapping": (header(tensor(b"a", (8,)), tensor(b"b", (8,)), bytes(96), tensors=2), "overlaps"),
    "sizes that overflow": (header(tensor(b"a", (2**33, 2**33)), tensors=1), "shape"),
    "behind the end": (header(tensor(b"a", (8,), offset=2**50), tensors=1), "end at byte"),
    "an unknown type": (header(tensor(b"a", (8,), kind=999), tensors=1), "unknown type"),
    "nine dimensions": (header(tensor(b"a", (1,) * 9), tensors=1), "9 dimensions"),
    "no alignment": (
        header(string(b"general.alignment"), struct.pack("<II", 4, 3), keys=1),
        "no power of two",
    ),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_at_once(tmp_path, case):
    data, says = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    if "cut" not in says and "end at" not in says:
        with path.open("r+b") as file:  # a sparse terabyte behind it
            file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(path)


def test_a_folder_with_one_file_is_that_file(sources, tmp_path):
    export_checkpoint(sources / "q4_0", tmp_path / "out", "gguf-q4_0")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    torch.testing.assert_close(
        load_model(tmp_path / "out")(IDS).logits, load_model(sources / "q4_0")(IDS).logits
    )
