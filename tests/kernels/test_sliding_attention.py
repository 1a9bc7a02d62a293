"""Sliding-window attention without a GPU: torch's own attention as the oracle, gradients, and what is refused."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from brise.kernels import attention_blocks, attention_ops, attention_reference
from brise.kernels.attention_bounds import key_bounds, query_ranges
from brise.kernels.attention_ops import sliding_attention
from brise.kernels.budget import check_budget

IMPLS = ("auto", "reference")
ENDS = torch.tensor([0, 1, 1, 14, 14, 30, 31])
# keyword arguments for a batch of 3 with 31 keys, or of 1 where sequences are packed
PACKINGS = {
    "plain": {},
    "left": {"starts": torch.tensor([0, 5, 31])},
    "right": {"lengths": torch.tensor([31, 4, 0], dtype=torch.int32)},
    "both": {"starts": torch.tensor([2, 5, 0]), "lengths": torch.tensor([20, 26, 31])},
    "offsets": {"offset": torch.tensor([0, 14, 7])},
    "offset": {"offset": 3},
    "packed": {"cu_seqlens": ENDS},
    "continued": {
        "cu_seqlens": torch.tensor([0, 0, 2, 9, 17]),
        "cu_seqlens_k": torch.tensor([0, 3, 9, 16, 31]),
    },
    # a text in the middle that nobody asks for
    "gap": {
        "cu_seqlens": torch.tensor([0, 9, 9, 17]),
        "cu_seqlens_k": torch.tensor([0, 9, 20, 31]),
    },
}


def states(batch, queries, keys, heads=4, kv=2, head_dim=8, dtype=torch.float32):
    shapes = ((batch, queries, heads), (batch, keys, kv), (batch, keys, kv))
    return [torch.randn(*shape, head_dim).to(dtype) for shape in shapes]


def case(name, dtype=torch.float32):
    """q, k, v and the arguments that say what they hold."""
    packed = name in ("packed", "continued", "gap")
    queries = {"offsets": 17, "offset": 17, "continued": 17, "gap": 17}.get(name, 31)
    return states(1 if packed else 3, queries, 31, dtype=dtype), PACKINGS[name]


def explicit(q, k, window, causal=True, **packing):
    lists = {n: x.tolist() if isinstance(x, torch.Tensor) else x for n, x in packing.items()}
    return attention_reference.visible(
        q.shape[0], q.shape[1], k.shape[1], window=window, causal=causal, **lists
    )


def by_torch(q, k, v, seen, scale=None):
    """torch's attention under a mask of every pair; 0 where a query sees nothing, which torch leaves open."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(*heads, attn_mask=seen[:, None], scale=scale, enable_gqa=True)
    return out.transpose(1, 2).masked_fill(~seen.any(-1)[..., None, None], 0.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("window", [None, 1, 6, 31, 10**9])
def test_agrees_with_torch_under_an_explicit_mask(impl, name, window, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(attention_blocks, "_SCORES", 1 << 9)  # several blocks, the last one shorter
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        (q, k, v), packing = case(name, dtype)
        seen = explicit(q, k, window, **packing)
        out = sliding_attention(q, k, v, window=window, impl=impl, scale=0.3, **packing)
        assert out.dtype == dtype and out.shape == q.shape and out.is_contiguous()
        exact = by_torch(q.double(), k.double(), v.double(), seen, 0.3)
        if dtype == torch.float64:
            torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
        else:
            eager, _ = attention_reference.attention(q, k, v, seen, 0.3)
            check_budget(out, eager, exact, f"{impl} {name} {window} {dtype}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", [0, 1])
def test_bounds_that_differ_on_one_side_alone(impl, side):
    """All queries end, or begin, with the same key."""
    q, k, v = states(1, 6, 9)
    bounds = torch.tensor([[[0] * 6, [9] * 6]], dtype=torch.int32)
    bounds[0, side] = torch.tensor([3, 0, 1, 8, 2, 5]) + side
    out = sliding_attention(q, k, v, bounds=bounds, impl=impl)
    torch.testing.assert_close(out, by_torch(q, k, v, attention_reference.visible_in(bounds, 9)))


@pytest.mark.parametrize("impl", IMPLS)
def test_without_causality_every_real_key_is_seen(impl):
    (q, k, v), packing = case("both")
    seen = explicit(q, k, None, causal=False, **packing)
    out = sliding_attention(q, k, v, causal=False, impl=impl, **packing)
    torch.testing.assert_close(out, by_torch(q, k, v, seen))


def test_the_window_counts_the_querys_own_key():
    """transformers' and mistral-inference's meaning of W: by hand, with values that name their key."""
    q, k = torch.zeros(1, 6, 1, 4), torch.zeros(1, 6, 1, 4)
    v = torch.arange(6.0)[None, :, None, None].expand(1, 6, 1, 4)
    out = sliding_attention(q, k, v, window=3)[0, :, 0, 0]
    torch.testing.assert_close(out, torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", PACKINGS)
def test_gradients_are_those_of_torch(impl, name, monkeypatch):
    monkeypatch.setattr(attention_blocks, "_SCORES", 1 << 9)
    torch.manual_seed(1)
    (q, k, v), packing = case(name, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    up = torch.randn_like(q)
    got = torch.autograd.grad(sliding_attention(q, k, v, window=6, impl=impl, **packing), leaves, up)
    want = torch.autograd.grad(by_torch(q, k, v, explicit(q, k, 6, **packing)), leaves, up)
    for one, right in zip(got, want):
        torch.testing.assert_close(one, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck_lse_included(impl):
    leaves = [x.requires_grad_() for x in states(1, 5, 7, 2, 1, 3, torch.float64)]

    def both(q, k, v):
        return torch.ops.brise.sliding_attention(q, k, v, None, 4, True, 2, 0.5, impl)

    assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_gradients_keep_the_budget(impl):
    torch.manual_seed(2)
    q, k, v = states(2, 40, 40, 4, 2, 16)
    seen, up = explicit(q, k, 12), torch.randn_like(q)

    def gradients(f, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(f(*leaves), leaves, up.to(dtype))

    for dtype in (torch.bfloat16, torch.float16):
        low = [x.to(dtype) for x in (q, k, v)]
        got = gradients(lambda *x: sliding_attention(*x, window=12, impl=impl), dtype)
        eager = gradients(lambda *x: attention_reference.attention(*x, seen, 0.25)[0], dtype)
        exact_leaves = [x.double().requires_grad_() for x in low]
        exact = torch.autograd.grad(by_torch(*exact_leaves, seen), exact_leaves, up.to(dtype).double())
        for one, plain, right in zip(got, eager, exact):
            check_budget(one, plain, right, f"{impl} {dtype}")


def test_gradients_of_a_key_are_summed_over_the_blocks_in_float32(monkeypatch):
    """Hundreds of blocks, values of one sign: a sum that is kept in half precision between them stands still."""
    monkeypatch.setattr(attention_blocks, "_SCORES", 1)
    torch.manual_seed(4)
    q, k, v = states(1, 2000, 3, 2, 1, 8, torch.bfloat16)
    q, up = q.abs(), torch.rand(q.shape).bfloat16()
    v = torch.tensor([2.0, 0.0, -1.0]).bfloat16()[None, :, None, None].expand(v.shape)
    results = []
    for dtype, impl in (
        (torch.bfloat16, "auto"),
        (torch.bfloat16, "reference"),
        (torch.float64, "reference"),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = sliding_attention(*leaves, causal=False, impl=impl)
        results.append(torch.autograd.grad(out, leaves[1:], up.to(dtype)))
    for got, eager, exact in zip(*results):
        check_budget(got, eager, exact)


def test_no_key_gives_zero_and_takes_no_gradient():
    q, k, v = (x.requires_grad_() for x in states(2, 9, 9))
    for impl in IMPLS:
        out = sliding_attention(q, k, v, starts=torch.tensor([4, 9]), impl=impl)
        assert not out[0, :4].any() and not out[1].any() and out[0, 4:].all()
        dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
        for grad in (dq, dk, dv):
            assert grad.isfinite().all() and not grad[0, :4].any() and not grad[1].any()


def test_whole_blocks_of_queries_that_see_nothing(monkeypatch):
    monkeypatch.setattr(attention_blocks, "_SCORES", 1)  # 8 queries a block: two of them see nothing
    q, k, v = (x.requires_grad_() for x in states(1, 31, 31))
    bounds = key_bounds(31, 31, device=q.device, window=None, causal=True, starts=torch.tensor([20]))
    out, lse = torch.ops.brise.sliding_attention(q, k, v, bounds, 0, False, 0, 0.5, "auto")
    assert not out[:, :20].any() and (lse[:, :20] == -torch.inf).all() and lse[:, 20:].isfinite().all()
    dq, *_ = torch.autograd.grad(out.sum(), (q, k, v))
    assert not dq[:, :20].any() and dq[:, 21:].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("batch,queries,keys", [(0, 3, 3), (2, 0, 3), (2, 0, 0), (2, 3, 0), (1, 1, 1)])
def test_nothing_in_nothing_out(impl, batch, queries, keys):
    q, k, v = (x.requires_grad_() for x in states(batch, queries, keys))
    out = sliding_attention(q, k, v, window=2, impl=impl)
    padded = sliding_attention(q, k, v, window=2, impl=impl, lengths=torch.full((batch,), keys))
    assert out.shape == q.shape and torch.equal(padded, out)
    torch.testing.assert_close(out, v.repeat_interleave(2, 2) if keys == 1 else torch.zeros_like(q))
    for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v)):
        assert grad.shape == x.shape and grad.isfinite().all()


def test_the_cost_grows_with_the_window(monkeypatch):
    """Pairs that are scored: at most those of the window, and a block's edges."""
    pairs = []
    scores = attention_blocks._scores

    def counted(q, k, *rest):
        pairs.append(q.shape[2] // 2 * k.shape[2])
        return scores(q, k, *rest)

    monkeypatch.setattr(attention_blocks, "_scores", counted)
    monkeypatch.setattr(attention_blocks, "_SCORES", 1 << 12)
    for length in (256, 512):
        pairs.clear()
        q, k, v = states(1, length, length, 4, 2)
        sliding_attention(q, k, v, window=32)
        assert max(pairs) * 4 <= 2 << 12, "one block of scores is all the memory there is"
        assert sum(pairs) <= length * 64


def test_keys_that_are_not_seen_are_not_read():
    q, k, v = states(1, 64, 64)
    want = sliding_attention(q, k, v, window=9)
    k[:, :20], v[:, :20] = float("nan"), float("nan")
    out = sliding_attention(q[:, 28:], k, v, window=9)
    torch.testing.assert_close(out, want[:, 28:])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["left", "both", "continued", "gap"])
def test_padding_may_hold_anything(impl, name):
    """Keys that no query of their row sees, beside rows that see all, or between packed texts: 0 * NaN would be NaN,
    backwards as well."""
    torch.manual_seed(3)
    (q, k, v), packing = case(name)
    unseen = ~explicit(q, k, 6, **packing).any(1)[..., None, None]
    assert unseen.any() and not unseen.all()
    results = []
    for hole in (0.0, float("nan")):
        leaves = [q.clone().requires_grad_()]
        leaves += [x.masked_fill(unseen, hole).requires_grad_() for x in (k, v)]
        out = sliding_attention(*leaves, window=6, impl=impl, **packing)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for sound, broken in zip(*results):
        assert torch.equal(sound, broken)


def test_strided_inputs_and_a_last_stride_that_is_not_one():
    q, k, v = states(2, 12, 12)
    want = sliding_attention(q, k, v, window=5)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(sliding_attention(*views, window=5), want)
    views = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    torch.testing.assert_close(sliding_attention(*views, window=5), want)


def test_the_kernels_are_handed_what_their_32_bit_steps_can_reach():
    def strided(step):
        return torch.empty_strided((1, 2, 1, 4), (4 * step, step, 4, 1), device="meta")

    assert attention_ops._rows(strided((1 << 23) - 4)).stride(1) == (1 << 23) - 4
    assert attention_ops._rows(strided(1 << 23)).stride(1) == 4


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_leaves_the_dtype_that_was_asked_for(impl):
    leaves = [x.requires_grad_() for x in states(2, 12, 12)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = sliding_attention(*leaves, window=5, impl=impl)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for one, plain in zip(*results):
        assert torch.equal(one, plain)


@pytest.mark.parametrize("name", PACKINGS)
def test_bounds_are_the_definition(name):
    (q, k, _), packing = case(name)
    for window in (None, 1, 6, 40):
        bounds = key_bounds(q.shape[1], 31, device=q.device, window=window, causal=True, **packing)
        assert bounds.dtype == torch.int32 and bounds.min() >= 0 and bounds.max() <= 31
        seen = attention_reference.visible_in(bounds, 31).expand(q.shape[0], -1, -1)
        assert torch.equal(seen, explicit(q, k, window, **packing))


def test_a_query_that_belongs_to_no_sequence_sees_nothing():
    ends = torch.tensor([2, 9, 9, 17])
    bounds = key_bounds(31, 31, device=ends.device, window=6, causal=True, cu_seqlens=ends)
    x = torch.empty(1, 31, 1, 1)
    assert torch.equal(attention_reference.visible_in(bounds, 31), explicit(x, x, 6, cu_seqlens=ends))


@pytest.mark.parametrize("block", [1, 4])
def test_ranges_of_queries_hold_every_query_that_sees_a_block_of_keys(block):
    generator = torch.Generator().manual_seed(0)
    lo = torch.randint(0, 30, (4, 50), generator=generator)
    bounds = torch.stack((lo, lo + torch.randint(0, 9, (4, 50), generator=generator)), 1).to(torch.int32)
    padding = {"starts": torch.tensor([0, 7, 38, 11]), "lengths": torch.tensor([21, 31, 0, 5])}
    ordered = key_bounds(50, 38, device=lo.device, window=5, causal=True, **padding)
    for b in (bounds, ordered):
        ranges = query_ranges(b, 38, 8, block)
        assert ranges.shape == (4, 5, 2)
        seen = attention_reference.visible_in(b, 40).unflatten(2, (5, 8)).any(3)
        for row in range(4):
            for keys in range(5):
                first, end = ranges[row, keys].tolist()
                queries = seen[row, :, keys].nonzero().flatten()
                assert ((queries >= block * first) & (queries < block * end)).all()
                if b is ordered:  # and no others
                    tight = (queries[0] // block, queries[-1] // block + 1) if len(queries) else (0, 0)
                    assert (first, end) == tight


def test_opcheck():
    q, k, v = (x.requires_grad_() for x in states(2, 6, 9))
    bounds = key_bounds(6, 9, device=q.device, window=4, causal=True, starts=torch.tensor([0, 3]))
    op = torch.ops.brise.sliding_attention.default
    for impl in IMPLS:
        torch.library.opcheck(op, (q, k, v, None, 4, True, 3, 0.5, impl))
        torch.library.opcheck(op, (q, k, v, bounds, 0, False, 0, 0.5, impl))


def test_compiles_into_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, k, v, starts):
        return sliding_attention(q, k, v, window=4, starts=starts).relu()

    starts = torch.tensor([0, 2])
    for length in (5, 6, 7):
        q, k, v = (x.requires_grad_() for x in states(2, length, length))
        out, want = compiled(q, k, v, starts), sliding_attention(q, k, v, window=4, starts=starts).relu()
        torch.testing.assert_close(out, want)
        got = torch.autograd.grad(out.sum(), (q, k, v))
        for one, right in zip(got, torch.autograd.grad(want.sum(), (q, k, v))):
            torch.testing.assert_close(one, right)
    with pytest.raises(RuntimeError, match=r"starts must lie in 0 .. the number of keys"):
        compiled(q, k, v, torch.tensor([0, 8]))


def test_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from brise.kernels.attention_ops import sliding_attention\n"
        "x = torch.randn(1, 5, 2, 8, requires_grad=True); sliding_attention(x, x, x, window=2).sum().backward()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
