"""The compiled products of the CPU: decoded to the bit, multiplied within the budget, and what happens without them."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from brise.kernels import cpu, native, ops, reference
from brise.kernels.budget import check_budget
from brise.kernels.reference import Weight
from brise.quant.config import QuantSpec
from brise.quant.double_quant import dynamic_map
from brise.quant.rtn import rtn

KINDS = {"AMX": 16, "AVX512_BF16": 16, "AVX512": 16, "AVX2": 8}
# what this machine's processor can run
RUNNABLE = list(KINDS)[list(KINDS).index(native.processor()) :] if native.processor() in KINDS else []
CASES = [
    ("nf4", 64, True),
    ("nf4-dq", 64, True),
    ("fp4", 32, True),
    ("int4", None, True),
    ("int4", 32, False),
    ("int4", 64, True),
    ("int4", 128, False),
    ("int8", 32, False),
    ("int8", 128, True),
    ("int8", None, True),
    ("int8", None, False),
    ("int3", None, True),
    ("int3", 32, False),
    ("int3", 64, True),
    ("int2", 64, False),
    ("int2", 128, True),
]


@pytest.fixture(params=list(KINDS))
def library(request):
    if request.param not in RUNNABLE:
        pytest.skip(f"this processor has no {request.param}")
    found = native.library(request.param)
    if found is None:
        pytest.skip("there is no C compiler here")
    assert found.brise_lanes() == KINDS[request.param]
    assert found.brise_has_bf16() == (request.param in ("AMX", "AVX512_BF16"))
    return found


def weight(fmt, group, symmetric, n=37, k=768):
    """Of more than 256 scales, which share one absmax where they are quantized, and an odd number of zero points."""
    torch.manual_seed(3)
    fmt, _, double = fmt.partition("-")
    spec = QuantSpec(format=fmt, group_size=group, symmetric=symmetric, double_quant=bool(double))
    q = rtn(torch.randn(n, k) * torch.rand(n, 1) + 0.3, spec)
    values = dynamic_map(torch.device("cpu")) if double else None
    return Weight(fmt, (n, k), **q.tensors, scales_map=values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [768, 1216], ids=["short", "long"])
@pytest.mark.parametrize("fmt, group, symmetric", CASES)
def test_products_keep_the_budget_and_rows_know_nothing_of_one_another(
    library, fmt, group, symmetric, k, dtype
):
    """Long rows of integers are multiplied in integers where the processor can; 1216 ends within a chunk. Of tile
    registers 23 rows are passes of 4, 2 or 1 and more than are multiplied at a time."""
    w = weight(fmt, group, symmetric, k=k + 64 * (group == 128 and k == 1216))
    dense = reference.dequantize(w, torch.float64)
    x = torch.randn(23, w.shape[1]).to(dtype)
    for alone in (False, True):
        out = native.matmul(x, w, None, library, alone)
        check_budget(out, x @ dense.to(dtype).T, x.double() @ dense.T, fmt)
        turned = x.t().contiguous().t()
        assert torch.equal(native.matmul(turned, w, None, library, alone), out), "strided activations"
    for first, last in ((0, 1), (3, 5), (4, 7), (4, 11), (0, 0), (2, 22)):
        assert torch.equal(native.matmul(x[first:last], w, None, library, True), out[first:last])


@pytest.mark.parametrize("dtype", list(native.DTYPES))
@pytest.mark.parametrize("fmt, group, symmetric", [case for case in CASES if case[0] not in ("int2", "int3")])
def test_decoded_to_the_bit(library, fmt, group, symmetric, dtype):
    w = weight(fmt, group, symmetric)
    out = native.decode(w, 0, torch.empty(w.shape, dtype=dtype), library)
    assert torch.equal(out, reference.dequantize(w, dtype))


@pytest.mark.parametrize("dtype", list(native.DTYPES))
@pytest.mark.parametrize("group", [32, 256])
@pytest.mark.parametrize("fmt, symmetric", [("int4", True), ("int4", False), ("int2", True), ("int2", False)])
def test_activations_of_every_size_in_integers(library, fmt, symmetric, group, dtype):
    """Each lane, or group, has a power of 2 of its own: between the least and the largest numbers, and just where a
    byte would not hold what is rounded up; what is no finite number makes its row nan, and no other."""
    w = weight(fmt, group, symmetric, n=100, k=1024)
    dense = reference.dequantize(w, torch.float64)
    largest = {torch.float32: 2.0**100, torch.bfloat16: 2.0**100, torch.float16: 2.0**10}[dtype]
    sizes = torch.tensor([2.0**-100, 2.0**-20, 1.0, largest])
    near = 2 - torch.arange(1024, dtype=torch.float64) * 2.0**-19
    # the largest that three bytes hold, and two, with their neighbours on either side
    steps = torch.arange(-256, 256, dtype=torch.float64)
    held = torch.cat([0x7F7F7F * 2.0**-22 + steps * 2.0**-23, 0x7F7F * 2.0**-14 + steps * 2.0**-18]).roll(14)
    torch.manual_seed(4)
    signs = torch.randint(0, 2, (8, 1024)) * 2 - 1
    x = torch.cat(
        [torch.randn(4, 1024) * sizes[:, None], near.float() * signs[:4], torch.randn(1, 1024) * signs[:1]]
    )
    x[8, ::3] *= 1e-6
    x = torch.cat([x, held.float() * signs[:1], held.float().flip(0) * signs[1:2]]).to(dtype)
    out = native.matmul(x, w, None, library)
    for row in range(len(x)):  # each by itself, or the largest would hide the rest
        exact = x[row].double() @ dense.T
        check_budget(out[row], x[row] @ dense.to(dtype).T, exact)
        # a single row goes a way of its own
        check_budget(native.matmul(x[row : row + 1], w, None, library)[0], x[row] @ dense.to(dtype).T, exact)
    # below 2^-103 the units are no smaller, as they would be no plain numbers: few bits are left, but the right ones
    least = torch.randn(1, 1024) * 2.0**-118
    given = least.to(dtype)
    error = (native.matmul(given, w, None, library).double() - given.double() @ dense.T).abs().max()
    assert error <= 1024 * 2.0**-125 * dense.abs().max() + torch.finfo(dtype).smallest_normal
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[2, 700] = bad
        found = native.matmul(broken, w, None, library)
        assert not found[2].isfinite().any() and torch.equal(found[[0, 1, 3]], out[[0, 1, 3]])
    assert not native.matmul(torch.zeros(1, 1024, dtype=dtype), w, None, library).any()


def test_short_rows_are_added_up_in_fp32():
    """Of so few channels fp32 makes the smaller error than 24 bits: there both kinds have the same bits, beyond not."""
    kinds = [native.library(kind) for kind in ("AVX512_BF16", "AVX512") if kind in RUNNABLE]
    if len(kinds) < 2 or None in kinds:
        pytest.skip("this processor has no products of bytes, or there is no C compiler here")
    for k, same in ((960, True), (1024, False)):
        w, x = weight("int4", 32, True, k=k), torch.randn(2, k)
        assert torch.equal(*(native.matmul(x, w, None, library) for library in kinds)) == same


@pytest.mark.parametrize(
    "fmt, group, parts",
    [
        ("int4", 32, 0),
        ("int4", 64, 2),
        ("int4", 128, 1),
        ("int4", 256, 1),
        ("int4", None, 1),
        ("int8", 16, 0),
        ("int8", 32, 2),
        ("int8", 64, 1),
        ("int2", 64, 0),
        ("int2", 256, 1),
        ("int2", 32, 0),
        ("nf4", 64, 0),
    ],
)
def test_which_weights_are_multiplied_by_tile_registers(library, fmt, group, parts):
    w = weight(fmt, group, True, n=16, k=768)
    rows = {1: 1 << 30, 2: 64}.get(parts, 16 if fmt == "int8" else 48)
    tiles = library is native.library("AMX")
    assert native.tile_parts(w, torch.float32, library) == (parts if tiles else 0)
    assert native.tile_parts(w, torch.bfloat16, library) == ((2 if fmt == "nf4" else parts) if tiles else 0)
    if tiles and library is native.library():
        assert cpu.few_rows(w, torch.float32, library) == rows


@pytest.mark.parametrize("n", [1, 15, 16, 17, 50])
@pytest.mark.parametrize(
    "fmt, group", [("int4", 32), ("int4", None), ("int8", None), ("int2", 256), ("nf4", 32)]
)
def test_rows_of_unfinished_strips(library, fmt, group, n):
    """Strips of fewer than 16 rows, and chunks that a row ends within; nothing behind the weight is read or used."""
    w = weight(fmt, group, fmt != "int4", n=n + 50, k=1056 if group in (None, 32) else 1024)
    whole = reference.dequantize(w, torch.float64)
    x = torch.randn(5, w.shape[1]).to(torch.bfloat16 if fmt == "nf4" else torch.float32)
    full = native.matmul(x, w, None, library)
    part = dataclasses.replace(w, shape=(n, w.shape[1]), qweight=w.qweight[:n].clone(), scales=w.scales[:n].clone(),
                               zeros=None if w.zeros is None else w.zeros[:n].clone())  # fmt: skip
    assert torch.equal(native.matmul(x, part, None, library), full[:, :n])
    check_budget(full, x @ whole.to(x.dtype).T, x.double() @ whole.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fmt, group", [("int4", 128), ("int8", None), ("fp4", 128), ("nf4", 64), ("int3", 32)]
)
def test_many_tokens_are_multiplied_some_at_a_time(library, fmt, group, dtype):
    w = weight(fmt, group, True, n=21, k=4096)
    x, bias = torch.randn(150, 4096).to(dtype), torch.randn(21)
    for added in (None, bias):
        pieces = [native.matmul(rows, w, added, library, True) for rows in x.split(7)]
        assert torch.equal(native.matmul(x, w, added, library, True), torch.cat(pieces))


@pytest.mark.parametrize("fmt, chunks", [("int8", 256), ("int8", 257), ("int8", 2100), ("int4", 300)])
def test_rows_of_one_scale_however_long(library, fmt, chunks):
    """Sums in 32 bits hold the longest runs, also of the largest codes and of activations of one sign whose digits are
    127."""
    k = chunks * (64 if fmt == "int8" else 128)
    w = weight(fmt, None, True, n=18, k=k)
    if not native.tile_parts(w, torch.float32, library):
        pytest.skip("for sums in 32 bits")
    w.qweight[0] = 255
    dense = reference.dequantize(w, torch.float64)
    digits = torch.full((1, k), 0x3F7F7F00 * 2.0**-29)
    x = torch.cat([torch.randn(2, k), digits, -digits])
    out = native.matmul(x, w, None, library)
    for row in range(4):
        check_budget(out[row], x[row] @ dense.float().T, x[row].double() @ dense.T)


@pytest.mark.parametrize("fmt", ["int8", "int4", "int2"])
def test_what_zero_points_take_away_is_exact(library, fmt):
    """Of weights whose mean is 0 and activations of one sign: the codes' sum is a hundred times the product."""
    values = torch.randn(64, 4096)
    spec = QuantSpec(format=fmt, group_size=None, symmetric=False)
    w = Weight(fmt, (64, 4096), **rtn(values - values.mean(1, keepdim=True), spec).tensors)
    dense = reference.dequantize(w, torch.float64)
    for x in (torch.full((1, 4096), 0x3F7F7F00 * 2.0**-29), torch.rand(1, 4096) + 1):
        check_budget(native.matmul(x, w, None, library), x @ dense.float().T, x.double() @ dense.T)


