"""The benchmark of decoding: what its rows say, and that sides which disagree are never timed."""

import dataclasses
import json
import time

import pytest
import torch
from transformers import MistralConfig
from typer.testing import CliRunner

from brise.cli.main import app
from brise.eval import bench_decode, bench_decode_gpu
from brise.eval.bench_decode import Load, Side, measure, our_side, peer_side, run_cpu, step_bytes, table
from brise.eval.timing import BenchError
from brise.model.checkpoint import load_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch):
    monkeypatch.setattr(bench_decode, "read_ceiling", lambda: 1e9)


def test_the_command_compares_and_writes(tiny_checkpoint, tmp_path, monkeypatch):
    peaks = []
    monkeypatch.setattr(bench_decode, "in_child", lambda f, *args: peaks.append(args) or 10**8)
    args = ["bench", "decode", "--model", tiny_checkpoint, "--prompt", 9, "--new-tokens", 6, "--rounds", 2]
    result = CliRunner().invoke(
        app, [str(a) for a in [*args, "--batch", 1, "--batch", 3, "--out", tmp_path, "--json"]]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert rows == [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]
    assert [row["batch"] for row in rows] == [1, 3] and len(peaks) == 4
    for row in rows:
        assert row["agree"] == {"transformers": True} and row["missing"] == {}
        assert row["tokens"] == {"brise": 6 * row["batch"], "transformers": 6 * row["batch"]}
        assert row["ratio"]["transformers"]["median"] > 0
        ours = row["sides"]["brise"]
        assert ours["memory"]["process_peak"] == 10**8 and ours["memory"]["cache_predicted"] > 0
        assert ours["share_of_ceiling"] == pytest.approx(ours["weight_bytes_per_second"] / 1e9)
    text = (tmp_path / "decode.md").read_text()
    assert text.count("| brise |") == text.count("| transformers |") == 2


def test_the_arithmetic_of_a_row():
    """Sides that sleep: 0.02 s to the first token, 0.01 s each other."""

    def run(ids, new):
        time.sleep(0.02 + 0.01 * (new - 1))
        return [[0] * new for _ in ids]

    row = measure(
        [Side("brise", run, 5_000_000), Side("peer", run)], Load(2, 3, 6), vocab=9, device=CPU, rounds=3
    )
    side = row["sides"]["brise"]
    assert side["seconds_to_first_token"]["median"] == pytest.approx(0.02, rel=0.5)
    assert side["decode_tokens_per_second"]["median"] == pytest.approx(2 / 0.01, rel=0.5)
    assert side["tokens_per_second"]["median"] == pytest.approx(12 / 0.07, rel=0.5)
    assert side["weight_bytes_per_second"] == pytest.approx(5e8, rel=0.5)
    assert row["sides"]["peer"]["weight_bytes_per_second"] is None
    assert row["ratio"]["peer"]["median"] == pytest.approx(1, rel=0.5)


def test_what_a_step_reads(tiny_checkpoint):
    model = load_model(tiny_checkpoint)
    assert step_bytes(model) == sum(p.nbytes for p in model.parameters()) + sum(
        b.nbytes for b in model.buffers()
    )
    model.config.tie_word_embeddings = False
    assert step_bytes(model) == sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) - 256 * 64 * 4


def test_sides_that_disagree_are_an_error(tiny_checkpoint, monkeypatch):
    def wrong(model, batch):
        side = our_side(model, batch)
        return dataclasses.replace(
            side, run=lambda ids, new: [[t + 1 for t in r] for r in side.run(ids, new)]
        )

    monkeypatch.setattr(bench_decode, "our_side", wrong)
    with pytest.raises(BenchError, match="do not write the same"):
        run_cpu(tiny_checkpoint, batches=(1,), prompt=5, new=4, rounds=2, memory=False)


def test_a_side_that_fails_is_named_and_the_others_are_measured(tiny_checkpoint):
    def broken(ids, new):
        raise RuntimeError("out of memory")

    model = load_model(tiny_checkpoint)
    row = measure([our_side(model, 1), Side("peer", broken)], Load(1, 4, 3), vocab=256, device=CPU, rounds=2)
    assert row["missing"] == {"peer": "RuntimeError: out of memory"} and set(row["sides"]) == {"brise"}
    row |= {"model": "m", "provenance": {"device": "d", "threads": 1}}
    assert "- peer: RuntimeError: out of memory" in table([row])


SMALL = MistralConfig(
    vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, sliding_window=16, max_position_embeddings=256,
)  # fmt: skip


@pytest.mark.parametrize("preset", [*bench_decode_gpu.OURS.values()], ids=str)
def test_random_models_of_every_kind_have_finite_logits_and_the_predicted_size(preset):
    model = bench_decode_gpu.random_model(SMALL, preset, CPU, torch.float32)
    tokens = our_side(model, 2).run(torch.randint(64, (2, 5)), 4)
    assert [len(row) for row in tokens] == [4, 4]
    held = sum(t.nbytes for t in model.state_dict().values())
    from brise.eval.memory import predict_ledger
    from brise.quant.presets import PRESETS

    assert held == predict_ledger(SMALL, None if preset is None else PRESETS[preset], torch.float32).nbytes


def test_the_ledger_of_the_shape_that_is_measured():
    predicted = {
        name: bench_decode_gpu._predicted(bench_decode_gpu.mistral_7b(), name)
        for name in bench_decode_gpu.OURS
    }
    assert predicted["brise fp16"] == 14_483_464_192
    assert predicted["brise int4-g128-all"] == 3_734_413_312
    assert predicted["brise nf4-dq-all"] / 2**30 <= 3.50


def test_the_run_on_a_gpu_with_stand_ins(tmp_path):
    """All but the GPU: rows as they come, sides that cannot be made, the deadline."""
    model = bench_decode_gpu.random_model(SMALL, None, CPU, torch.float32)

    def missing(batch):
        raise ImportError("no such peer")

    sides = {"brise fp16": lambda b: our_side(model, b, name="brise fp16"), "other": missing,
             "transformers fp16": lambda b: peer_side(model, "transformers fp16")}  # fmt: skip
    rows, files = bench_decode_gpu.run_sides(
        SMALL, sides, CPU, tmp_path, None, loads=[Load(1, 4, 3)], rounds=2, deadline=time.monotonic() + 60
    )
    assert [list(row["sides"]) for row in rows] == [["brise fp16"], [], ["transformers fp16"]]
    assert (
        rows[0]["sides"]["brise fp16"]["goal"]["limit"] == 230
        and "no such peer" in rows[1]["missing"]["other"]
    )
    assert files[1].read_text().count("| 1 | 4 + 3 |") == 2
    assert bench_decode_gpu.run_sides(
        SMALL, sides, CPU, tmp_path, 1e9, loads=[Load(1, 4, 3)], rounds=2, deadline=time.monotonic() - 1
    )[0] == []  # fmt: skip


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "decode", "--device", "cuda", "--out", str(tmp_path)])
    assert result.exit_code == 1 and "sees no CUDA device" in result.stderr
