"""The fused ops on the CPU: transformers' own modules, gradients by autograd, and rings filled position by position."""

import pytest
import torch
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralMLP,
    MistralRMSNorm,
    MistralRotaryEmbedding,
    apply_rotary_pos_emb,
)

from brise.kernels import ops

IMPLS = ["auto", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def norm_module(width, dtype, eps=1e-5):
    module = MistralRMSNorm(width, eps).to(dtype)
    torch.nn.init.normal_(module.weight)
    return module


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_that_of_the_model(impl, dtype):
    torch.manual_seed(0)
    for weight_dtype in {dtype, torch.float32}:
        module = norm_module(70, weight_dtype)
        x, residual = (torch.randn(2, 3, 140) * 3).to(dtype)[..., ::2], torch.randn(2, 3, 70).to(dtype)
        out, same = ops.rms_norm(x, module.weight, 1e-5, impl=impl)
        assert same is x and torch.equal(out, module(x)) and out.dtype == module(x).dtype
        out, total = ops.rms_norm(x, module.weight, 1e-5, residual, impl=impl)
        assert torch.equal(total, residual + x) and torch.equal(out, module(residual + x))
    # large numbers, whose squares only fp32 holds
    large = torch.full((1, 70), 3e4).to(dtype)
    assert torch.equal(ops.rms_norm(large, module.weight, 1e-5)[0], module(large))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_is_that_of_the_model(impl, dtype):
    torch.manual_seed(1)
    mlp = MistralMLP(MistralConfig(hidden_size=24, intermediate_size=40)).to(dtype)
    x = (torch.randn(2, 3, 24) * 5).to(dtype)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    assert torch.equal(ops.swiglu(gate, up, impl=impl), mlp.act_fn(gate) * up)
    assert torch.equal(mlp.down_proj(ops.swiglu(gate, up, impl=impl)), mlp(x))
    # side by side: torch rounds exp another way where rows are not contiguous
    both = torch.cat((gate, up), dim=-1)
    assert torch.equal(ops.swiglu(both, impl=impl), mlp.act_fn(both[..., :40]) * both[..., 40:])


def test_gradients():
    torch.manual_seed(2)
    x, residual = (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for impl in IMPLS:
        assert torch.autograd.gradcheck(
            lambda x, w, impl=impl: ops.rms_norm(x, w, 1e-3, impl=impl)[0], (x, weight)
        )
        assert torch.autograd.gradcheck(
            lambda x, w, r, impl=impl: ops.rms_norm(x, w, 1e-3, r, impl=impl), (x, weight, residual)
        )
        assert torch.autograd.gradcheck(lambda x, impl=impl: ops.swiglu(x, impl=impl), (x,))
    for dtype in DTYPES:
        module = norm_module(70, dtype)
        leaves = [torch.randn(4, 70).to(dtype).requires_grad_() for _ in range(3)]
        a, b, c = leaves
        out, total = ops.rms_norm(a, module.weight, 1e-5, b)
        (ops.swiglu(out, c).sum() + (total * c).sum()).backward()
        mine = [t.grad for t in (*leaves, module.weight)]
        exact = [t.detach().double().requires_grad_() for t in (*leaves, module.weight)]
        h = exact[0] + exact[1]
        normed = exact[3] * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        ((torch.nn.functional.silu(normed) * exact[2]).sum() + (h * exact[2]).sum()).backward()
        for t in (*leaves, module.weight):
            t.grad = None
        h = b + a
        ((torch.nn.functional.silu(module(h)) * c).sum() + (h * c).sum()).backward()
        for got, true, eager in zip(mine, exact, (*leaves, module.weight)):
            assert got.dtype == dtype
            error, allowed = ((g.double() - true.grad).norm() for g in (got, eager.grad))
            assert error <= 2 * allowed + torch.finfo(dtype).eps * true.grad.norm()


def rotary(width, dtype, position_ids):
    config = MistralConfig(hidden_size=width, num_attention_heads=1, head_dim=width)
    return MistralRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), position_ids)


