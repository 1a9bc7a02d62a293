"""Run by test_interpreted.py under TRITON_INTERPRET=1: the fused kernels on the CPU against float64 and eager code."""

import torch

from brise.kernels import fused_reference, launch, ops, tuning_decode
from brise.kernels.budget import check_budget

NAN = float("nan")


def check_norm(rows, width, dtype, weight_dtype=None, residual=False, eps=1e-5):
    # rows of a wider tensor
    x = (torch.randn(rows, width + 5) * 3).to(dtype)[:, 2 : width + 2]
    r = torch.randn(rows, width).to(dtype) if residual else None
    w = torch.randn(width).to(weight_dtype or dtype)
    out, total = ops.rms_norm(x, w, eps, r, impl="triton")
    eager, eager_total = ops.rms_norm(x, w, eps, r, impl="reference")
    assert torch.equal(total, eager_total) and out.dtype == eager.dtype
    exact = eager_total.double()
    exact = w.double() * exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    check_budget(out, eager, exact, f"rms_norm {rows}x{width} {dtype}")


def check_swiglu(shape, dtype):
    x = (torch.randn(*shape[:-1], 2 * shape[-1]) * 4).to(dtype)
    out = ops.swiglu(x, impl="triton")
    gate, up = x.chunk(2, dim=-1)
    a, b = gate.double(), up.double()
    check_budget(
        out, ops.swiglu(gate, up, impl="reference"), a * torch.sigmoid(a) * b, f"swiglu {shape} {dtype}"
    )
    assert torch.equal(ops.swiglu(gate.contiguous(), up.contiguous(), impl="triton"), out)


def check_rope(positions, tokens, heads, groups, width, slots, dtype, int8=False):
    """Against the turned vectors in float64, and against the reference's ring to the bit."""
    batch = positions.shape[0]
    # the three parts of one projection
    qkv = torch.randn(batch, tokens, heads + 2 * groups, width).to(dtype)
    q, k, v = qkv.split((heads, groups, groups), dim=2)
    at = fused_reference.token_positions(positions, tokens).clamp_min(0)
    angle = at[..., None] * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.cat((angle, angle), dim=-1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def rings():
        if not int8:
            return {n: torch.full((batch, groups, slots, width), NAN).to(dtype) for n in ("keys", "values")}
        made = {n: torch.full((batch, groups, slots, width), 99).to(torch.int8) for n in ("keys", "values")}
        return made | {n: torch.full((batch, groups, slots), NAN) for n in ("key_scales", "value_scales")}

    mine, theirs = rings(), rings()
    found = ops.rope_cache_write(q, k, v, cos, sin, positions, **mine, impl="triton")
    eager = ops.rope_cache_write(q, k, v, cos, sin, positions, **theirs, impl="reference")
    for out, plain, x in zip(found, eager, (q, k)):
        # the angles of the model are rounded to its dtype; that error is not the kernel's
        exact = fused_reference.rotate(x.double(), cos.double(), sin.double())
        check_budget(out, plain, exact, f"rope {tokens} {width} {dtype}")
        torch.testing.assert_close(out, plain, rtol=torch.finfo(dtype).eps, atol=1e-6)
    # slot by slot, the position that is there once the newest has been written
    for b in range(batch):
        order = fused_reference.token_positions(positions, tokens)[b].tolist()
        oldest = max(0, max(order) - slots + 1)
        last = {p % slots: t for t, p in enumerate(order) if p >= oldest}
        for slot in range(slots):
            for name, states in (("keys", found[1]), ("values", v)):
                held = mine[name][b, :, slot]
                if slot not in last:
                    assert held.eq(99).all() if int8 else held.isnan().all(), "a slot of nobody was written"
                    continue
                want = states[b, last[slot]]
                if int8:
                    scale = mine[name[:-1] + "_scales"][b, :, slot]
                    assert torch.equal(scale, want.float().abs().amax(-1) / 127.0)
                    # one code may fall on the other side of a tie
                    assert (held - want.float() / scale[:, None]).abs().max() <= 0.5001
                else:
                    assert torch.equal(held, want)


def check_odd_codes():
    """Zero tokens, the smallest numbers, and what is not finite."""
    k = torch.randn(1, 5, 2, 16)
    k[0, 0] = 0
    k[0, 1, 0] *= 1e-42
    k[0, 2, 0, 3] = NAN
    k[0, 3, 1, 9] = float("inf")
    one, zero = torch.ones(1, 5, 16), torch.zeros(1, 5, 16)
    ring = {n: torch.zeros(1, 2, 8, 16, dtype=torch.int8) for n in ("keys", "values")}
    ring |= {n: torch.zeros(1, 2, 8) for n in ("key_scales", "value_scales")}
    ops.rope_cache_write(k, k, k, one, zero, torch.tensor([0]), **ring, impl="triton")
    for name in ("keys", "values"):
        back = (ring[name].float() * ring[name[:-1] + "_scales"][..., None])[0]
        assert not back[:, 0].any() and not back[0, 1].any() and bool(back[1, 1].all())
        assert not ring[name[:-1] + "_scales"][0, 0, 1], "whose reciprocal is no number counts as zero"
        assert bool(back[0, 2].isnan().all()) and not bool(back[1, 3].isfinite().all())
        assert bool(back[1, 2].isfinite().all() and back[:, 4].isfinite().all())


def poison():
    """Outputs come from torch.empty: fill it with NaN, so that an element left unwritten shows."""
    make = torch.empty

    def poisoned(*args, **kwargs):
        out = make(*args, **kwargs)
        return out.fill_(NAN) if out.is_floating_point() else out

    torch.empty = poisoned


if __name__ == "__main__":
    assert launch.interpreting()
    torch.manual_seed(0)
    poison()
    for dtype in (torch.float16, torch.float32):
        for residual in (False, True):
            check_norm(3, 70, dtype, residual=residual)
            check_norm(1, 576, dtype, residual=residual)
        check_swiglu((2, 3, 75), dtype)
        check_swiglu((1100,), dtype)
    for dtype, int8 in ((torch.float16, False), (torch.float16, True), (torch.float32, True)):
        # one token each, at the same and at other positions, and none for a row
        check_rope(torch.tensor([4, 4, 37]), 1, 6, 2, 24, 16, dtype, int8)
        check_rope(torch.tensor([-1, 15], dtype=torch.int32), 3, 4, 2, 16, 16, dtype, int8)
        # more tokens than slots; padding on the left; out of order
        check_rope(torch.tensor([2]), 11, 3, 3, 16, 5, dtype, int8)
        each = torch.tensor([[-1, -1, 0, 1, 2, 3, 4, 5], [9, 8, 30, 31, 32, 33, 26, 7]])
        check_rope(each, 8, 2, 1, 40, 7, dtype, int8)
    check_norm(2, 40, torch.float16, weight_dtype=torch.float32)
    check_norm(0, 40, torch.float16)
    check_norm(2, 5000, torch.float16, residual=True)
    tuning_decode.NORM_BLOCK = 64
    check_norm(3, 150, torch.float32, residual=True)
    check_norm(3, 150, torch.float16)
    check_odd_codes()
    print("interpreted fused kernels: all within budget")