BEHIND = """
import ctypes, mmap, sys, torch
from brise.kernels import native
from brise.kernels.reference import Weight
from brise.quant.config import QuantSpec
from brise.quant.rtn import rtn

libc = ctypes.CDLL(None)

def at_the_end(tensor):
    size = tensor.numel() * tensor.element_size()
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    held = mmap.mmap(-1, whole + mmap.PAGESIZE)
    place = ctypes.addressof(ctypes.c_char.from_buffer(held))
    assert not libc.mprotect(ctypes.c_void_p(place + whole), mmap.PAGESIZE, 0)
    out = torch.frombuffer(held, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size).view(tensor.shape)
    return out.copy_(tensor)

for fmt in ("int2", "int3", "int4", "int8", "nf4"):
    for group in (None, 64):
        spec = QuantSpec(format=fmt, group_size=group, symmetric=group is None or fmt == "nf4")
        for n, k in ((16, 1024), (19, 1024), (16, 1088), (3, 1088)):
            q = rtn(torch.randn(n, k), spec)
            w = Weight(fmt, (n, k), **{name: at_the_end(t) for name, t in q.tensors.items()})
            for dtype in native.DTYPES:
                for rows in (1, 5):
                    x = at_the_end(torch.randn(rows, k).to(dtype))
                    native.matmul(x, w, None, native.library(sys.argv[1]))
"""


