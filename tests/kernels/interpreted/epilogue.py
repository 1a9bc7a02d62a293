"""Run by test_interpreted.py under TRITON_INTERPRET=1: the products with epilogues on the CPU, against float64."""

import tempfile

import torch
from matmul import MAP, poison, weight

from brise.kernels import epilogue_reference, fused_reference, launch, ops, reference, tuning
from brise.kernels.budget import check_budget

EPS = 1e-5
NAN = float("nan")


def packed(fmt, n, k, group, dtype, symmetric=True, double=False):
    """A weight in tiles, as it is stored, and in float64."""
    stored = weight(fmt, n, k, group, symmetric, double)
    tiles, plain = (
        ops.pack_weight(stored, fmt, (n, k), dtype, scales_map=MAP, layout_name=layout)
        for layout in ("tiles", "portable")
    )
    return tiles, plain, ops.dequantize(plain, torch.float64)


def stream(m, k, dtype):
    """Half-normed values of a random stream [M, K], and the stream and weight that they come from."""
    h = (torch.randn(m, k) * torch.rand(m, 1) * 5).to(dtype)
    norm = (torch.rand(k) + 0.5).to(dtype)
    # every other column of a wider tensor: both strides are unusual
    values = torch.randn(m, 2 * k + 6).to(dtype)[:, 3 : 2 * k + 3 : 2]
    values.copy_(h.float() * norm.float())
    return ops.HalfNormed(values, epilogue_reference.square_sums(h)), h, norm


def rooted(h, norm):
    """The norm of a stream in its own precision, and in float64."""
    exact = norm.double() * h.double() * torch.rsqrt(h.double().square().mean(-1, keepdim=True) + EPS)
    return fused_reference.rms_norm(h, norm, EPS), exact


def check_residual(fmt, n, k, group, m, dtype, norm=True, invariant=False, **kind):
    tiles, plain, exact_weight = packed(fmt, n, k, group, dtype, **kind)
    x = torch.randn(m, 2 * k + 6).to(dtype)[:, 3 : 2 * k + 3 : 2]
    before = (torch.randn(m, n + 3) * 3).to(dtype)[:, 2 : n + 2]
    gain = (torch.rand(n) + 0.5).to(dtype) if norm else None
    h, half = ops.matmul_residual(x, tiles, before, gain, impl="triton", batch_invariant=invariant)
    what = f"residual {fmt} {n}x{k} group {group} m {m} {dtype}"
    exact = before.double() + x.double() @ exact_weight.T
    eager = before + ops.quant_matmul(x, plain, impl="reference")
    check_budget(h, eager, exact, what)
    assert (half is not None) == norm
    if half is not None:
        check_budget(half.values, eager * gain, exact * gain.double(), what)
        # the squares are those of the stream as it was rounded
        want = epilogue_reference.square_sums(h.double())
        torch.testing.assert_close(half.sums, want.float(), rtol=1e-5, atol=0)
    if invariant:
        for i in range(m):
            one = slice(i, i + 1)
            alone, of_one = ops.matmul_residual(
                x[one], tiles, before[one], gain, impl="triton", batch_invariant=True
            )
            assert torch.equal(alone, h[one]) and torch.equal(of_one.sums, half.sums[:, one])
    return h, half


def check_swiglu(fmt, width, k, group, m, dtype, normed=True, invariant=False, **kind):
    tiles, plain, exact_weight = packed(fmt, 2 * width, k, group, dtype, **kind)
    half, h, norm = stream(m, k, dtype)
    x, exact = rooted(h, norm) if normed else (h, h.double())
    given = half if normed else h
    out = ops.matmul_swiglu(given, tiles, EPS, impl="triton", batch_invariant=invariant)
    eager = ops.swiglu(ops.quant_matmul(x, plain, impl="reference"), impl="reference")
    exact = fused_reference.swiglu(*(exact @ exact_weight.T).chunk(2, dim=-1))
    check_budget(out, eager, exact, f"swiglu {fmt} {width}x{k} group {group} m {m} {dtype}")
    if invariant:
        for i in range(m):
            one = ops.HalfNormed(half.values[i : i + 1], half.sums[:, i : i + 1].contiguous())
            alone = ops.matmul_swiglu(one, tiles, EPS, impl="triton", batch_invariant=True)
            assert torch.equal(alone, out[i : i + 1])
    return out


