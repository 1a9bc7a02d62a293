"""Checkpoints of random weights: true shapes, the same bytes every time, a tokenizer that is sentencepiece's."""

import hashlib
import json
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from brise.cli.main import app
from brise.kernels.cache_folder import cache_root
from brise.model import synth
from brise.model.checkpoint import load_model, load_tokenizer
from brise.model.reader import CheckpointReader
from brise.model.sentencepiece import merges_of, read_pieces, save_tokenizer
from brise.model.skeleton import empty_model
from brise.model.synth import SIZES, Size, _Draw, write_synth

SMALL = Size(64, 96, 2, 4, 2, vocabulary=300)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_mistral_7b_is_mistral_7b():
    """Against transformers' model of the published configuration."""
    size = SIZES["mistral-7b"]
    wanted = {n: tuple(p.shape) for n, p in empty_model(size.config()).named_parameters()}
    planned = {t.name: t.shape for t in size.tensors()}
    assert planned == wanted
    assert sum(torch.Size(shape).numel() for shape in planned.values()) == 7_241_732_096


@pytest.mark.parametrize("shard", [10**9, 20_000])
def test_the_same_bytes_every_time_and_however_many_threads(tmp_path, shard):
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            write_synth(SMALL, tmp_path / str(threads), None, max_shard_bytes=shard)
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    write_synth(SMALL, tmp_path / "other", None, seed=1, max_shard_bytes=shard)
    a, b = CheckpointReader(tmp_path / "1"), CheckpointReader(tmp_path / "other")
    assert not any(torch.equal(a.tensor(n), b.tensor(n)) for n in a.names)
    model = load_model(tmp_path / "1")
    assert model(torch.arange(20)[None]).logits.isfinite().all() and model.dtype == torch.bfloat16


def test_the_values_are_those_of_the_definition():
    """Bits of Philox under the name's hash, through the normal distribution's own inverse."""
    (tensor,) = [t for t in SMALL.tensors() if t.name == "model.layers.1.mlp.down_proj.weight"]
    values = torch.frombuffer(bytearray(_Draw(tensor, 0).piece(0)), dtype=torch.bfloat16)
    key = np.frombuffer(hashlib.sha256(f"0 {tensor.name}".encode()).digest()[:16], dtype="<u8")
    words = np.random.Philox(key=key, counter=[0, 0, 0, 0]).random_raw(16)
    bits = words.astype("<u8").view("<i2").astype(int) + 32768
    expected = [NormalDist().inv_cdf((b + 0.5) / 65536) * 0.005 for b in bits]
    ratios = values[:64].float() / torch.tensor(expected)
    assert float(values[0]) == -0.004425048828125  # worked out once: it must never change
    assert all(min(abs(r / f - 1) for f in (1, 8, 16)) < 1 / 128 for r in ratios.tolist())
    assert float(ratios.median()) == pytest.approx(1, abs=1 / 128)


def test_no_piece_of_a_tensor_is_another_one_again(monkeypatch):
    """Each has a stream of its own: the third piece's words are those of Philox at its count."""
    monkeypatch.setattr(synth, "_PIECE", 1024)
    (tensor,) = [t for t in SMALL.tensors() if t.name == "model.embed_tokens.weight"]
    draw = _Draw(tensor, 0)
    pieces = [bytes(draw.piece(start)) for start in range(0, draw.count, 1024)]
    assert len(set(pieces)) == len(pieces) == -(-draw.count // 1024)
    key = np.frombuffer(hashlib.sha256(f"0 {tensor.name}".encode()).digest()[:16], dtype="<u8")
    words = np.random.Philox(key=key, counter=[0, 0, 2, 0]).random_raw(16)
    bits = words.astype("<u8").view("<i2").astype(int) + 32768
    got = torch.frombuffer(bytearray(pieces[2]), dtype=torch.bfloat16)[:64].float()
    expected = torch.tensor([NormalDist().inv_cdf((b + 0.5) / 65536) * 0.02 for b in bits])
    torch.testing.assert_close(got, expected, rtol=1 / 128, atol=0.0)


def test_the_weights_look_like_trained_ones(tmp_path):
    size = Size(512, 1024, 1, 4, 2, vocabulary=300)
    write_synth(size, tmp_path / "m", None)
    reader = CheckpointReader(tmp_path / "m")
    w = reader.tensor("model.layers.0.mlp.up_proj.weight").float()
    spread = w.std(0)
    usual = spread[spread < 0.05]
    assert abs(float(usual.mean()) - 0.02) < 0.001 and usual.numel() > 500
    assert float(w.mean().abs()) < 0.001
    outliers = [
        reader.tensor(f"model.layers.0.{n}.weight").float().std(0) for n in ("mlp.gate_proj", "mlp.up_proj")
    ]
    large = torch.cat([s[s > 0.05] for s in outliers])
    assert 0 < large.numel() < 20 and float(large.min()) > 0.14 and float(large.max()) < 0.36
    down = reader.tensor("model.layers.0.mlp.down_proj.weight").float()
    assert float(down.std(0).median()) == pytest.approx(0.005, rel=0.05)


def test_the_command(tmp_path):
    words = ["synth", "mistral-tiny", str(tmp_path / "m"), "--layers", "1", "--no-tokenizer", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout.splitlines()[-1])
    reader = CheckpointReader(tmp_path / "m")
    assert said["parameters"] == sum(torch.Size(reader.info(n)[1]).numel() for n in reader.names)
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1 and "pass --overwrite" in again.stderr
    wrong = CliRunner().invoke(app, ["synth", "mistral-8b", str(tmp_path / "n")])
    assert wrong.exit_code == 1 and "there are mistral-7b" in wrong.stderr


@pytest.mark.assets
def test_the_tokenizer_is_sentencepieces(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = cache_root() / "mistral-tokenizer" / "tokenizer.model"
    if not model.exists():
        pytest.skip("needs the asset mistral-tokenizer, which brise fetch downloads")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    save_tokenizer(model, tmp_path, 32768)
    ours = load_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = [
        "The wind is light.",
        "  two  blanks",
        "def f(x):\n    return  x\n\t# ünï 漢字 🌬️",
        "a" * 70,
        "…\x7f",
    ]
    generator = torch.Generator().manual_seed(0)
    for length in (1, 5, 40) * 20:
        codes = torch.randint(1, 0x2FA1, (length,), generator=generator).tolist()
        texts.append("".join(chr(c) for c in codes if chr(c).isprintable() or c == 32))
    for text in texts:
        assert ours(text)["input_ids"] == [1, *theirs.encode(text)], text
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == theirs.decode(
            theirs.encode(text)
        )


def test_a_file_that_is_no_tokenizer(tmp_path):
    from brise.model.safetensors_header import CheckpointError

    for data in (b"", b"\xff" * 40, b"\n\x7f" + b"a" * 10):
        with pytest.raises(CheckpointError, match=r"no sentencepiece model|it is damaged"):
            read_pieces(data, "tokenizer.model")
    with pytest.raises(CheckpointError, match="256 bytes"):
        (tmp_path / "t.model").write_bytes(b"\n\x03\n\x01a")
        save_tokenizer(tmp_path / "t.model", tmp_path, 10)
    assert merges_of(read_pieces(b"\n\x03\n\x01a\n\x03\n\x01b\n\x04\n\x02ab", "x")) == [("a", "b")]
