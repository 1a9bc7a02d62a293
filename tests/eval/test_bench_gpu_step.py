"""The GPU benchmark's whole decode steps without a GPU: checked, beside the launches on their own, and seen wrong."""

import functools

import pytest
import torch

from brise.eval import bench_gpu, gpu_step
from brise.eval.gpu_protocol import WallTimer, measure, relative_error
from brise.kernels import tuning
from brise.kernels.ops import pack_weight
from brise.quant import linear

CPU = torch.device("cpu")
SIZE = {
    "vocab_size": 50, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "sliding_window": 8, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    monkeypatch.setattr(linear, "pack_weight", functools.partial(pack_weight, layout_name="tiles"))


@pytest.mark.parametrize("name,dtype", [("int4", "bfloat16"), ("nf4", "float16")])
def test_a_step_is_checked_and_both_sides_have_a_time(name, dtype):
    row = measure(gpu_step.step_case(name, 3, dtype, size=SIZE), CPU, WallTimer(), 3)
    assert row["ok"] and row["repeatable"] and row["ours"] == "fused", row
    assert set(row["seconds"]) == {"fused", "separate"} and row["layers"] == gpu_step.LAYERS
    assert 0 < row["errors"]["fused"] <= row["allowed"] and row["errors"]["separate"] <= 2 * row["allowed"]


def test_a_wrong_step_is_refused():
    problem = gpu_step.step_case("int4", 2, "float32", size=SIZE).make(CPU)
    out = problem.sides["fused"].calls[0]().clone()
    assert relative_error(problem.pick(out), problem.exact) <= problem.allowed
    out[1, 0, 5] += 0.01 * out.norm()
    assert relative_error(problem.pick(out), problem.exact) > problem.allowed


def test_the_cases_are_among_the_others_and_are_run_fused():
    cases = [case for case in bench_gpu.all_cases() if case.family == "step"]
    assert {(case.labels["format"], case.labels["dtype"], case.labels["m"]) for case in cases} >= {
        ("int4", "bfloat16", 1), ("int4", "bfloat16", 16), ("nf4", "bfloat16", 1),
    }  # fmt: skip
    assert max(case.labels["m"] for case in cases) <= tuning.STEP_ROWS
