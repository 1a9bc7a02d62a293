"""Reading GGUF: a tiny file written with the gguf package, and the real model against transformers."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralForCausalLM

from brise.model.gguf import GGUFError, convert_gguf, open_gguf, plan_tensors, read_config

gguf = pytest.importorskip("gguf")

TOKENS = ["<|end|>", "<|im|>", "<tool>", *"abcdefghij", "Ġ", *"0123456789", "ab", "Ġc", "ĠĠ", "Ġ1", "12"]
MERGES = ["a b", "Ġ c", "Ġ Ġ", "Ġ 1", "1 2"]
TYPES = [3, 3, 4] + [1] * (len(TOKENS) - 3)
SHORT = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own permutation on writing: the two halves of each head interleaved."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(path, model, *, qtype="F32", arch="llama", keys=None, drop=(), extra=None, tokenizer=None):
    """Write `model` as llama.cpp's converter does; `keys`, `drop`, `extra` and `tokenizer` plant faults."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    section = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": 16,
        **(keys or {}),
    }
    for key, value in section.items():
        if value is not None:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.rope.freq_base", 1e5)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    ggml = {"model": "gpt2", "pre": "smollm", "tokens": TOKENS, "merges": MERGES, **(tokenizer or {})}
    writer.add_tokenizer_model(ggml["model"])
    if ggml["pre"] is not None:
        writer.add_tokenizer_pre(ggml["pre"])
    if ggml["tokens"]:
        writer.add_token_list(ggml["tokens"])
        writer.add_token_types(TYPES)
    writer.add_token_merges(ggml["merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(ggml.get("add_bos", False))
    writer.add_chat_template("{{ messages[0]['content'] }}")

    tensors = {}
    for name, value in model.state_dict().items():
        weight = value.numpy()
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            rest = rest.removesuffix(".weight")
            short = f"blk.{layer}.{SHORT[rest]}.weight"
            if SHORT[rest] in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if SHORT[rest] == "attn_q" else config.num_key_value_heads
                weight = permute(weight, heads)
        else:
            short = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
            if short == "output.weight" and config.tie_word_embeddings:
                continue
        tensors[short] = weight
    tensors.update(extra or {})
    for short, weight in tensors.items():
        if short in drop:
            continue
        kind = gguf.GGMLQuantizationType[qtype if weight.ndim == 2 else "F32"]
        writer.add_tensor(short, gguf.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_is_a_mistral_with_llamas_logits(tied, tmp_path):
    llama = tiny_llama(tied)
    out = convert_gguf(write_gguf(tmp_path / "m.gguf", llama), tmp_path / "out")
    mistral, info = MistralForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = mistral.config
    assert config.sliding_window is None and config.head_dim == 16 and config.rms_norm_eps == 1e-5
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e5}
    assert config.tie_word_embeddings is tied
    assert (config.bos_token_id, config.eos_token_id) == (1, 0)
    ids = torch.randint(0, len(TOKENS), (2, 23))
    with torch.no_grad():
        assert torch.equal(mistral(ids).logits, llama(ids).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out"]


@pytest.mark.parametrize("qtype", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_0", "Q5_1"])
def test_stored_types_decode_to_the_peers_values(qtype, tmp_path):
    """Against gguf's own quantize and dequantize of the weight before the rows were permuted."""
    llama = tiny_llama()
    out = convert_gguf(write_gguf(tmp_path / "m.gguf", llama, qtype=qtype), tmp_path / "out")
    kind = gguf.GGMLQuantizationType[qtype]
    tensors = load_file(out / "model.safetensors")
    assert set(tensors) == set(llama.state_dict()) - {"lm_head.weight"}
    for name, got in tensors.items():
        weight = llama.state_dict()[name].numpy()
        if weight.ndim == 2:
            weight = gguf.dequantize(gguf.quantize(weight, kind), kind)
        assert got.dtype == torch.float32
        assert torch.equal(got, torch.from_numpy(weight)), name


def test_q4_1_does_not_fit_sixteen_bits(tmp_path):
    """Why the folder is float32."""
    out = convert_gguf(write_gguf(tmp_path / "m.gguf", tiny_llama(), qtype="Q4_1"), tmp_path / "out")
    weight = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    for dtype in (torch.float16, torch.bfloat16):
        assert not torch.equal(weight.to(dtype).float(), weight)


def test_the_tokenizer_splits_digits_and_takes_its_special_tokens(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(path, tmp_path / "out"))
    # by hand: the digit is cut off before the merges, so neither "Ġ1" nor " 1" may take the second space
    assert tokenizer.tokenize("ab c  1") == ["ab", "Ġc", "ĠĠ", "1"]
    assert tokenizer.tokenize("a12") == ["a", "1", "2"]
    assert tokenizer("<|im|>a<tool>").input_ids == [1, 3, 2]
    assert tokenizer.decode([1, 3, 2], skip_special_tokens=True) == "a<tool>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == (
        "<|im|>",
        "<|end|>",
        128,
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert tokenizer.decode(tokenizer("ab c  1 , 2").input_ids[:4]) == "ab c  1"


def test_gpt2_splitting_is_another_one(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), tokenizer={"pre": "gpt-2"})
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(path, tmp_path / "out"))
    assert tokenizer.tokenize("ab c  1") == ["ab", "Ġc", "Ġ", "Ġ1"]
    assert tokenizer.tokenize("a12") == ["a", "12"]


def test_bos_is_added_where_the_file_says_so(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), tokenizer={"add_bos": True})
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(path, tmp_path / "out"))
    assert tokenizer("ab").input_ids == [1, TOKENS.index("ab")]
    assert tokenizer("ab", add_special_tokens=False).input_ids == [TOKENS.index("ab")]


