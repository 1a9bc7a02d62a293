"""The bench of the stream on a tiny model: that every figure is there, and what a watched process says of itself."""

import json
import resource

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from brise.cli.main import app
from brise.eval import bench_stream, process
from brise.eval.process import ProcessError, Watched, watch
from brise.model.source import open_source
from brise.model.synth import Size, write_synth

SIZE = Size(128, 256, 2, 4, 2, vocabulary=300)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth") / "m"
    write_synth(SIZE, folder, None)
    return folder


def add_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_a_block_beside_bitsandbytes(source):
    pytest.importorskip("bitsandbytes")
    row = bench_stream.compare(open_source(source), 3)
    assert row["weights"] == 128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 256
    assert row["ratio"] > 0 and row["dtype"] == "bfloat16"


def test_another_code_is_found(source, monkeypatch):
    pytest.importorskip("bitsandbytes")
    real = bench_stream.round_rows

    def wrong(*args):
        rounded = real(*args)
        rounded.tensor.tensors["qweight"][3, 5] ^= 16
        return rounded

    monkeypatch.setattr(bench_stream, "round_rows", wrong)
    with pytest.raises(bench_stream.BenchError, match="our codes and bitsandbytes' differ"):
        bench_stream.compare(open_source(source), 3)


def test_the_ratio_says_how_much_longer_the_other_takes(source, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bench_stream, "take_turns", lambda sides, repeats: ([1.0, 2.0, 3.0], [2.0, 6.0, 9.0]))
    row = bench_stream.compare(open_source(source), 3)
    assert row["ratio"] == 3.0 and row["ours"]["median"] == 2.0 and row["bitsandbytes"]["median"] == 6.0


def test_the_jobs_of_a_bench(source, tiny_text, tmp_path, monkeypatch):
    """What is run, in what order; the jobs themselves in this process."""
    said, block = [], {"bench": "stream-block"}

    def watched(words):
        said.append(words)
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        return Watched(1.0, 2.0, 3, 4, 5, '{"text": "there"}\n')

    monkeypatch.setattr(bench_stream, "watch", watched)
    monkeypatch.setattr(bench_stream, "compare", lambda *args: block)
    monkeypatch.setattr(
        bench_stream, "_generate", lambda out: {"bench": "stream-generate", "files": len(list(out.iterdir()))}
    )
    add_tokenizer(source)
    rows = bench_stream.run_bench(
        source,
        tmp_path / "work",
        gptq=source,
        gptq_config="gptq-int4-g32",
        windows=2,
        length=16,
        text=f"{tiny_text}#calibration",
    )
    assert [row["bench"] for row in rows] == [
        "stream-plain",
        "stream-generate",
        "stream-block",
        "stream-gptq",
    ]
    assert said[0][:1] == ["quantize"] and said[0][-1] == "nf4-dq-all" and "--memory" not in said[0]
    assert said[1][said[1].index("--memory") + 1] == "file" and said[1][said[1].index("--windows") + 1] == "2"
    assert (rows[3]["windows"], rows[3]["length"]) == (2, 16) and rows[1]["files"] > 2
    assert rows[0]["source_bytes"] == sum(p.stat().st_size for p in source.glob("*.safetensors"))
    assert rows[0]["stored_bytes"] < rows[0]["source_bytes"] / 3 and rows[0]["seconds"] == 1.0
    assert all("bitsandbytes" in row["provenance"]["versions"] for row in rows)
    assert not list((tmp_path / "work").iterdir())


def test_peaks_are_the_most_that_was_seen(monkeypatch):
    looks = iter([(5, 90), (50, 60), (7, 8)])
    monkeypatch.setattr(process, "memory_of", lambda pid: next(looks, (1, 2)))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seen = watch(["--version"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (seen.anonymous_peak, seen.resident_peak) == (50, 90) and seen.samples >= 3
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seen.cpu_seconds == pytest.approx(spent, abs=1e-4) and after.ru_stime > before.ru_stime


def test_a_watched_job(source, tmp_path):
    """A real process: quantized as by any other, its memory that of a process with torch in it."""
    out = tmp_path / "q"
    seen = watch(["quantize", str(source), str(out), "-c", "nf4-dq-all", "--json"])
    assert json.loads(seen.output.splitlines()[-1])["quantized"] == 2 * 7 + 2
    assert 50 << 20 < seen.anonymous_peak < seen.resident_peak < 8 << 30
    assert seen.samples > 10 and seen.cpu_seconds > 0
    row = bench_stream._job("plain", source, out, "nf4-dq-all", seen)
    block = {"bench": "stream-block", "weights": 1, "dtype": "bfloat16", "repeats": 3, "ratio": 3.5}
    block |= {"ours": {"median": 0.1}, "bitsandbytes": {"median": 0.35}}
    origin = {
        "versions": {"torch": "2", "bitsandbytes": "1", "brise": "0"},
        "device": "cpu",
        "threads": 2,
        "time": "now",
    }
    files = bench_stream.write_bench(
        tmp_path / "out", [{**row, "provenance": origin}, {**block, "provenance": origin}]
    )
    assert len(files[0].read_text().splitlines()) == 2
    assert (
        f"{row['stored_bytes']:,} B" in files[1].read_text() and "3.50 times as long" in files[1].read_text()
    )
    with pytest.raises(ProcessError, match=r"ended with 1: brise: .*exists"):
        watch(["quantize", str(source), str(out), "-c", "nf4"])
