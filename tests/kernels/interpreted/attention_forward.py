"""Run by test_interpreted.py under TRITON_INTERPRET=1: the forward kernel on the CPU against float64."""

import ctypes
import functools
import mmap
import tempfile

import torch
from triton.runtime.interpreter import interpreter_builder

from brise.kernels import attention_launch as launch
from brise.kernels import attention_reference as reference
from brise.kernels import tuning_attention as tuning
from brise.kernels.attention_bounds import key_bounds
from brise.kernels.budget import check_budget
from brise.kernels.launch import interpreting
from brise.kernels.tuning_attention import AttentionConfig

SMALL = AttentionConfig(bm=16, bn=16, warps=4, stages=1)
WIDE = AttentionConfig(bm=64, bn=16, warps=4, stages=1)
CPU = torch.device("cpu")
NAN = float("nan")


def guarded(x):
    """A copy of x with its strides: NaN between its elements, and behind the last one memory whose touch kills."""
    span = sum((n - 1) * step for n, step in zip(x.shape, x.stride())) + 1 if x.numel() else 0
    size = -(-max(span, 1) * x.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(memory, dtype=x.dtype, count=size // x.element_size())
    flat.fill_(NAN if x.is_floating_point() else 127)
    out = flat.as_strided(x.shape, x.stride(), flat.numel() - span)
    return out.copy_(x)


def states(batch, queries, keys, heads, kv, head_dim, dtype):
    """q, k, v [B, S, H, D], no two of them with the same strides; q and v as transformers hands them on, views of
    [B, H, S, D]."""
    q = torch.randn(batch, heads, queries, head_dim + 1).transpose(1, 2)
    k = torch.randn(batch, keys, kv, head_dim + 2)
    v = torch.randn(batch, kv, keys, head_dim + 3).transpose(1, 2)
    return [guarded(x.to(dtype)[..., :head_dim]) for x in (q, k, v)]


def check(q, k, v, what, window=None, causal=True, config=SMALL, both=False, **packing):
    """The kernel against float64: without bounds where window and offset say all, else, or as well, with them."""
    queries, keys = q.shape[1], k.shape[1]
    lists = {n: x.tolist() if isinstance(x, torch.Tensor) else x for n, x in packing.items()}
    seen = reference.visible(q.shape[0], queries, keys, window=window, causal=causal, **lists)
    scale = q.shape[-1] ** -0.5
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), seen, scale)
    eager, _ = reference.attention(q, k, v, seen, scale)
    ways = []
    if not any(isinstance(x, torch.Tensor) for x in packing.values()):
        ways.append((None, window or 0, causal, packing.get("offset", keys - queries)))
    if both or not ways:
        bounds = key_bounds(queries, keys, device=CPU, window=window, causal=causal, **packing)
        ways.append((bounds.contiguous(), 0, False, 0))
    for way in ways:
        out, lse = launch.forward(q, k, v, *way, scale, config)
        check_budget(out, eager, exact, f"{what}, {'analytic' if way[0] is None else 'bounds'}")
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
        assert not out[~seen.any(-1)].any(), f"{what}: a query without a key gives 0"


def check_every_window():
    """Windows around the block's edge, to the key: 1, one less, one more, the whole, and beyond it."""
    q, k, v = states(1, 37, 37, 1, 1, 16, torch.float32)
    for window in (1, 15, 16, 17, 33, 36, 37, None):
        check(q, k, v, f"window {window}", window, both=window == 17)
    check(q, k, v, "not causal", causal=False)


def check_shapes():
    """Head sizes, groups (one that divides no block), dtypes, lengths that are no multiple of a block."""
    cases = ((64, 4, 1, "float16"), (96, 3, 1, "float16"), (96, 2, 2, "float32"), (128, 4, 1, "float32"))
    for head_dim, heads, kv, dtype in (*cases, (256, 5, 1, "float16")):
        q, k, v = states(1, 21, 21, heads, kv, head_dim, getattr(torch, dtype))
        check(q, k, v, f"head_dim {head_dim}, {heads} heads over {kv}, {dtype}", 9, config=WIDE)
    check(*states(1, 21, 32, 1, 1, 96, torch.float16), "every block of keys seen whole", causal=False)
    q, k, v = states(2, 19, 50, 4, 2, 16, torch.float16)
    check(q, k, v, "more keys than queries", 20)
    check(q, k, v, "more keys than queries, no window", config=WIDE)
    q, k, v = q[:1], k[:1], v[:1]
    check(q, k, v, "an offset of its own", 7, offset=11)
    check(q, k, v, "queries before the first key", 7, offset=-5)
    check(q, k, v, "queries behind the last key", 20, offset=40)
    check(q, k, v, "queries behind the last key, no window", offset=40)
    check(q[:, :1], k, v, "one query", 20)
    check(q[:, :1], k[:, :1], v[:, :1], "one token", 3)
    check(
        q.contiguous(), k.expand(1, -1, -1, -1), v[:, :, :1].expand(-1, -1, 2, -1), "strides", 12, config=WIDE
    )


