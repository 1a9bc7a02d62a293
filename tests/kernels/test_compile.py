"""What ships, compiled for GPUs that are not here: no spills, memory that fits, the matrix instructions."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from brise.kernels import compile as aot

RECORDED = Path(__file__).parents[2] / "results" / "compile.jsonl"
# the most frequent launch of each kernel; `brise bench compile` goes through all of them
CHECKED = {
    "matmul-int4-g128-fp16-m16": (80, 90),
    "matmul-int4-g128-bf16-m16": (80, 90),
    "matmul-int4-g128-fp16-m64": (90,),
    "matmul-int4-g32-fp16-m16-zero": (90,),
    "matmul-int4-g128-fp16-m16-zero-bias": (90,),
    "matmul-nf4-g64-bf16-m16": (80, 90),
    "matmul-nf4-g64-fp16-m16-double-split": (90,),
    "matmul-int8-row-bf16-m16": (80, 90),
    "matmul-int3-g64-fp16-m16": (90,),
    "matmul-residual-int4-g128-bf16-m16-split-normed": (90,),
    "matmul-swiglu-int4-g128-bf16-m16-normed": (90,),
    "matmul-rope-int4-g128-bf16-m16-split-normed": (80,),
    "dequantize-nf4-fp16": (90,),
    "int8-dynamic-m64": (90,),
    "int8-dynamic-m32-outliers": (80,),
    "quantize-tokens": (90,),
    "decode-d128-g4-bf16": (90,),
    "decode-d128-g4-fp16-int8": (80,),
    "rope-d128-bf16-int8": (90,),
    "attention-forward-d128-bf16-sm90": (90,),
    "attention-dq-d64-bf16-sm90": (90,),
    "attention-dkdv-d64-bf16-sm90": (90,),
    "attention-forward-d64-bf16-sm80": (80,),
}


def recorded() -> dict[tuple[str, str], dict]:
    rows = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    return {(row["kernel"], row["arch"]): row for row in rows}


def test_every_shipped_configuration_is_on_record_and_sound():
    rows = recorded()
    for variant in aot.variants():
        for arch in variant.arches:
            row = rows[variant.name, f"sm_{arch}"]
            assert not aot.faults(variant, row), (variant.name, aot.faults(variant, row))


@pytest.mark.parametrize("name,arch", [(name, arch) for name, archs in CHECKED.items() for arch in archs])
def test_compiles_as_recorded(name, arch):
    variant = next(v for v in aot.variants() if v.name == name)
    row = aot.compile_variant(variant, arch)
    assert not aot.faults(variant, row)
    before = recorded()[name, f"sm_{arch}"]
    if row["triton"] == before["triton"]:
        # a tenth more instructions in the loop is a regression to look at, not noise: the compiler has none
        assert row["loop"] <= 1.1 * before["loop"], (
            f"{name}: {before['loop']} instructions in the loop grew to {row['loop']}"
        )


def test_the_int4_weights_go_from_memory_to_the_matrix_units_without_a_detour():
    row = recorded()["matmul-int4-g128-fp16-m16", "sm_90"]
    assert row["HGMMA"] == 8 and row["HMMA"] == row["SHFL"] == row["LDSM"] == 0
    assert row["wide_loads"] >= 12 and row["registers"] <= 96


@pytest.mark.parametrize(
    "kind", ["residual-int4-g128-bf16-m16", "swiglu-int4-g128-bf16-m16", "rope-int4-g128-bf16-m16"]
)
def test_an_epilogue_costs_nothing_before_it(kind):
    """The main loop is that of the plain product, whatever comes behind it."""
    rows = recorded()
    plain = rows["matmul-int4-g128-bf16-m16", "sm_90"]
    found = [
        row for (name, arch), row in rows.items() if name.startswith(f"matmul-{kind}") and arch == "sm_90"
    ]
    found = [row for row in found if not {"zero", "ragged"} & set(row["kernel"].split("-"))]
    assert found
    for row in found:
        assert row["loop"] <= 1.02 * plain["loop"] and row["HGMMA"] == plain["HGMMA"], row


def test_a_fault_is_seen():
    variant = aot.variants()[0]
    sound = recorded()[variant.name, "sm_90"]
    for change in ({"spills": 1}, {"local": 8}, {"shared": 300_000}, {"HGMMA": 0}, {"wide_loads": 0}):
        assert aot.faults(variant, sound | change)