def rings(batch, groups, slots, width, dtype, int8):
    if int8:
        codes = {
            name: torch.full((batch, groups, slots, width), 99, dtype=torch.int8)
            for name in ("keys", "values")
        }
        return codes | {
            name: torch.full((batch, groups, slots), 9.0) for name in ("key_scales", "value_scales")
        }
    return {name: torch.full((batch, groups, slots, width), 99.0).to(dtype) for name in ("keys", "values")}


# (positions, tokens): the same or other places in the rows, a row left out, more tokens than slots, padding, no order
PLACES = [
    ([4, 4, 4], 1),
    ([4, 11, 0], 1),
    ([6, 6, 6], 3),
    ([-1, 13, 30], 3),
    ([3, 3, 3], 19),
    ([2, 5, -7], 16),
    ([-1, -1, -1], 2),
    ([[-1, -1, 0, 1, 2], [14, 15, 8, 7, 6], [-1, -1, -1, -1, -1]], 5),
    ([[6], [6], [6]], 1),
]


@pytest.mark.parametrize("positions,tokens", PLACES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_rope_and_the_ring(impl, positions, tokens):
    """The rotation to the bit that of transformers; the ring what a loop over the tokens leaves."""
    torch.manual_seed(3)
    heads, groups, width, slots = 4, 2, 12, 7
    for dtype, kind in (
        (torch.float32, torch.int64),
        (torch.bfloat16, torch.int32),
        (torch.float16, torch.int64),
    ):
        for int8 in (False, True):
            at = torch.tensor(positions, dtype=kind)
            each = (
                at
                if at.ndim == 2
                else torch.where(at < 0, -1, at)[:, None] + torch.arange(tokens) * (at >= 0)[:, None]
            )
            qkv = torch.randn(3, tokens, (heads + 2 * groups) * width).to(dtype)
            q, k, v = (
                part.unflatten(-1, (-1, width))
                for part in qkv.split((heads * width, groups * width, groups * width), dim=-1)
            )
            cos, sin = rotary(width, dtype, each.clamp_min(0))
            ring = rings(3, groups, slots, width, dtype, int8)
            addresses = [t.data_ptr() for t in ring.values()]
            out = ops.rope_cache_write(q, k, v, cos, sin, at, **ring, impl=impl)
            want = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
            assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(out, want))
            assert addresses == [t.data_ptr() for t in ring.values()]
            # the ring in float64, with codes before they are rounded
            other = {name: t.double() for name, t in rings(3, groups, slots, width, dtype, int8).items()}
            for b in range(3):
                oldest = max(0, int(each[b].max()) - slots + 1)
                for t, p in enumerate(each[b].tolist()):
                    for name, x in (("key", want[1][b, t].double()), ("value", v[b, t].double())):
                        if p >= oldest and int8:
                            absmax = x.abs().amax(-1)
                            other[name + "_scales"][b, :, p % slots] = (absmax.float() / 127).double()
                            x = x * 127 / absmax[:, None]
                        if p >= oldest:
                            other[name + "s"][b, :, p % slots] = x
            for name, t in ring.items():
                # a quotient that is a tie may go either way
                assert (t.double() - other[name]).abs().max() <= 0.50001 * (t.dtype == torch.int8), name


def test_one_row_of_angles_serves_all():
    q, k, v = torch.randn(3, 2, 4, 12), torch.randn(3, 2, 2, 12), torch.randn(3, 2, 2, 12)
    cos, sin = rotary(12, torch.float32, torch.tensor([[5, 6]]))
    at = torch.tensor([5, 5, 5])
    a, b = rings(3, 2, 7, 12, torch.float32, False), rings(3, 2, 7, 12, torch.float32, False)
    one = ops.rope_cache_write(q, k, v, cos, sin, at, **a)
    all_rows = ops.rope_cache_write(q, k, v, cos.expand(3, -1, -1), sin.expand(3, -1, -1), at, **b)
    assert all(torch.equal(x, y) for x, y in zip((*one, a["keys"]), (*all_rows, b["keys"])))


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite_stays_so_in_codes(impl):
    k = torch.randn(1, 4, 2, 16)
    k[0, 0] = 0
    k[0, 1, 0] *= 1e-42
    k[0, 2, 0, 3] = float("nan")
    k[0, 3, 1, 9] = float("inf")
    ring = rings(1, 2, 6, 16, torch.float32, True)
    ops.rope_cache_write(
        k, k, k, torch.ones(1, 4, 16), torch.zeros(1, 4, 16), torch.tensor([0]), **ring, impl=impl
    )
    back = (ring["values"].float() * ring["value_scales"][..., None])[0]
    assert not back[:, 0].any() and not back[0, 1].any() and bool(back[1, 1:3].isfinite().all())
    assert bool(back[0, 2].isnan().all()) and not bool(back[1, 3].isfinite().all())


