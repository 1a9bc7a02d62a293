"""Run by test_interpreted.py under TRITON_INTERPRET=1: every matmul kernel on the CPU against float64."""

import tempfile

import torch

from brise.kernels import launch, ops, reference
from brise.kernels.budget import check_budget
from brise.quant.double_quant import dynamic_map, quantize_scales
from brise.quant.packing import pack_codes

MAP = dynamic_map(torch.device("cpu"))


def weight(fmt, n, k, group, symmetric=True, double=False):
    """A random weight, as the tensors on disk."""
    bits = reference.BITS[fmt]
    groups = k // group
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, groups) * 0.01 + 0.005
    t = {"qweight": pack_codes(codes, bits)}
    if double:
        t["scales"], t["scales_absmax"], t["scales_offset"] = quantize_scales(scale)
    else:
        t["scales"] = scale.half() if fmt.startswith("int") else scale
    if not symmetric:
        t["zeros"] = pack_codes(torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8), bits)
    return t


def check(fmt, n, k, group, m, dtype, symmetric=True, double=False, bias=False, invariant=False):
    stored = weight(fmt, n, k, group, symmetric, double)
    tiles = ops.pack_weight(stored, fmt, (n, k), dtype, scales_map=MAP, layout_name="tiles")
    plain = ops.pack_weight(stored, fmt, (n, k), dtype, scales_map=MAP, layout_name="portable")
    exact_weight = ops.dequantize(plain, torch.float64)
    # every other column of a wider tensor: both strides are unusual
    x = torch.randn(m, 2 * k + 6).to(dtype)[:, 3 : 2 * k + 3 : 2]
    b = torch.randn(n).to(dtype) if bias else None
    exact = x.double() @ exact_weight.T + (0 if b is None else b.double())
    out = ops.quant_matmul(x, tiles, b, impl="triton", batch_invariant=invariant)
    eager = ops.quant_matmul(x, plain, b, impl="reference")
    check_budget(out, eager, exact, f"{fmt} {n}x{k} group {group} m {m} {dtype}")
    if invariant:
        alone = torch.cat(
            [ops.quant_matmul(row, tiles, b, impl="triton", batch_invariant=True) for row in x.split(1)]
        )
        assert torch.equal(alone, out)
    dense = launch.dequantize(
        torch.float32, fmt, (n, k), *(tiles.tensors.get(name) for name in
        ("qweight", "scales", "zeros", "scales_absmax", "scales_offset", "scales_map")),
    )  # fmt: skip
    assert torch.allclose(dense.double(), exact_weight, rtol=1e-6, atol=1e-9)
    return out


def check_split():
    """Enough steps along K that the sum is split, twice: the same bits, and the counters left at zero."""
    for symmetric, group in ((True, 128), (False, 1100)):
        torch.manual_seed(7)
        first = check("int4", 20, 1152 if symmetric else 1100, group, 2, torch.float16, symmetric, bias=True)
        torch.manual_seed(7)
        second = check("int4", 20, 1152 if symmetric else 1100, group, 2, torch.float16, symmetric, bias=True)
        assert torch.equal(first, second)
    assert launch._locks and not any(bool(c.any()) for sets in launch._locks.values() for c in sets)


def check_int8_dynamic():
    for m, n, k in ((1, 40, 96), (19, 70, 200)):
        for threshold in (0.0, 6.0):
            for dtype in (torch.float16, torch.float32):
                x = torch.randn(m, k).to(dtype)
                x[:, 5] = 9.0
                w = ops.pack_weight(weight("int8", n, k, k), "int8", (n, k), dtype, layout_name="portable")
                bias = torch.randn(n).to(dtype)
                out = ops.int8_dynamic_matmul(x, w, bias, threshold=threshold, impl="triton")
                # the integer part is exact in both: only the rounding of the output separates them
                want = ops.int8_dynamic_matmul(
                    x.float(), w, bias.float(), threshold=threshold, impl="reference"
                )
                # element by element: one activation rounded to the other integer shows in one element only
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(out.float(), want, rtol=eps, atol=1e-5)


def check_odd_tokens():
    """A token of zeros, one whose reciprocal is no number, and what is not finite: the last must stay so."""
    w = ops.pack_weight(weight("int8", 40, 96, 96), "int8", (40, 96), torch.float32, layout_name="portable")
    x = torch.randn(5, 96)
    x[0], x[1] = 0, x[1] * 1e-39
    x[2, 7], x[3, 90] = float("nan"), float("inf")
    out = ops.int8_dynamic_matmul(x, w, impl="triton")
    assert not out[:2].any() and out[4].isfinite().all() and not out[2:4].isfinite().any()


def check_far():
    """Rows of x more than 2^31 elements apart, in a sparse file of which only the pages that are read exist."""
    far, k = 2**31 + 64, 128
    with tempfile.TemporaryDirectory() as folder:
        whole = torch.from_file(f"{folder}/sparse", shared=True, size=far + k, dtype=torch.float16)
        x = whole.as_strided((2, k), (far, 1))
        x.copy_(torch.randn(2, k))
        for fmt, group in (("int4", 64), ("int8", k)):
            w = ops.pack_weight(weight(fmt, 20, k, group), fmt, (20, k), x.dtype, layout_name="tiles")
            near = ops.quant_matmul(x.contiguous(), w, impl="triton")
            assert torch.equal(ops.quant_matmul(x, w, impl="triton"), near)
        w = ops.pack_weight(weight("int8", 20, k, k), "int8", (20, k), x.dtype, layout_name="portable")
        near = ops.int8_dynamic_matmul(x.contiguous(), w, threshold=2.0, impl="triton")
        assert torch.equal(ops.int8_dynamic_matmul(x, w, threshold=2.0, impl="triton"), near)


def poison():
    """Outputs come from torch.empty: fill it with NaN, so that an element left unwritten shows."""
    make = torch.empty

    def poisoned(*args, **kwargs):
        out = make(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    torch.empty = poisoned


if __name__ == "__main__":
    assert launch.interpreting()
    torch.manual_seed(0)
    poison()
    for fmt in reference.BITS:
        integer = fmt.startswith("int")
        check(fmt, 70, 192, 64, 3, torch.float16)
        check(fmt, 33, 72, 72, 17, torch.float32, bias=True)
        check(fmt, 48, 256, 128, 5, torch.float16, double=True)
        if integer:
            check(fmt, 65, 192, 64, 2, torch.float16, symmetric=False)
            check(fmt, 40, 96, 32, 2, torch.float16, symmetric=False, double=True)
            check(fmt, 40, 100, 100, 1, torch.float16, symmetric=False)
    check("int4", 64, 128, 128, 4, torch.float16)
    check("int4", 16, 64, 16, 40, torch.float16)
    check("nf4", 100, 128, 64, 35, torch.float16, invariant=True)
    check("int4", 30, 128, 64, 0, torch.float16)
    check_split()
    check_int8_dynamic()
    check_odd_tokens()
    check_far()
    print("interpreted matmul kernels: all within budget")
