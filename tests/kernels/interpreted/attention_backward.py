"""Run by test_interpreted.py under TRITON_INTERPRET=1: the gradient kernels on the CPU against float64 autograd."""

import functools

import attention_forward
import torch
from attention_forward import CPU, NAN, check_owners, count_products, guarded, poison

from brise.kernels import attention_launch as launch
from brise.kernels import attention_reference as reference
from brise.kernels.attention_bounds import key_bounds
from brise.kernels.budget import check_budget
from brise.kernels.launch import interpreting
from brise.kernels.tuning_attention import AttentionConfig, AttentionConfigs

SMALL = AttentionConfigs(*(AttentionConfig(bm=16, bn=16, warps=4, stages=1),) * 3)
WIDE = AttentionConfigs(*(AttentionConfig(bm=64, bn=32, warps=4, stages=1),) * 3)


def states(batch, queries, keys, heads, kv, head_dim, dtype):
    """q, k, v, dout: as those of the forward, and dout with strides of its own as well."""
    dout = torch.randn(batch, queries, heads, head_dim + 4).to(dtype)[..., :head_dim]
    return [*attention_forward.states(batch, queries, keys, heads, kv, head_dim, dtype), guarded(dout)]


def autograd(tensors, seen, scale, dlse, dtype):
    """Gradients as torch derives them from the oracle's forward."""
    *leaves, dout = (x.to(dtype) for x in tensors)
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out, lse = reference.attention(*leaves, seen, scale)
    loss = (out * dout).sum()
    if dlse is not None:
        loss = loss + (lse * dlse).nan_to_num(0, 0, 0).sum()
    return torch.autograd.grad(loss, leaves)


def check(tensors, what, window=None, causal=True, config=SMALL, dlse=None, both=False, **packing):
    """Both kernels against float64: without bounds where window and causality say all, else, or as well, with them."""
    q, k, v, dout = tensors
    queries, keys = q.shape[1], k.shape[1]
    lists = {n: x.tolist() if isinstance(x, torch.Tensor) else x for n, x in packing.items()}
    seen = reference.visible(q.shape[0], queries, keys, window=window, causal=causal, **lists)
    scale = q.shape[-1] ** -0.5
    exact = autograd(tensors, seen, scale, None if dlse is None else dlse.double(), torch.float64)
    eager = autograd(tensors, seen, scale, dlse, q.dtype)
    ways = [] if packing else [(None, window or 0, causal, keys - queries)]
    if both or packing:
        bounds = key_bounds(queries, keys, device=CPU, window=window, causal=causal, **packing)
        ways.append((bounds.contiguous(), 0, False, 0))
    for way in ways:
        out, lse = launch.forward(q, k, v, *way, scale, config.forward)
        got = launch.backward(dout, dlse, q, k, v, out, lse, *way, scale, config)
        for name, one, plain, right in zip(("dq", "dk", "dv"), got, eager, exact):
            kind = "analytic" if way[0] is None else "bounds"
            check_budget(one, plain, right, f"{name}, {what}, {kind}")
        assert not got[0][~seen.any(2)].any(), f"{what}: a query without a key takes no gradient"
        assert not got[1][~seen.any(1)].any(), f"{what}: nor does a key that no query sees"


def check_shapes():
    cases = ((64, 4, 1, "float16"), (96, 3, 1, "float16"), (96, 4, 4, "float32"), (128, 4, 1, "float32"))
    for head_dim, heads, kv, dtype in (*cases, (256, 5, 1, "float16")):
        tensors = states(1, 33, 33, heads, kv, head_dim, getattr(torch, dtype))
        check(tensors, f"head_dim {head_dim}, {heads} heads over {kv}, {dtype}", 9, config=WIDE)
    check(states(1, 21, 32, 1, 1, 96, torch.float16), "every block of keys seen whole", causal=False)
    for window in (2, 16, 17, 31, 36, None):
        check(states(1, 37, 37, 1, 1, 16, torch.float32), f"window {window}", window, both=window == 17)
    check(states(1, 37, 37, 1, 1, 16, torch.float32), "not causal", causal=False)
    check(states(2, 19, 50, 2, 2, 16, torch.float16), "more keys than queries", 20)
    check(states(1, 50, 19, 6, 3, 16, torch.float32), "fewer keys than queries", 20, config=WIDE)
    check(states(1, 3, 3, 2, 1, 16, torch.float16), "three tokens", 2)
    unlike = AttentionConfigs(*(AttentionConfig(m, n, 4, 1) for m, n in ((32, 16), (16, 64), (32, 16))))
    check(states(1, 61, 61, 2, 1, 16, torch.float16), "other blocks", 20, config=unlike)


def check_packing():
    starts, lengths = torch.tensor([16, 3, 1]), torch.tensor([9, 30, 0])
    tensors = states(3, 35, 35, 1, 1, 16, torch.float16)
    check(tensors, "padding on both sides", 20, starts=starts, lengths=lengths)
    check(tensors, "left padding, no window", starts=starts)
    ends = torch.tensor([0, 1, 1, 14, 14, 47, 53, 53])
    for window in (None, 5):
        check(states(1, 53, 53, 1, 1, 16, torch.float32), f"packed, {window}", window, cu_seqlens=ends)


def check_lse():
    """The gradient of the log of the denominator, as whoever joins two parts of the keys takes it."""
    tensors = states(2, 20, 20, 2, 1, 16, torch.float32)
    check(tensors, "lse", 6, dlse=torch.randn(2, 20, 2))