def test_opcheck():
    x, w, r = torch.randn(2, 6, requires_grad=True), torch.randn(6, requires_grad=True), torch.randn(2, 6)
    brise = torch.ops.brise
    torch.library.opcheck(brise.rms_norm.default, (x, w, 1e-5, "auto"))
    torch.library.opcheck(brise.add_rms_norm.default, (x, r.requires_grad_(), w, 1e-5, "auto"))
    torch.library.opcheck(brise.swiglu.default, (x, r, "auto"))
    # without scales: test_compiles_into_one_graph
    ring = rings(2, 2, 7, 12, torch.float32, True)
    states = [torch.randn(2, 1, heads, 12) for heads in (4, 2, 2)]
    angles = [torch.randn(1, 1, 12) for _ in range(2)]
    torch.library.opcheck(
        brise.rope_cache_write.default, (*states, *angles, torch.tensor([3, 9]), *ring.values(), "auto")
    )


def test_compiles_into_one_graph():
    """The write is not lost, and what reads the ring afterwards sees it."""
    torch.manual_seed(4)
    w = torch.randn(12)

    def step(q, k, v, cos, sin, at, keys, values):
        q, k = ops.rope_cache_write(q, k, v, cos, sin, at, keys, values)
        out = ops.decode_attention(q[:, 0], keys, values, at + 1)
        return ops.swiglu(*(ops.rms_norm(out, w, 1e-5, out)))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    mine, theirs = rings(2, 2, 7, 12, torch.float32, False), rings(2, 2, 7, 12, torch.float32, False)
    for p in range(3):
        at = torch.tensor([p, p])
        states = [torch.randn(2, 1, n, 12) for n in (4, 2, 2)]
        angles = rotary(12, torch.float32, at[:, None])
        out = [f(*states, *angles, at, *ring.values()) for f, ring in ((compiled, mine), (step, theirs))]
        torch.testing.assert_close(*out)
        assert torch.equal(mine["keys"], theirs["keys"]) and not (mine["keys"][:, :, p] == 99).any()


def test_empty_input():
    assert ops.rms_norm(torch.zeros(0, 6), torch.ones(6), 1e-5)[0].shape == (0, 6)
    assert ops.swiglu(torch.zeros(2, 0, 6)).shape == (2, 0, 3)
    for shape in ((0, 3), (2, 0)):
        ring = rings(shape[0], 2, 7, 12, torch.float32, False)
        states = [torch.zeros(*shape, n, 12) for n in (4, 2, 2)]
        angles = torch.zeros(1, shape[1], 12)
        q, k = ops.rope_cache_write(*states, angles, angles, torch.zeros(shape[0], dtype=torch.int64), **ring)
        assert q.shape == (*shape, 4, 12) and k.shape == (*shape, 2, 12)


def refuse(match, function, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=match):
        function(*arguments, **options)