def test_nothing_behind_a_weight_or_activations_is_read(library):
    """All end where the memory does: who reads on is ended by the system."""
    kind = next(kind for kind in RUNNABLE if native.library(kind) is library)
    subprocess.run([sys.executable, "-c", BEHIND, kind], check=True, timeout=300)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("group", [32, 48])
def test_scales_are_read_in_any_dtype(library, stored, group):
    """Two or three groups' worth of codes; rows that do not begin at the first, and a last strip cut short."""
    w = weight("int8", group, False, n=21, k=480)
    w = dataclasses.replace(w, scales=w.scales.to(stored))
    assert native.decodes("int8", 480, 480 // group, library)
    out = native.decode(w, 5, torch.empty(16, 480), library)
    assert torch.equal(out, reference.dequantize(w)[5:])
    x = torch.randn(3, 480)
    dense = reference.dequantize(w, torch.float64)
    for dtype in native.DTYPES:
        given, bias = x.to(dtype), torch.randn(21).to(dtype)
        exact, eager = given.double() @ dense.T, given @ dense.to(dtype).T
        check_budget(native.matmul(given, w, None, library), eager, exact)
        with_bias = native.matmul(given, w, 100 * bias, library)
        check_budget(with_bias, eager + 100 * bias, exact + 100 * bias.double())


@pytest.mark.parametrize("n, k, m", [(37, 64, 11), (5, 1024, 1), (16, 16, 4)])
def test_dense_products(library, n, k, m):
    torch.manual_seed(5)
    x, w = torch.randn(m, k), torch.randn(n, k) + 0.2
    out = native.dense(x, w, library)
    check_budget(out, x @ w.T, x.double() @ w.double().T)
    assert torch.equal(native.dense(x[-1:], w, library), out[-1:])


@pytest.mark.parametrize("branch", [True, False])
def test_rms_norm(library, branch):
    torch.manual_seed(6)
    x, other, scale = torch.randn(3, 96) * 5, torch.randn(3, 96), torch.randn(96)
    out, total = native.rms_norm(x, scale, 1e-2, other if branch else None, library)
    assert torch.equal(total, x + other if branch else x)
    exact = total.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-2).sqrt() * scale.double()
    check_budget(out, torch.rms_norm(total, (96,), scale, 1e-2), exact)