def check_padding():
    q, k, v = states(3, 35, 35, 1, 1, 16, torch.float16)
    starts, lengths = torch.tensor([0, 17, 35]), torch.tensor([35, 9, 0])
    check(q, k, v, "left padding", 8, starts=starts)
    check(q, k, v, "right padding", None, lengths=lengths)
    both = {"starts": torch.tensor([3, 16, 1]), "lengths": torch.tensor([30, 9, 0])}
    check(q, k, v, "padding on both sides", 20, **both)
    check(q, k, v, "not causal, padded", causal=False, **both)
    check(q[:, :5], k, v, "offsets", 6, offset=torch.tensor([0, 30, 12]))


def check_packed():
    """Sequences of 1, none, some and many tokens; one ends in the middle of a block."""
    q, k, v = states(1, 53, 53, 1, 1, 16, torch.float32)
    ends = torch.tensor([0, 1, 1, 14, 14, 47, 53, 53])
    for window in (None, 5, 16):
        check(q, k, v, f"packed, window {window}", window, cu_seqlens=ends)
    more = torch.tensor([0, 3, 9, 30, 30, 70, 79, 80])
    q, k, v = states(1, 53, 80, 1, 1, 16, torch.float32)
    check(q, k, v, "packed, continued", 12, cu_seqlens=ends, cu_seqlens_k=more)


def check_empty():
    for shape in ((0, 4, 4), (2, 0, 4), (2, 0, 0), (2, 4, 0)):
        q, k, v = states(*shape, 2, 1, 16, torch.float32)
        check(q, k, v, f"batch, queries, keys {shape}", 2)


def check_large_scores():
    """Scores of some hundreds, of either sign: e to their power is no float, so what is taken off them counts."""
    q, k, v = states(1, 20, 70, 2, 1, 16, torch.float32)
    q *= 60
    check(q, k, v, "large scores", 40, both=True)
    k.copy_(-q[:, :1, :1].sign() * 5)
    check(q[:, :1, :1], k, v, "large negative scores")


def check_long_sums():
    """Many blocks of one row, values of one sign: a sum that is kept in half precision between them loses bits."""
    q, k, v = states(1, 2, 1600, 2, 1, 16, torch.float16)
    v += 2
    check(q, k, v, "a long row", both=True)


def check_untouched():
    """Keys outside what a tile of queries sees are not read: a NaN there would spread, as 0 * NaN is NaN.

    A tile is 16 positions here and a block 16 keys; the poison is moved up to the very key before the window.
    """
    window, length = 10, 64
    q, k, v = states(1, length, length, 1, 1, 16, torch.float32)
    bounds = key_bounds(length, length, device=CPU, window=window, causal=True)
    for way in ((None, window, True, 0, 0.25, SMALL), (bounds, 0, False, 0, 0.25, SMALL)):
        want, _ = launch.forward(q, k, v, *way)
        for first in (0, 16, 32):
            poisoned = k.clone(), v.clone()
            for x in poisoned:
                x[:, : max(first - window + 1, 0)] = NAN
                x[:, first + 16 :] = NAN
            out, _ = launch.forward(q, *poisoned, *way)
            assert torch.equal(out[:, first : first + 16], want[:, first : first + 16]), first


def count_products(run):
    """How many tile products a launch makes."""
    made, make = [], interpreter_builder.create_dot

    def counted(*arguments):
        made.append(arguments)
        return make(*arguments)

    interpreter_builder.create_dot = counted
    run()
    interpreter_builder.create_dot = make
    return len(made)


