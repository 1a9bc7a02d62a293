"""Addresses of more than 2^31 elements: read off the intermediate code, where no such tensor need exist."""

import re

import pytest

pytest.importorskip("triton", reason="the kernels are compiled by triton")
from brise.kernels import compile as aot

# arguments that can hold more than 2^31 elements; the others are vectors of N, K or a device's programs
LARGE = {"x_ptr", "w_ptr", "s_ptr", "absmax_ptr", "y_ptr", "work_ptr", "q_ptr"}
LARGE |= {"k_ptr", "v_ptr", "ks_ptr", "vs_ptr", "out_ptr", "acc_ptr", "stat_ptr", "keys_ptr", "values_ptr"}
LARGE |= {"o_ptr", "do_ptr", "dq_ptr", "dk_ptr", "dv_ptr", "lse_ptr", "delta_ptr"}
LARGE |= {"qo_ptr", "ko_ptr", "cos_ptr", "sin_ptr", "residual_ptr", "sum_ptr", "gate_ptr", "up_ptr"}
LARGE |= {"h_ptr", "g_ptr", "sums_ptr"}
CHECKED = [
    "matmul-int4-g128-fp16-m16-split",
    "matmul-int4-g32-fp16-m16-zero",
    "matmul-nf4-g64-bf16-m16-double-split",
    "matmul-int8-row-fp16-m16",
    "matmul-int3-g64-fp16-m16",
    "matmul-residual-int4-g128-bf16-m16-split-normed",
    "matmul-swiglu-int4-g128-bf16-m16-normed",
    "matmul-rope-int4-g128-bf16-m16-split-normed",
    "dequantize-int4-fp16",
    "int8-dynamic-m32-outliers",
    "quantize-tokens",
    "decode-d128-g4-bf16-int8-t8",
    "rms-norm-14336-bf16-add",
    "swiglu-bf16",
    "rope-d128-bf16-int8-each",
    "attention-forward-d128-bf16-sm90",
    "attention-dq-d64-bf16-sm90",
    "attention-dkdv-d64-bf16-sm90",
]
# what hands a value on, in another shape
PASSES_ON = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.bitcast", "tt.reshape", "tt.trans"}


def narrow_addresses(ttir: str) -> list[str]:
    """Where 32 bits may not hold the place of an element of one of :data:`LARGE`.

    One index is always below 2^31, and so is an index within a block. A product of two values that are known only
    when the kernel runs (a row times the length of a row) is not: it must be made of 64-bit factors.
    """
    base = {f"%{n}": n for n in LARGE}
    constant: set[str] = set()
    product: set[str] = set()
    found = []
    for line in ttir.splitlines():
        result = re.match(r"\s*(%\S+) = (\S+) (.*)", re.sub(r"loc\(.*?\)", "", line))
        if result is None:
            continue
        name, op, rest = result.groups()
        operands = re.findall(r"%[\w#]+", rest.split(" : ")[0])
        narrow = re.search(r"\bi32\b|xi32\b", rest) is not None
        if op in ("arith.constant", "tt.make_range"):
            constant.add(name)
        elif op == "tt.addptr":
            if operands[0] in base:
                base[name] = base[operands[0]]
                if operands[1] in product:
                    found.append(f"{base[name]}: {line.strip()}")
        elif op == "arith.extsi":
            if operands[0] in product:
                found.append(f"widened after the product: {line.strip()}")
        elif op in PASSES_ON or op.startswith("arith."):
            if op in PASSES_ON and operands and operands[0] in base:
                base[name] = base[operands[0]]
            if operands and all(o in constant for o in operands):
                constant.add(name)
            runtime = [o for o in operands if o not in constant]
            two = op == "arith.muli" and len(runtime) == 2
            if narrow and (two or any(o in product for o in operands)) and "cmpi" not in op:
                product.add(name)
    return found


@pytest.mark.parametrize("name", CHECKED)
def test_addresses_of_large_tensors_are_64_bits_wide(name):
    variant = next(v for v in aot.variants() if v.name == name)
    ttir = aot.build(variant, 90).asm["ttir"]
    assert any(f"%{n}" in ttir for n in LARGE) and "tt.addptr" in ttir
    assert narrow_addresses(ttir) == []


def test_a_narrow_address_is_seen():
    lines = """
    %c512 = arith.constant 512 : i32
    %row = arith.addi %pid, %c512 : i32
    %start = arith.muli %row, %K : i32
    %offset = tt.splat %start : i32 -> tensor<64xi32>
    %w = tt.splat %w_ptr : !tt.ptr<i8> -> tensor<64x!tt.ptr<i8>>
    %at = tt.addptr %w, %offset : tensor<64x!tt.ptr<i8>>, tensor<64xi32>
    """
    assert "w_ptr" in narrow_addresses(lines)[0]
    assert narrow_addresses(lines.replace("w_ptr", "bias_ptr")) == []
    assert narrow_addresses(lines.replace("i32", "i64")) == []
    # a block's number times its size is an index, not a place
    assert narrow_addresses(lines.replace("%row, %K", "%row, %c512")) == []
    late = lines.replace("%offset = tt.splat %start : i32", "%offset = arith.extsi %start : i32 to i64")
    assert "widened" in narrow_addresses(late)[0]
