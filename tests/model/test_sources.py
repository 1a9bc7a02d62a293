"""What a checkpoint can be made from: any float dtype, any shards, Mistral's own files."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from brise.model.checkpoint import CheckpointError, load_model
from brise.model.reader import CheckpointReader
from brise.model.source import open_source, whole
from brise.model.stream import quantize_checkpoint
from brise.quant.presets import PRESETS
from brise.quant.rtn import rtn

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
Q = "model.layers.0.self_attn.q_proj"
INT4 = PRESETS["int4-g32"]


def rewrite(src, out, change, config=None, shards=1):
    """A copy of a folder with its tensors changed, in one file or in many with an index."""
    shutil.copytree(src, out)
    tensors = change(load_file(out / "model.safetensors"))
    if config:
        data = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**data, **config}))
    if shards == 1:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return out
    (out / "model.safetensors").unlink()
    where = {}
    for number in range(shards):
        names = sorted(tensors)[
            number::shards
        ]  # neighbours, and so the tensors of a block, in different files
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in names}, out / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return out


def made(src, out):
    quantize_checkpoint(src, out, INT4)
    reader = CheckpointReader(out)
    return {name: reader.tensor(name) for name in reader.names}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_and_any_number_of_shards(tiny_checkpoint, tmp_path, dtype):
    name = {"dtype": str(dtype).removeprefix("torch.")}
    cast = lambda tensors: {n: t.to(dtype) for n, t in tensors.items()}  # noqa: E731
    one = made(rewrite(tiny_checkpoint, tmp_path / "a", cast, name), tmp_path / "qa")
    many = made(rewrite(tiny_checkpoint, tmp_path / "b", cast, name, shards=19), tmp_path / "qb")
    source = CheckpointReader(tmp_path / "a")
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) for n in one)
    expected = rtn(source.tensor(f"{Q}.weight"), INT4.rules[0].spec)
    assert all(torch.equal(one[f"{Q}.{n}"], t) for n, t in expected.tensors.items())
    assert one["model.norm.weight"].dtype == dtype


@pytest.mark.parametrize("kind", ["plain", "tensor", "row", "list", "block", "one", "powers"])
def test_float8_with_and_without_scales(tiny_checkpoint, tmp_path, kind):
    """Against the decoded weights in bf16: the very same codes, since they fit bf16."""

    def coded(tensors):
        out = {}
        for name, w in tensors.items():
            if not name.endswith("proj.weight"):
                out[name] = w.bfloat16()
                continue
            rows, columns = w.shape
            high, wide = -(-rows // 24), -(-columns // 40)
            block = 2.0 ** -(torch.arange(high * wide) % 4).view(high, wide)
            scale = {
                "plain": None,
                "tensor": torch.tensor(0.25),
                "row": 2.0 ** -(torch.arange(rows) % 3 + 1.0)[:, None],
                "list": 2.0 ** -(torch.arange(rows) % 3 + 1.0),
                "block": block,
                "one": torch.tensor(0.25),  # what transformers writes where weight_block_size is null
                "powers": block.to(torch.float8_e8m0fnu),  # and under scale_fmt ue8m0
            }[kind]
            spread = 1.0 if scale is None else scale[:, None] if kind == "list" else scale
            if kind in ("block", "powers"):
                spread = block.repeat_interleave(24, 0)[:rows].repeat_interleave(40, 1)[:, :columns]
            out[name] = (w / spread).to(torch.float8_e5m2 if "up_proj" in name else torch.float8_e4m3fn)
            decoded[name] = (out[name].float() * spread).bfloat16()
            if scale is not None:
                out[f"{name}_scale{'_inv' if kind in ('block', 'one', 'powers') else ''}"] = scale
            for scale_of in ("input_scale", "activation_scale", "k_scale", "v_scale"):
                out[name.replace("weight", scale_of)] = torch.tensor(1.0)
        return out

    decoded: dict[str, torch.Tensor] = {}
    size = None if kind == "one" else [24, 40]
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": size}}
    src = rewrite(tiny_checkpoint, tmp_path / "f8", coded, config)
    plain = rewrite(
        tiny_checkpoint,
        tmp_path / "plain",
        lambda tensors: {n: decoded.get(n, t.bfloat16()) for n, t in tensors.items()},
        {"dtype": "bfloat16"},
    )
    source = open_source(src)
    for name, w in decoded.items():  # rows as they are asked for, from the middle of a block on
        for start, stop in ((0, 1), (23, 25), (30, w.shape[0])):
            assert torch.equal(source.rows(name, start, stop).bfloat16(), w[start:stop]), name
    # where the config names no dtype it is bf16, as of every model in float8
    data = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({k: v for k, v in data.items() if "dtype" not in k}))
    got, expected = made(src, tmp_path / "q8"), made(plain, tmp_path / "q")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], expected[n]) for n in got)
    assert open_source(src).info(f"{Q}.weight")[0] == torch.bfloat16


@pytest.mark.parametrize(
    "scale, shape",
    [
        (f"{Q}.weight_scale", [3]),
        (f"{Q}.weight_scale", [1, 64]),
        (f"{Q}.weight_scale_inv", [2, 1]),  # of 64 x 64 in blocks of 128 there is one
        ("model.norm.weight_scale", [1]),
    ],
)
def test_a_float8_scale_that_fits_nothing(tiny_checkpoint, tmp_path, scale, shape):
    def wrong(tensors):
        w = tensors[f"{Q}.weight"].to(torch.float8_e4m3fn)
        return {**tensors, f"{Q}.weight": w, scale: torch.ones(shape)}

    with pytest.raises(CheckpointError, match=re.escape(f"fit no weight: {scale} {shape}")):
        open_source(rewrite(tiny_checkpoint, tmp_path / "f8", wrong))


def test_blocks_are_of_128_where_the_config_does_not_say(tiny_checkpoint, tmp_path):
    """down_proj is 64 x 128: one block, whose scale is all there is."""
    name = "model.layers.0.mlp.down_proj.weight"

    def coded(tensors):
        w = tensors[name].to(torch.float8_e4m3fn)
        return {**tensors, name: w, f"{name}_scale_inv": torch.full((1, 1), 0.5)}

    src = rewrite(tiny_checkpoint, tmp_path / "f8", coded)
    wanted = load_file(src / "model.safetensors")[name].float() * 0.5
    assert torch.equal(whole(open_source(src), name), wanted)


def test_float8_tensors_beside_another_quantization(tiny_checkpoint, tmp_path):
    config = {"quantization_config": {"quant_method": "quanto"}}
    coded = lambda t: {**t, f"{Q}.weight": t[f"{Q}.weight"].to(torch.float8_e4m3fn)}  # noqa: E731
    with pytest.raises(CheckpointError, match="quantized by 'quanto' and holds float8 tensors: expected fp8"):
        open_source(rewrite(tiny_checkpoint, tmp_path / "f8", coded, config))


NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
}


def interleaved(w, heads):
    """Hugging Face's rows of a rotary weight in Mistral's order, row by row as its definition says."""
    width = w.shape[0] // heads
    out = torch.empty_like(w)
    for head in range(heads):
        for i in range(width // 2):
            out[head * width + 2 * i] = w[head * width + i]
            out[head * width + 2 * i + 1] = w[head * width + width // 2 + i]
    return out


@pytest.fixture
def consolidated(tiny_checkpoint, tmp_path):
    """The tiny model as Mistral itself would publish it."""
    folder = tmp_path / "own"
    folder.mkdir()
    tensors = {}
    for name, w in load_file(tiny_checkpoint / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:
            w = interleaved(w, 4 if "q_proj" in name else 2)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name] = w.contiguous()
    params = {"dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 128, "n_heads": 4, "n_kv_heads": 2}
    params |= {"norm_eps": 1e-6, "vocab_size": 256, "rope_theta": 10000.0, "tied_embeddings": True}
    params |= {"max_position_embeddings": 128}
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(params))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_checkpoint / name, folder)
    return folder


def test_mistrals_own_files_become_hugging_faces(consolidated, tiny_checkpoint, tmp_path):
    """The folder that transformers saved is the oracle."""
    source, reader = open_source(consolidated), CheckpointReader(tiny_checkpoint)
    assert source.names == reader.names
    for name in source.names:
        assert torch.equal(whole(source, name), reader.tensor(name)), name
    w = reader.tensor(f"{Q}.weight")
    for start, stop in ((0, 1), (3, 21), (16, 32), (63, 64)):
        assert torch.equal(source.rows(f"{Q}.weight", start, stop), w[start:stop])
    quantize_checkpoint(consolidated, tmp_path / "own-q", PRESETS["int8"])
    quantize_checkpoint(tiny_checkpoint, tmp_path / "q", PRESETS["int8"])
    ours = load_model(tmp_path / "own-q")
    with torch.no_grad():
        logits = ours(IDS).logits
        assert torch.equal(logits, load_model(tmp_path / "q")(IDS).logits)


def test_mistrals_own_files_in_several_parts(consolidated, tiny_checkpoint):
    tensors = load_file(consolidated / "consolidated.safetensors")
    (consolidated / "consolidated.safetensors").unlink()
    names = sorted(tensors)
    for number in range(3):
        part = {n: tensors[n] for n in names[number::3]}
        save_file(part, consolidated / f"consolidated-{number + 1:05d}-of-00003.safetensors")
    source, reader = open_source(consolidated), CheckpointReader(tiny_checkpoint)
    assert source.names == reader.names
    assert all(torch.equal(whole(source, name), reader.tensor(name)) for name in reader.names)
    last = consolidated / "consolidated-00003-of-00003.safetensors"
    save_file({**load_file(last), names[0]: tensors[names[0]]}, last)
    with pytest.raises(CheckpointError, match=f"1 tensors are in two shards: {names[0]}"):
        open_source(consolidated)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda p, t: p.pop("n_heads"), "lacks n_heads"),
        (lambda p, t: p.update(moe={"num_experts": 8}), "no place for: moe"),
        (lambda p, t: p.update(use_biases=True), "use_biases"),
        (lambda p, t: p.update(n_layers=3), "9 tensors that params.json asks for are missing: layers.2"),
        (lambda p, t: t.pop("norm.weight"), "1 tensors that params.json asks for are missing: norm.weight"),
        (lambda p, t: t.update({"vision.weight": torch.ones(2)}), "no place in a Mistral: vision.weight"),
    ],
)
def test_own_files_that_make_no_mistral(consolidated, change, says):
    params = json.loads((consolidated / "params.json").read_text())
    tensors = load_file(consolidated / "consolidated.safetensors")
    change(params, tensors)
    save_file(tensors, consolidated / "consolidated.safetensors")
    (consolidated / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointError, match=says):
        open_source(consolidated)


def test_the_first_models_had_a_window_and_said_no_theta(consolidated):
    params = json.loads((consolidated / "params.json").read_text())
    before = open_source(consolidated).identity()
    for window, theta in ((4096, 1e4), (None, 1e6)):
        wanted = {k: v for k, v in params.items() if k != "rope_theta"} | {"sliding_window": window}
        (consolidated / "params.json").write_text(json.dumps(wanted))
        config = open_source(consolidated).config
        assert config["rope_parameters"]["rope_theta"] == theta and config["sliding_window"] == window
    changed = open_source(consolidated).identity()  # or a job would be gone on with as another model's
    assert [name for name in changed if changed[name] != before[name]] == ["params.json"]


def test_double_and_missing_names_are_all_listed(tiny_checkpoint, tmp_path):
    src = rewrite(tiny_checkpoint, tmp_path / "d", lambda t: t, shards=3)
    first, second = sorted(src.glob("model-*"))[:2]
    tensors = load_file(second)
    twice = sorted(load_file(first))[:2]
    save_file({**tensors, **{n: load_file(first)[n] for n in twice}}, second)
    with pytest.raises(CheckpointError, match=f"2 tensors are in two shards: {twice[0]}.*{twice[1]}"):
        open_source(src)
    names = sorted(tensors)[:2]
    save_file({n: t for n, t in tensors.items() if n not in names}, second)
    with pytest.raises(CheckpointError, match=f"{names[0]}, but it does not; .*{names[1]}, but it does not"):
        open_source(src)