def test_shards(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    whole = load_file(convert_gguf(path, tmp_path / "one") / "model.safetensors")
    out = convert_gguf(path, tmp_path / "many", shard_bytes=40_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    merged = {name: load_file(out / file)[name] for name, file in index["weight_map"].items()}
    assert all(torch.equal(merged[name], whole[name]) for name in whole) and set(merged) == set(whole)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in whole.values())
    assert MistralForCausalLM.from_pretrained(out).config.num_hidden_layers == 2


def test_the_window_is_the_files_or_the_callers_to_say(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    stated = write_gguf(tmp_path / "w.gguf", tiny_llama(), keys={"attention.sliding_window": 7})
    for name, file, said in (("a", path, 7), ("b", stated, None), ("c", stated, 7)):
        out = convert_gguf(file, tmp_path / name, sliding_window=said)
        assert json.loads((out / "config.json").read_text())["sliding_window"] == 7
    with pytest.raises(GGUFError, match="sliding_window is 7, but sliding_window=5 was asked for"):
        convert_gguf(stated, tmp_path / "out", sliding_window=5)


def vector(n: int) -> np.ndarray:
    return np.ones(n, dtype=np.float32)


FAULTS = {
    "architecture": ({"arch": "qwen2"}, r"expected general.architecture 'llama', got 'qwen2'"),
    "rope scaling": ({"keys": {"rope.scaling.type": "yarn"}}, r"rope.scaling.type = 'yarn'"),
    "unknown key": ({"keys": {"attention.clamp_kqv": 3}}, r"no place for: llama.attention.clamp_kqv"),
    "no window": ({"keys": {"attention.sliding_window": 0}}, r"window is 0, expected a number of positions"),
    "window of text": ({"keys": {"attention.sliding_window": "7"}}, r"sliding_window is '7', expected"),
    "windows by turns": (
        {"keys": {"attention.sliding_window": 7, "attention.sliding_window_pattern": 2}},
        r"no place for: llama.attention.sliding_window_pattern",
    ),
    "experts": ({"keys": {"expert_count": 8}}, r"mixture of experts"),
    "missing key": ({"keys": {"block_count": None}}, r"llama.block_count is missing"),
    "other value width": ({"keys": {"attention.value_length": 8}}, r"value_length to be the head's width 16"),
    "vocabulary": ({"keys": {"vocab_size": 5}}, r"vocab_size is 5 but token_embd.weight has"),
    "missing tensor": ({"drop": ("blk.1.attn_k.weight",)}, r"1 tensors are missing, among them blk.1.attn_k"),
    "extra tensor": ({"extra": {"rope_freqs.weight": vector(8)}}, r"no place in a Mistral.*rope_freqs"),
    "bias": ({"extra": {"blk.0.attn_q.bias": vector(64)}}, r"no place in a Mistral.*attn_q.bias"),
    "shape": ({"extra": {"output_norm.weight": vector(32)}}, r"output_norm.weight: expected shape \(64,\)"),
    "no tokens": ({"tokenizer": {"tokens": []}}, r"holds no tokenizer"),
    "sentencepiece": (
        {"tokenizer": {"model": "llama"}},
        r"expected a score and a type of each of the 29 tokens",
    ),
    "pre-tokenizer": ({"tokenizer": {"pre": "qwen2"}}, r"'gpt-2' or 'smollm' .* got 'qwen2'"),
    "no pre-tokenizer": ({"tokenizer": {"pre": None}}, r"'gpt-2' or 'smollm' .* got None"),
    "merge": ({"tokenizer": {"merges": ["a b c"]}}, r"two pieces in every merge, got 'a b c'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_understood_is_an_error_and_leaves_nothing(fault, tmp_path):
    how, message = FAULTS[fault]
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), **how)
    with pytest.raises(GGUFError, match=message):
        convert_gguf(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_type_that_cannot_be_decoded(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), qtype="Q8_0")
    reader = open_gguf(path)
    config = read_config(reader)
    plan = plan_tensors(reader, config)
    assert plan["model.layers.0.self_attn.k_proj.weight"].heads == 2
    from brise.model.gguf import dequantize_tensor

    stored = reader.tensors[0]._replace(tensor_type=gguf.GGMLQuantizationType.I32)
    with pytest.raises(GGUFError, match="I32 cannot be decoded"):
        dequantize_tensor(stored)


def test_files_that_are_no_gguf(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out")
    (tmp_path / "text.gguf").write_text("this is not a model, only a line of text")
    with pytest.raises(GGUFError, match="cannot be read as a GGUF file"):
        convert_gguf(tmp_path / "text.gguf", tmp_path / "out")
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    for cut in (20, 300, -1000):
        (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:cut])
        with pytest.raises(GGUFError, match="is the download complete"):
            convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_touched(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        convert_gguf(path, tmp_path / "out")


@pytest.fixture(scope="module")
def smollm2():
    from brise.eval.assets import fetch

    return fetch("smollm2-135m")


@pytest.mark.assets
def test_smollm2_knows_the_capital_of_france(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = MistralForCausalLM.from_pretrained(smollm2)
    assert model.num_parameters() == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("The capital of France is Paris")
    llama = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "model_type": "llama"}))
    llama.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(prompt.input_ids).logits, llama.eval()(prompt.input_ids).logits)


@pytest.mark.assets
def test_all_of_smollm2_equals_transformers_own_reader(smollm2, tmp_path, monkeypatch):
    """transformers' reader, on the GGUF of the wheel."""
    import dataclasses
    import functools

    from brise.eval import assets

    # it reads the file's 100,000 strings twice, and makes the table of names anew for each of 397 modules
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))

    raw = dataclasses.replace(assets.ASSETS["smollm2-135m"], name="raw", build=None)
    monkeypatch.setitem(assets.ASSETS, "raw", raw)
    folder = assets.fetch("raw", tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32
    ).state_dict()
    ours = load_file(smollm2 / "model.safetensors")
    assert len(ours) == 272
    assert set(theirs) - set(ours) == {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