def test_every_code_of_every_phase(library):
    """Each code in each place of a byte, by hand: a row of ones and zeros picks one channel."""
    for fmt, bits in (("nf4", 4), ("int3", 3), ("int2", 2), ("int8", 8)):
        count = 1 << bits
        width = 544
        codes = torch.arange(width) * 7 % count
        stream = sum(code << (bits * i) for i, code in enumerate(codes.tolist()))
        packed = torch.tensor(list(stream.to_bytes(width * bits // 8, "little")), dtype=torch.uint8)[None]
        w = Weight(fmt, (1, width), packed, torch.full((1, 1), 2.0))
        values = reference.CODEBOOKS.get(fmt) or [float(c - count // 2) for c in range(count)]
        expected = torch.tensor([values[c] for c in codes.tolist()]) * 2
        assert torch.equal(native.matmul(torch.eye(width), w, None, library)[:, 0], expected)


@pytest.mark.parametrize(
    "fmt, width, groups",
    [
        ("nf4", 4, 1),
        ("int4", 72, 3),
        ("int3", 48, 2),
        ("int2", 8, 1),
        ("int8", 1 << 16, 4096),
        ("int4", 1 << 20, 1),
    ],
)
def test_what_is_not_taken_goes_the_other_way(fmt, width, groups):
    library = native.active()
    if library is None:
        pytest.skip("there is no C compiler here")
    assert not native.takes(fmt, width, groups, library)


def test_with_and_without_it_products_agree(monkeypatch):
    """QuantLinear's op, both ways, and a product so large that it is decoded block by block."""
    q = rtn(torch.randn(48, 256), QuantSpec(format="nf4"))
    w = ops.pack_weight(dict(q.tensors), "nf4", (48, 256), torch.float32)
    for rows in (1, 100):
        x = torch.randn(rows, 256)
        exact = x.double() @ q.dequantize(torch.float64).T
        for way in (ops.quant_matmul(x, w), *_without(lambda x=x: ops.quant_matmul(x, w))):
            check_budget(way, x @ q.dequantize().T, exact)


def _without(call):
    with native.without():
        assert native.active() is None
        yield call()


CHECK = """
import torch
from brise.kernels import native
print(native.library() is not None)
"""


@pytest.mark.parametrize("how", ["none", "off", "failing", "damaged", "built", "kept"])
def test_a_machine_without_a_compiler_or_with_a_damaged_cache(tmp_path, how, monkeypatch):
    if not RUNNABLE or native.library() is None:
        pytest.skip("nothing can be compiled here")
    environment = {"BRISE_CACHE": str(tmp_path)}
    if how == "none":
        environment["CC"] = "no-such-compiler"
    elif how == "off":
        environment["BRISE_NATIVE"] = "0"
    elif how == "failing":
        environment["CC"] = "false"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def run():
        done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True)
        return done.stdout.strip() == "True"

    found = run()
    assert found == (how in ("damaged", "built", "kept"))
    made = list((tmp_path / "native").glob("*.so")) if (tmp_path / "native").is_dir() else []
    assert len(made) == (1 if found else 0) and not (tmp_path / "native" / "unit.o").exists()
    if how == "damaged":
        made[0].write_bytes(made[0].read_bytes()[:2000])
        assert run() and made[0].stat().st_size > 2000
    if how == "kept":
        before = made[0].stat().st_mtime_ns
        assert run() and made[0].stat().st_mtime_ns == before