def check_rope(fmt, heads, groups, width, k, group, positions, tokens, slots, dtype, normed=True, **kind):
    """Queries against float64, and the ring slot by slot: what should be there is, the rest is as it was."""
    batch, n = positions.shape[0], (heads + 2 * groups) * width
    tiles, plain, exact_weight = packed(fmt, n, k, group, dtype, **kind)
    half, h, norm = stream(batch * tokens, k, dtype)
    x, exact = rooted(h, norm) if normed else (h, h.double())
    at = fused_reference.token_positions(positions, tokens).clamp_min(0)
    angle = at[..., None] * 100.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    # halves that are not alike, as no rotary embedding has them: which is read where must show
    angle = torch.cat((angle, angle + 0.3), dim=-1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    # rings in a wider tensor, with strides of their own
    rings = [torch.full((batch, groups, slots + 1, width + 8), NAN).to(dtype)[:, :, 1:, 8:] for _ in "kv"]
    given = half if normed else h
    q = ops.matmul_rope_cache_write(given, tiles, cos, sin, positions, *rings, EPS, impl="triton")

    def turned(y, cos, sin):
        parts = y.view(batch, tokens, -1, width).split([heads, groups, groups], dim=2)
        return *(fused_reference.rotate(part, cos, sin) for part in parts[:2]), parts[2]

    eager = turned(ops.quant_matmul(x, plain, impl="reference"), cos, sin)
    right = turned(exact @ exact_weight.T, cos.double(), sin.double())
    what = f"rope {fmt} {heads}+2*{groups} heads of {width} k {k} {dtype}"
    check_budget(q, eager[0], right[0], what)
    for b in range(batch):
        order = fused_reference.token_positions(positions, tokens)[b].tolist()
        oldest = max(0, max(order) - slots + 1)
        last = {p % slots: t for t, p in enumerate(order) if p >= oldest}
        for ring, plainly, wanted in zip(rings, eager[1:], right[1:]):
            for slot in range(slots):
                if slot not in last:
                    assert ring[b, :, slot].isnan().all(), "a slot of nobody was written"
                else:
                    token = last[slot]
                    check_budget(ring[b, :, slot], plainly[b, token], wanted[b, token], what)
    return q, rings


def check_wide():
    """Programs of 128 rows: two partial sums of squares each, and a whole head."""
    usual, tuning.MATMUL = tuning.MATMUL, ((tuning.ALL, tuning.MatmulConfig(16, bn=128)),)
    check_residual("int4", 200, 128, 64, 5, torch.float16)
    check_swiglu("int4", 80, 128, 128, 3, torch.float16)
    check_rope("int4", 2, 1, 128, 128, 64, torch.tensor([6, 0]), 1, 4, torch.float16)
    tuning.MATMUL = usual


def check_split():
    """Enough steps along K that the sum is split, twice: the same bits, and the counters left at zero."""

    def all_three():
        torch.manual_seed(7)
        yield from check_residual("int4", 80, 1152, 128, 3, torch.float16)[1].__dict__.values()
        yield check_swiglu("int4", 48, 1100, 1100, 2, torch.float16, symmetric=False)
        q, rings = check_rope(
            "nf4", 2, 1, 64, 1024, 64, torch.tensor([7, -1]), 1, 5, torch.float16, double=True
        )
        yield from (q, *(ring.nan_to_num(9.0) for ring in rings))

    started = []
    plan = launch.plan

    def seen(*args):
        made = plan(*args)
        started.append(made.options["SPLIT"])
        return made

    from brise.kernels import epilogue_launch

    epilogue_launch.plan = seen
    first, second = list(all_three()), list(all_three())
    epilogue_launch.plan = plan
    assert min(started) > 1, started
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert launch._locks and not any(bool(c.any()) for sets in launch._locks.values() for c in sets)


def check_far():
    """Rows of the stream and of a ring more than 2^31 elements apart, in a sparse file."""
    far, n, k = 2**31 + 64, 96, 64
    tiles, _, _ = packed("int4", n, k, 64, torch.float16)
    half, h, _ = stream(2, k, torch.float16)
    before, at = torch.randn(2, n).half(), torch.tensor([3, 1])
    cos, sin = torch.randn(2, 2, 1, 32).half()
    near = [torch.zeros(2, 1, 5, 32).half() for _ in "kv"]
    with tempfile.TemporaryDirectory() as folder:
        whole = torch.from_file(f"{folder}/sparse", shared=True, size=far + 1000, dtype=torch.float16)
        whole.as_strided((2, n), (far, 1)).copy_(before)
        whole.as_strided((2, k), (far, 1), 100).copy_(h)
        out = ops.matmul_residual(
            whole.as_strided((2, k), (far, 1), 100), tiles, whole.as_strided((2, n), (far, 1)), impl="triton"
        )
        assert torch.equal(out[0], ops.matmul_residual(h, tiles, before, impl="triton")[0])
        rings = [whole.as_strided((2, 1, 5, 32), (far, 160, 32, 1), place) for place in (200, 400)]
        q = ops.matmul_rope_cache_write(half, tiles, cos, sin, at, *rings, EPS, impl="triton")
        assert torch.equal(
            q, ops.matmul_rope_cache_write(half, tiles, cos, sin, at, *near, EPS, impl="triton")
        )
        assert all(torch.equal(a, b) and bool(b.any()) for a, b in zip(rings, near))


if __name__ == "__main__":
    assert launch.interpreting()
    torch.manual_seed(0)
    poison()
    half, single = torch.float16, torch.float32
    for fmt in reference.BITS:
        check_residual(fmt, 70, 192, 64, 3, half)
        check_swiglu(fmt, 48, 128, 128, 5, half, double=True)
        check_rope(fmt, 3, 1, 32, 128, 64, torch.tensor([4, -1, 37]), 1, 16, half)
        if fmt.startswith("int"):
            check_residual(fmt, 33, 96, 32, 2, half, symmetric=False, double=True)
            check_swiglu(fmt, 80, 72, 72, 17, single, symmetric=False)
    check_residual("int4", 130, 100, 100, 17, single)
    check_residual("nf4", 64, 64, 64, 1, half, norm=False)
    check_residual("nf4", 100, 128, 64, 19, half, invariant=True)
    check_residual("int4", 64, 128, 128, 0, half)
    check_swiglu("int4", 64, 128, 128, 1, half, normed=False)
    check_swiglu("nf4", 32, 128, 64, 18, half, invariant=True)
    check_swiglu("int4", 16, 64, 64, 0, half)
    # a row that rests, the ring gone round, several tokens at once, as many as there are slots
    check_rope("int4", 4, 2, 96, 192, 64, torch.tensor([15, -1], dtype=torch.int32), 3, 16, half)
    check_rope("int8", 1, 1, 128, 72, 72, torch.tensor([2]), 5, 5, single)
    check_rope("int4", 5, 2, 64, 130, 130, torch.tensor([0, 63, 9] * 6), 1, 8, half, symmetric=False)
    check_rope("int3", 2, 2, 32, 64, 64, torch.tensor([3]), 1, 4, half, normed=False)
    check_wide()
    check_split()
    check_far()
    print("interpreted epilogues: all within budget")
