"""The GPU benchmark's logic without a GPU: small cases, the clock on the wall, and products that are wrong."""

import json
import math

import pytest
import torch

from brise.eval import (
    bench_gpu,
    gpu_attention,
    gpu_decode,
    gpu_generate,
    gpu_matmul,
    gpu_protocol,
    gpu_table,
    gpu_tune,
)
from brise.eval.gpu_protocol import Case, Goal, Problem, RowFile, Side, WallTimer, copies_for, judge, measure
from brise.kernels import reference, tuning

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One copy of each weight is enough here, and no tuning outlives its test."""
    monkeypatch.setattr(gpu_protocol, "COPIES_BYTES", 1)
    monkeypatch.setattr(gpu_matmul, "copies_for", lambda nbytes: 2)
    for module in (gpu_tune, gpu_decode):
        monkeypatch.setattr(module, "copies_for", lambda nbytes: 1)
    yield
    tuning.use("cpu", None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", gpu_matmul.SPECS)
def test_a_case_is_checked_and_every_side_has_a_time(name, dtype):
    row = measure(gpu_matmul.matmul_case(name, 128, 256, 3, dtype), CPU, WallTimer(), rounds=3)
    assert row["ok"] and row["repeatable"] and row["ours"] == "ours"
    assert {"ours", "batch-invariant", "dequantize+cublas", "cublas"} <= set(row["seconds"])
    assert 0 < row["errors"]["ours"] <= row["allowed"]
    spread = row["seconds"]["ours"]
    assert 0 < spread["p20"] <= spread["median"] <= spread["p80"]
    assert row["flops"] == 2 * 3 * 128 * 256 and row["bytes"] > 128 * 256 * 0.5
    if name.startswith("int4"):
        assert "gemlite" in row["seconds"] or "gemlite" in row["missing"]
    json.dumps(row, allow_nan=False)


TINY = {"heads": 4, "kv_heads": 2, "head_dim": 16, "window": 20}


@pytest.mark.parametrize("length", [15, 90])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("make", [gpu_attention.attention_case, gpu_attention.backward_case])
def test_attention_is_checked_on_a_part_of_it(make, dtype, length):
    row = measure(make(length, dtype, **TINY), CPU, WallTimer(), rounds=3)
    assert row["ok"] and row["repeatable"], row
    assert 0 < row["errors"]["ours"] <= row["allowed"] and row["window"] == 20
    assert "flash" in row["missing"], "the CPU has none of that name"
    assert ("sdpa" in row["seconds"]) == (length <= 20 and row["pass"] == "forward")
    seen = sum(min(query + 1, 20) for query in range(length))
    assert row["flops"] == (4 if row["pass"] == "forward" else 10) * seen * 4 * 16


@pytest.mark.parametrize("at", [0, 45, 52, 89])
@pytest.mark.parametrize("name", ["forward", "dq", "dk", "dv"])
def test_what_is_checked_of_attention_sees_a_wrong_window(name, at, monkeypatch):
    """A result for a window one key wider is refused, by every part that is looked at."""
    wide = gpu_attention.sliding_attention

    def off(q, k, v, *, window):
        return wide(q, k, v, window=window + 1)

    if name == "forward":
        monkeypatch.setattr(gpu_attention, "sliding_attention", off)
        row = measure(gpu_attention.attention_case(90, "float16", **TINY), CPU, WallTimer(), 3)
    else:
        problem = gpu_attention.make_backward(90, torch.float16, gpu_attention.sizes(**TINY), CPU)
        grads = list(problem.sides["ours"].calls[0]())
        which = ("dq", "dk", "dv").index(name)
        grads[which] = grads[which].clone()
        grads[which][:, at] += 0.5
        checked = 45 <= at < 45 + gpu_attention.SAMPLES
        wrong = gpu_protocol.relative_error(problem.pick(tuple(grads)), problem.exact) > problem.allowed
        assert wrong == checked
        return
    assert not row["ok"] and "wrong: relative error" in row["missing"]["ours"]


@pytest.mark.parametrize("context", [3, 16, 40])
@pytest.mark.parametrize("int8", [False, True])
def test_decoding_steps_are_checked(int8, context):
    row = measure(
        gpu_decode.decode_case(3, context, int8, "float16", shape=(4, 2, 16, 16)), CPU, WallTimer(), 3
    )
    assert row["ok"] and row["repeatable"], row
    assert ("sdpa" in row["seconds"]) != int8
    if not int8:
        assert row["errors"]["sdpa"] <= 2 * row["allowed"]


def test_the_rest_of_a_step_is_checked():
    for one in (gpu_decode.norm_case(3, 64, "bfloat16"), gpu_decode.swiglu_case(3, 48, "bfloat16")):
        row = measure(one, CPU, WallTimer(), 3)
        assert row["ok"] and row["repeatable"] and set(row["seconds"]) == {"ours", "eager"}, row


@pytest.mark.parametrize("name", ["int4", None])
def test_a_whole_generation_is_checked_against_the_plain_forward_pass(name):
    size = {
        "vocab_size": 50, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    goal = Goal(None, 1e-3, 1e9, "tok/s", higher=True)
    one = gpu_generate.generate_case(name, 2, 5, 9, goal, "float32", size)
    row = measure(one, CPU, WallTimer())
    assert row["ok"] and row["repeatable"] and row["rounds"] == 3, row
    assert row["tokens"] == 18 and row["goal"]["met"] == "limit"
    assert row["goal"]["value"] == pytest.approx(18 / row["seconds"]["ours"]["median"])
    problem = one.make(CPU)
    written = problem.sides["ours"].calls[0]()
    written[0, 4] = (written[0, 4] + 1) % 50
    assert gpu_protocol.relative_error(problem.pick(written), problem.exact) > problem.allowed


def case(call, goal=None, exact=None, **more):
    exact = torch.ones(4, dtype=torch.float64) if exact is None else exact

    def make(device):
        sides = {"ours": Side([call]), "cublas": Side([lambda: torch.ones(4)])} | more
        return Problem(sides, exact, allowed=1e-3, flops=8.0, nbytes=4.0)

    return Case("matmul", "one", {"m": 1}, make, goal)


def test_a_wrong_result_has_no_time():
    row = measure(case(lambda: torch.full((4,), 1.1)), CPU, WallTimer(), 3)
    assert not row["ok"] and "ours" not in row["seconds"] and "cublas" in row["seconds"]
    assert "relative error 0.1, allowed 0.001" in row["missing"]["ours"]
    row = measure(case(lambda: torch.full((4,), math.nan)), CPU, WallTimer(), 3)
    assert not row["ok"] and row["errors"]["ours"] is None and "wrong" in row["missing"]["ours"]
    json.dumps(row, allow_nan=False)


def test_other_bits_in_another_run_are_no_result():
    values = iter([1.0, 1.0, 1.0 + 1e-6, 1.0, 1.0])
    row = measure(case(lambda: torch.full((4,), next(values))), CPU, WallTimer(), 3)
    assert (
        not row["ok"] and row["repeatable"] is False and row["missing"]["ours"] == "other bits in another run"
    )


def test_a_side_that_fails_is_named_and_costs_the_others_nothing():
    def fails():
        raise RuntimeError("no kernel image")

    row = measure(case(lambda: torch.ones(4), peer=Side([fails])), CPU, WallTimer(), 3)
    assert row["ok"] and row["missing"] == {"peer": "RuntimeError: no kernel image"}
    row = measure(case(fails), CPU, WallTimer(), 3)
    assert not row["ok"] and "no kernel image" in row["missing"]["ours"]

    def makes_nothing(device):
        raise torch.OutOfMemoryError("out of memory")

    row = measure(Case("matmul", "large", {}, makes_nothing), CPU, WallTimer(), 3)
    assert not row["ok"] and row["missing"] == {"ours": "OutOfMemoryError: out of memory"}
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    "goal, ours, value, met",
    [
        (Goal(14, 20, 16, "us"), 15e-6, 15, "aim"),
        (Goal(14, 20, 16, "us"), 18e-6, 18, "limit"),
        (Goal(14, 20, 16, "us"), 21e-6, 21, "open"),
        (Goal(None, 0.9, 0.96, "x cublas", higher=True), 1.05e-5, 0.952, "limit"),
        (Goal(None, 450, 600, "TFLOP/s", higher=True), 1e-6, 700, "aim"),
        (Goal(14, 20, 16, "us"), None, None, None),
        (Goal(None, 1.25, 1.25, "x flex", higher=True), 1e-6, None, None),
    ],
)
def test_a_goal_is_judged_by_its_unit(goal, ours, value, met):
    seconds = {"cublas": {"median": 1e-5}} | ({} if ours is None else {"ours": {"median": ours}})
    got = judge(goal, {"ours": "ours", "seconds": seconds, "flops": 7e8})
    assert got["met"] == met
    assert got["value"] is None if value is None else got["value"] == pytest.approx(value, rel=1e-3)


def test_goals_and_cases_are_those_of_the_list():
    cases = gpu_matmul.cases()
    assert len(cases) == len(gpu_matmul.SPECS) * 5 * 12 * 2 == len({c.name for c in cases})
    assert [c.priority for c in cases] == sorted(c.priority for c in cases)
    assert {c.labels["format"] for c in cases[:5]} == {"int4"} and {c.labels["m"] for c in cases[:5]} == {1}
    with_goal = [c for c in cases if c.goal is not None and c.goal.unit == "us"]
    # a key that is misspelt would be a goal that is never judged
    assert len(with_goal) == len(gpu_matmul.GOALS) * 2
    assert copies_for(8_700_000, 240_000_000) == 28 and copies_for(10**9, 240_000_000) == 1


@pytest.fixture
def tiny_cases():
    return [gpu_matmul.matmul_case(name, 64, 128, m, "float16") for name in ("int4", "nf4") for m in (1, 2)]


def run(cases, folder, **more):
    return bench_gpu.run_cases(cases, CPU, WallTimer(), folder, **{"minutes": 1.0, "scale": 0.01} | more)


def test_a_run_writes_ceilings_first_and_a_table(tiny_cases, tmp_path):
    done = run(tiny_cases, tmp_path)
    rows = [json.loads(line) for line in done.files[0].read_text().splitlines()]
    assert rows == json.loads(json.dumps(done.rows))
    assert rows[0]["family"] == "ceilings" and rows[0]["copy_bytes_per_second"] > 0
    assert [row["case"] for row in rows[1:]] == [c.name for c in tiny_cases]
    assert all(row["provenance"]["versions"]["torch"] for row in rows)
    assert (done.wrong, done.left_out) == (0, 0)
    table = done.files[1].read_text()
    assert "4 cases, 0 wrong, 0 not measured" in table and "| int4 float16 m1 64x128 |" in table


def test_sixteen_tokens_are_set_beside_one(tiny_cases, tmp_path):
    rows = [json.loads(line) for line in run(tiny_cases[:2], tmp_path).files[0].read_text().splitlines()]
    for row, tokens, seconds in zip(rows[1:], (1, 16), (2e-5, 2.2e-5)):
        row |= {"m": tokens, "n": 28672}
        row["seconds"]["ours"]["median"] = seconds
    assert "int4 float16 28672x4096: 16 tokens take 1.10 times as long as one" in gpu_table.markdown(rows)
    rows[1]["ok"] = False
    assert "times as long" not in gpu_table.markdown(rows)


def test_a_run_that_is_cut_short_keeps_what_it_has(tiny_cases, tmp_path, monkeypatch):
    def stop(case, *rest):
        if case is tiny_cases[2]:
            raise KeyboardInterrupt
        return measure(case, *rest)

    monkeypatch.setattr(bench_gpu, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_cases, tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    assert len(file.read_text().splitlines()) == 3
    (table,) = tmp_path.glob("*.md")
    assert "2 cases, 0 wrong, 2 not measured" in table.read_text()


def test_no_case_is_begun_after_the_time(tiny_cases, tmp_path):
    done = run(tiny_cases, tmp_path, minutes=0.0)
    assert done.left_out == 4 and len(done.rows) == 1


class Slow(WallTimer):
    """Says that calls by one launch, of a table of names, take least."""

    def __init__(self, best):
        self.best = best

    def prepare(self, calls):
        calls[0]()
        *_, x, _ = calls[0].args
        if calls[0].func is gpu_tune._decode_first:
            return lambda: 2.0
        config = calls[0].args[1]
        return lambda: (1.0 if config == self.best.get(config.bm) else 1.5) * (1 if x.shape[0] <= 128 else 3)


def plain_product(x, w, config):
    if config.stages == 5:
        raise RuntimeError("out of resource: shared memory")
    return reference.matmul(x, reference.Weight(w.format, w.shape, **w.tensors))


def test_tuning_takes_the_fastest_launch_that_runs_and_writes_data_that_is_read(tiny_cases, tmp_path):
    best = {16: tuning.CANDIDATES[16][4], 32: tuning.CANDIDATES[32][1], 64: tuning.CANDIDATES[tuning.ALL][2]}

    def tuner(device, timer, **more):
        return gpu_tune.tune(
            device, Slow(best), shapes=((64, 128),), formats=("int4", "nf4"), crossovers=(64, 128, 256),
            product=plain_product, layout="portable", **more,
        )  # fmt: skip

    done = run(tiny_cases[:1], tmp_path, tuner=tuner)
    found = tuning.Tuned.from_json((tmp_path / "cpu.json").read_text())
    assert found.matmul["int4"] == found.matmul["nf4"] == (
        (16, best[16]), (32, best[32]), (tuning.ALL, best[64]),
    )  # fmt: skip
    # three times as slow beyond 128 tokens, where decoding first takes twice
    assert found.crossover == {"int4": 128, "nf4": 128}
    assert found.origin["versions"]["torch"] == torch.__version__
    assert tuning.matmul_table("nf4", "cpu") == found.matmul["nf4"] and tuning.crossover("int4", "cpu") == 128
    assert tuning.matmul_table("int3", "cpu") == tuning.MATMUL and tuning.crossover("int3", "cpu") == 64
    failed = [row["failed"] for row in done.rows if row.get("failed")]
    assert len(failed) == 4 and all("shared memory" in why for why in failed)
    late, rows = gpu_tune.tune(CPU, Slow(best), deadline=0.0)
    assert late.matmul == {} and rows == []


def test_tuned_data_must_serve_every_number_of_tokens(tmp_path, monkeypatch):
    whole = tuning.Tuned(
        {"int4": ((16, tuning.MatmulConfig(16, stages=4)), (tuning.ALL, tuning.MatmulConfig(64, stages=4)))}
    )
    assert tuning.Tuned.from_json(whole.to_json()) == whole
    with pytest.raises(ValueError, match=r"table of int4 must end.*\[16\]"):
        tuning.Tuned.from_json(tuning.Tuned({"int4": whole.matmul["int4"][:1]}).to_json())
    (tmp_path / "sm_99.json").write_text(whole.to_json())
    monkeypatch.setattr(tuning, "_TUNED", tmp_path)
    assert tuning.by_tokens(tuning.matmul_table("int4", "sm_99"), 17).stages == 4
    # what is committed ships, so it is compiled and checked like the rest
    assert tuning.tuned_configs() == [("int4", tuning.MatmulConfig(64, stages=4))]
    from brise.kernels import variants_matmul

    assert "matmul-int4-g128-fp16-m64-n64k128w4s4" in [v.name for v in variants_matmul.variants()]
    tuning._committed.cache_clear()


def test_rows_are_on_the_disk_as_they_come(tmp_path):
    file = RowFile(tmp_path / "deep" / "a.jsonl")
    file.add({"a": 1})
    assert json.loads(file.path.read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="JSON"):
        file.add({"a": math.nan})
    file.close()