def test_bad_input_is_refused_with_its_values():
    x, w = torch.randn(2, 6), torch.ones(6)
    refuse(r"weight must be .*\[6\], got torch.float32 \[7\]", ops.rms_norm, x, torch.ones(7), 1e-5)
    refuse(r"residual must be like x.*\[2, 6\], got .*\[6\]", ops.rms_norm, x, w, 1e-5, x[0])
    refuse("got torch.float16", ops.rms_norm, x, w, 1e-5, x.half())
    refuse("floating point.*int64", ops.rms_norm, x.long(), w, 1e-5, error=TypeError)
    for eps in (-1e-5, float("nan"), float("inf")):
        refuse(f"eps must be finite and at least 0, got {eps}", ops.rms_norm, x, w, eps)
    refuse("x is on cpu, weight on meta", ops.rms_norm, x, w.to("meta"), 1e-5)
    refuse("impl must be", ops.rms_norm, x, w, 1e-5, impl="fast")
    refuse("needs a GPU tensor", ops.rms_norm, x, w, 1e-5, impl="triton")
    refuse(r"\[..., 2I\], got \[2, 5\]", ops.swiglu, x[:, :5])
    refuse(r"up must be like gate.*got torch.float32 \[2, 5\]", ops.swiglu, x, x[:, :5])
    good = {name: torch.randn(2, 3, n, 12) for name, n in (("q", 4), ("k", 2), ("v", 2))}
    good |= {"cos": torch.ones(2, 3, 12), "sin": torch.ones(2, 3, 12), "positions": torch.tensor([1, 2])}
    good |= rings(2, 2, 7, 12, torch.float32, False)

    def rope(match, error=ValueError, **changes):
        refuse(match, ops.rope_cache_write, error=error, **good | changes)

    rope(r"k, v \[B, T, KV, D\], got .*\[2, 3, 1, 12\]", v=torch.randn(2, 3, 1, 12))
    rope("even D", **{n: torch.randn(2, 3, 2, 7) for n in "qkv"})
    rope("k must be of q's dtype torch.float32, got torch.float16", TypeError, k=good["k"].half())
    rope("cos must be of q's dtype", TypeError, cos=good["cos"].half())
    rope(r"sin must be \[2 or 1, 3, 12\], got \[2, 3, 6\]", sin=torch.ones(2, 3, 6))
    rope("cos and sin must be alike", sin=torch.ones(1, 3, 12))
    rope(r"positions must be \[2\], got \[3\]", positions=torch.tensor([1, 2, 3]))
    rope(r"positions must be \[2, 3\], got \[2, 4\]", positions=torch.zeros(2, 4, dtype=torch.int64))
    rope("got torch.float32", TypeError, positions=torch.ones(2))
    rope(r"k has 2 heads, the ring 1", **rings(2, 1, 7, 12, torch.float32, False))
    rope(r"ring must be \[2, KV, W, 12\], got \[3, 2, 7, 12\]", **rings(3, 2, 7, 12, torch.float32, False))
    rope("int8 keys need their scales", keys=torch.zeros(2, 2, 7, 12, dtype=torch.int8))
    rope("q is on cpu, v on meta", v=good["v"].to("meta"))
    rope("impl must be", impl="fast")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_the_kernels_at_full_size(dtype, int8):
    torch.manual_seed(5)
    module = norm_module(4096, dtype)
    x, r, up = (torch.randn(5, 4096).to(dtype) for _ in range(3))
    normed, total = ops.rms_norm(x.cuda(), module.weight.cuda(), 1e-5, r.cuda())
    assert torch.equal(total.cpu(), x + r)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(normed.cpu(), module(x + r), rtol=2 * eps, atol=eps)
    torch.testing.assert_close(
        ops.swiglu(x.cuda(), up.cuda()).cpu(), ops.swiglu(x, up), rtol=2 * eps, atol=eps
    )
    at = torch.tensor([7, 5000])
    q, k, v = (torch.randn(2, 3, n, 128).to(dtype) for n in (32, 8, 8))
    cos, sin = rotary(128, dtype, at[:, None] + torch.arange(3))
    ring = rings(2, 8, 4096, 128, dtype, int8)
    device = {name: t.cuda() for name, t in ring.items()}
    out = ops.rope_cache_write(*(t.cuda() for t in (q, k, v, cos, sin, at)), **device)
    want = ops.rope_cache_write(q, k, v, cos, sin, at, **ring)
    for a, b in zip(out, want):
        torch.testing.assert_close(a.cpu(), b, rtol=2 * eps, atol=eps)
    for name, t in device.items():
        atol = 1 if t.dtype == torch.int8 else eps
        torch.testing.assert_close(t.cpu().float(), ring[name].float(), rtol=2 * eps, atol=atol)