def check_long_sums():
    """Many blocks of one sum: what is kept in half precision between them loses bits. And large scores."""
    steps = AttentionConfigs(*(AttentionConfig(m, n, 4, 1) for m, n in ((64, 64), (64, 16), (16, 64))))
    check(states(1, 400, 16, 4, 1, 16, torch.float16), "many queries of a key", causal=False, config=steps)
    check(states(1, 2, 1600, 2, 1, 16, torch.float16), "many keys of a query", config=steps)
    q, k, v, dout = states(1, 20, 70, 2, 1, 16, torch.float32)
    q *= 60
    check((q, k, v, dout), "large scores", 40, both=True)


def check_few_keys():
    """Where a row sees few keys the weights of one make up for the other's, and nothing averages out."""
    for seed, length in ((2, 3), (7, 3), (11, 3), (2, 7), (6, 7), (6, 16)):
        torch.manual_seed(seed)
        check(
            states(1, length, length, 1, 1, 16, torch.float32),
            f"{length} tokens, seed {seed}",
            length // 2 + 1,
        )


def check_means():
    """Keys and values with a mean, as trained models have them: the rounding of ``out`` must not count ten times."""
    for window, spread, both in ((None, 0, True), (20, 4, True), (None, 4, False)):
        q, k, v, dout = states(1, 160, 160, 2, 1, 32, torch.float16)
        for x in (k, v):
            x += 2 + spread * torch.randn(32)
        check((q, k, v, dout), f"means, {window}", window, both=both, config=WIDE)
    q, k, v, dout = states(1, 160, 160, 2, 1, 32, torch.float16)
    k += torch.linspace(-9, 9, 160)[:, None, None]  # the middle ones stand for all
    v += 4
    check((q * 0.01, k, v, dout), "means that drift", causal=False, config=WIDE)
    dlse = torch.randn(1, 160, 2)
    check((q, k, v, dout), "means and lse", 20, dlse=dlse, config=WIDE)
    starts, lengths = torch.tensor([110]), torch.tensor([40])
    check((q, k, v, dout), "means and padding", 20, starts=starts, lengths=lengths, dlse=dlse, config=WIDE)


def check_untouched():
    """Queries that see no key of a block are not read for its gradient, nor keys that no row of a tile sees."""
    window, length = 10, 64
    q, k, v, dout = states(1, length, length, 1, 1, 16, torch.float32)
    bounds = key_bounds(length, length, device=CPU, window=window, causal=True)
    for way, tiles in (((None, window, True, 0, 0.25), (0, 16, 48)), ((bounds, 0, False, 0, 0.25), (16,))):
        out, lse = launch.forward(q, k, v, *way, SMALL.forward)
        dq, dk, dv = launch.backward(dout, None, q, k, v, out, lse, *way, SMALL)
        for first in tiles:
            here = slice(first, first + 16)
            keys = torch.zeros(1, length, 1, 16)
            keys[:, : max(first - window + 1, 0)] = NAN
            keys[:, first + 16 :] = NAN
            some, _, _ = launch.backward(dout, None, q, k + keys, v + keys, out, lse, *way, SMALL)
            assert torch.equal(some[:, here], dq[:, here]), first
            # of queries whole blocks are read: from the block's own to that of the last one that sees its last key
            rows = torch.zeros(1, length, 1, 16)
            rows[:, :first] = NAN
            rows[:, (first + 15 + window - 1) // 16 * 16 + 16 :] = NAN
            _, *some = launch.backward(dout + rows, None, q + rows, k, v, out, lse, *way, SMALL)
            for one, whole in zip(some, (dk, dv)):
                assert torch.equal(one[:, here], whole[:, here]), first


def check_cost():
    """Three products for dq and four for dk and dv where a query of the block sees a key, none for other blocks.
    (Of fp32 a fourth for dq, the mean key.)"""
    for queries, keys, window, offset in ((80, 80, 17, 0), (80, 80, 40, 0), (42, 90, 17, 0)):
        q, k, v, dout = states(1, queries, keys, 1, 1, 16, torch.float16)
        seen = reference.visible(1, queries, keys, window=window, causal=True, offset=offset)
        seen = torch.nn.functional.pad(seen, (0, -keys % 16, 0, -queries % 16))
        pairs = seen.unflatten(2, (-1, 16)).unflatten(1, (-1, 16)).any(4).any(2).sum()
        bounds = key_bounds(queries, keys, device=CPU, window=window, causal=True, offset=offset)
        for way in ((None, window, True, offset, 0.25), (bounds, 0, False, 0, 0.25)):
            saved = launch.forward(q, k, v, *way, SMALL.forward)
            run = functools.partial(launch.backward, dout, None, q, k, v, *saved, *way, SMALL)
            made = count_products(run)
            assert made == 7 * pairs, f"{made} products for {pairs} pairs of blocks"
            assert check_owners(run) == queries * 17 + keys * 32, "dq and what it leaves to dk, dk, dv"


if __name__ == "__main__":
    assert interpreting()
    torch.manual_seed(0)
    poison()
    check_shapes()
    check_packing()
    check_lse()
    check_long_sums()
    check_few_keys()
    check_means()
    check_untouched()
    check_cost()
    print("interpreted attention backward: all within budget")