def check_owners(run):
    """No two programs write to one place, nor do two that take one counter differ in the first number of theirs: here
    they run one after the other, so that a collision would go unseen."""
    writer, counter = {}, {}
    store, add = interpreter_builder.create_masked_store, interpreter_builder.create_atomic_rmw

    def stored(ptrs, value, mask, *how):
        program = interpreter_builder.grid_idx
        for place in ptrs.data[mask.data].tolist():
            if place not in counter:
                assert writer.setdefault(place, program) == program, f"{writer[place]} and {program}"
        return store(ptrs, value, mask, *how)

    def added(op, ptr, value, mask, *how):
        first = interpreter_builder.grid_idx[0]
        for place in ptr.data[mask.data].tolist():
            assert counter.setdefault(place, first) == first, (
                f"programs {counter[place]} and {first} count together"
            )
        return add(op, ptr, value, mask, *how)

    interpreter_builder.create_masked_store, interpreter_builder.create_atomic_rmw = stored, added
    run()
    interpreter_builder.create_masked_store, interpreter_builder.create_atomic_rmw = store, add
    return len(writer)


def check_cost():
    """Two products for each pair of blocks in which some query sees some key, and none for any other pair."""
    packings = (
        (96, 96, 17, 1, {}),
        (48, 96, 40, 1, {}),
        (96, 96, None, 1, {}),
        (20, 90, 30, 1, {"offset": 27}),
    )
    for queries, keys, window, heads, packing in (*packings, (60, 116, 9, 3, {})):
        q, k, v = states(1, queries, keys, heads, 1, 16, torch.float32)
        bounds = key_bounds(queries, keys, device=CPU, window=window, causal=True, **packing)
        holed, empty = bounds.clone(), torch.full_like(bounds, 5)
        # a query that sees nothing, wherever its interval lies, costs nothing
        holed[:, :, 1::3], holed[:, :, 2::3] = 0, keys
        offset = packing.get("offset", keys - queries)
        for given in (None, bounds, holed, empty):
            way = (given, 0, False, 0) if given is not None else (None, window or 0, True, offset)
            seen = reference.visible_in(bounds if given is None else given, keys)
            tile = 16 // heads
            seen = torch.nn.functional.pad(seen, (0, -keys % 16, 0, -queries % tile))
            pairs = seen.unflatten(2, (-1, 16)).unflatten(1, (-1, tile)).any(4).any(2).sum()
            run = functools.partial(launch.forward, q, k, v, *way, 0.25, SMALL)
            made = count_products(run)
            assert made == 2 * pairs, f"{made} products for {pairs} pairs of blocks"
            assert check_owners(run) == queries * heads * 17, "an output or a logarithm of a row"


def check_groups():
    """Heads that run side by side: 2 of 5 at a time, the last one alone."""
    before, tuning.SHARED_KEYS_BYTES = tuning.SHARED_KEYS_BYTES, 2 * 2 * 20 * 16 * 4
    q, k, v = states(5, 20, 20, 1, 1, 16, torch.float32)
    assert tuning.heads_per_group(5, 20, 16, 4) == 2
    check(q, k, v, "groups of heads")
    tuning.SHARED_KEYS_BYTES = before


def check_far(folder):
    """Keys, values and batches that lie more than 2^31 elements apart, in a file of holes."""
    step, keys = 1 << 22, 600
    file = torch.from_file(f"{folder}/far", shared=True, size=step * keys + 32, dtype=torch.float16)
    k, v = (file[i * 16 :].as_strided((1, keys, 1, 16), (0, step, 0, 1)) for i in (0, 1))
    k[:, -20:], v[:, -20:] = torch.randn(2, 1, 20, 1, 16)
    q = torch.randn(1, 2, 1, 16).half()
    check(q, k, v, "far keys", 18)
    k, v = (file[i * 16 :].as_strided((2, 1, 1, 16), (1 << 31, 0, 0, 1)) for i in (0, 1))
    k[:], v[:] = torch.randn(2, 2, 1, 1, 16)
    check(torch.randn(2, 1, 1, 16).half(), k, v, "far batches", 18)


def poison():
    """Outputs come from torch.empty: fill it with NaN, so that an element left unwritten shows."""
    make = torch.empty

    def poisoned(*args, **kwargs):
        out = make(*args, **kwargs)
        return guarded(out.fill_(NAN)) if out.is_floating_point() else out

    torch.empty = poisoned


if __name__ == "__main__":
    assert interpreting()
    torch.manual_seed(0)
    poison()
    check_every_window()
    check_shapes()
    check_padding()
    check_packed()
    check_empty()
    check_large_scores()
    check_long_sums()
    check_untouched()
    check_cost()
    check_groups()
    with tempfile.TemporaryDirectory() as folder:
        check_far(folder)
    print("interpreted attention forward: all within budget")
