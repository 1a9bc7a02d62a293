"""The bench of the stream on a tiny model: that every figure is there, and what a watched process says of itself."""

import json

import pytest

from brise.eval import bench_stream
from brise.eval.process import ProcessError, watch
from brise.model.source import open_source
from brise.model.synth import Size, write_synth

SIZE = Size(128, 256, 2, 4, 2, vocabulary=300)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth") / "m"
    write_synth(SIZE, folder, None)
    return folder


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
