"""Run by test_interpreted.py under TRITON_INTERPRET=1: decode attention on the CPU against float64."""

import functools
import itertools
import math

import torch
from attention_forward import check_owners, count_products, guarded, poison

from brise.kernels import decode_reference, launch, ops, tuning_decode
from brise.kernels.budget import check_budget

NAN = float("nan")


def attend(q, k, v, first, window):
    """One query [H, D] at the last of the positions k, v [KV, P, D]: plain, in the dtype of q."""
    heads, groups = q.shape[0], k.shape[0]
    out = torch.zeros_like(q)
    low = max(first, 0, k.shape[1] - window)
    for h in range(heads):
        keys, values = k[h * groups // heads, low:], v[h * groups // heads, low:]
        if keys.shape[0]:
            scores = (q[h] @ keys.T) * q.shape[-1] ** -0.5
            work = torch.float64 if q.dtype == torch.float64 else torch.float32
            out[h] = scores.to(work).softmax(-1).to(q.dtype) @ values
    return out


def quantized(x):
    """[KV, P, D] -> codes, scales [KV, P]."""
    scale = x.float().abs().amax(-1) / 127
    return (x.float() / scale[..., None]).round().to(torch.int8), scale


def case(seen, heads, groups, width, slots, dtype, window=None, start=None, int8=False, queries=1):
    """Everything random; slots that none may see hold nan (codes: 127, a scale of nan). Strides of their own."""
    batch = len(seen)
    kind, empty = (torch.int8, 127) if int8 else (dtype, NAN)
    ring = {
        "keys": torch.full((batch, groups, slots, width + 1), empty, dtype=kind)[..., :width],
        "values": torch.full((batch, slots, groups, width + 2), empty, dtype=kind)[..., :width].transpose(
            1, 2
        ),
    }
    if int8:
        ring |= {s: torch.full((batch, groups, slots), NAN) for s in ("key_scales", "value_scales")}
    ring = {name: guarded(t) for name, t in ring.items()}
    q = guarded((torch.randn(batch, heads, queries, width + 3).to(dtype) * 2)[..., :width].transpose(1, 2))
    exact, eager = torch.zeros(q.shape, dtype=torch.float64), torch.zeros_like(q)
    for b, count in enumerate(seen):
        past = {name: torch.randn(groups, count, width).to(dtype) for name in ("keys", "values")}
        past["values"] += 0.5
        true = {}
        for name, x in past.items():
            codes, scale = quantized(x) if int8 else (x, None)
            for p in range(count):
                ring[name][b, :, p % slots] = codes[:, p]
                if int8:
                    ring[name[:-1] + "_scales"][b, :, p % slots] = scale[:, p]
            true[name] = codes.double() * scale[..., None].double() if int8 else x.double()
        first = 0 if start is None else start[b]
        oldest = max(first, count - queries + 1 - (slots if window is None else window))
        for p in range(max(count - slots, 0), min(oldest, count)):
            # before the padding's end and the window anything may lie
            ring["keys"][b, :, p % slots] = ring["values"][b, :, p % slots] = empty
            for name in ("key_scales", "value_scales") if int8 else ():
                ring[name][b, :, p % slots] = NAN
        for t in range(queries):
            end = count - queries + 1 + t
            if end > 0:
                k, v = true["keys"][:, :end], true["values"][:, :end]
                # without a window the ring is the bound, counted from the newest position
                reach = slots - (queries - 1 - t) if window is None else window
                exact[b, t] = attend(q[b, t].double(), k, v, first, reach)
                eager[b, t] = attend(q[b, t], k.to(dtype), v.to(dtype), first, reach)
    positions = {"seen": torch.tensor(seen, dtype=torch.int32)}
    if start is not None:
        positions["start"] = torch.tensor(start)
    return q, ring | positions, exact, eager


def check(*args, window=None, **options):
    q, given, exact, eager = case(*args, window=window, **options)
    if q.shape[1] == 1:
        q, exact, eager = q[:, 0], exact[:, 0], eager[:, 0]
    out = ops.decode_attention(q, **given, window=window, impl="triton")
    check_budget(out, eager, exact, f"decode {args} {window} {options}")
    assert not out[exact == 0].any()
    # a row alone, in a second run, has the bits that it had in the batch
    alone = {name: t[-1:] for name, t in given.items()}
    assert torch.equal(ops.decode_attention(q[-1:], **alone, window=window, impl="triton")[0], out[-1])


def check_padding():
    """The same keys with and without 5 positions of padding before them: the same bits."""
    torch.manual_seed(3)
    q, given, _, _ = case((150,), 2, 1, 16, 200, torch.float16)
    plain = ops.decode_attention(q, **given, impl="triton")
    moved = {name: given[name].roll(5, dims=2) for name in ("keys", "values")}
    moved |= {"seen": given["seen"] + 5, "start": torch.tensor([5], dtype=torch.int32)}
    assert torch.equal(ops.decode_attention(q, **moved, impl="triton"), plain)
    windowed = [ops.decode_attention(q, **x, window=131, impl="triton") for x in (given, moved)]
    assert torch.equal(*windowed)


def check_steps():
    """Several queries at once have the bits that each has in its own step."""
    torch.manual_seed(4)
    q, given, _, _ = case((131, 7), 3, 1, 16, 200, torch.float16, queries=3)
    together = ops.decode_attention(q, **given, window=100, impl="triton")
    for t in range(3):
        step = given | {"seen": given["seen"] - 2 + t}
        assert torch.equal(ops.decode_attention(q[:, t], **step, window=100, impl="triton"), together[:, t])


def check_what_breaks_behind():
    """A key and value that are not finite reach the queries that see them, over one split and over several."""
    torch.manual_seed(5)
    for int8 in (False, True):
        for seen in ((9, 40), (131, 150)):
            q, given, _, _ = case(seen, 4, 2, 24, 160, torch.float16, int8=int8, queries=3)
            plain = ops.decode_attention(q, **given, window=150, impl="triton")
            for broken in (NAN, float("inf")):
                damaged = {name: t.clone() for name, t in given.items()}
                for name in ("key_scales", "value_scales") if int8 else ("keys", "values"):
                    damaged[name][1, :, (seen[1] - 1) % 160] = broken
                out = ops.decode_attention(q, **damaged, window=150, impl="triton")
                assert torch.equal(out[0], plain[0]) and not out[1, 2].isfinite().any()
                assert torch.allclose(out[1, :2], plain[1, :2], rtol=2e-3, atol=2e-3)


def check_counts_of_nothing():
    """A row that has seen nothing, or whose padding takes all it has: zeros."""
    ring = torch.full((4, 1, 16, 16), NAN)
    for kind in (torch.int32, torch.int64):
        seen = torch.tensor([0, -3, -(1 << 31), 9], dtype=kind)
        starts = torch.tensor([0, 5, 3, 9], dtype=kind), torch.tensor([0, 0, 0, 300], dtype=kind)
        for start in starts:
            out = ops.decode_attention(torch.ones(4, 1, 16), ring, ring, seen, start=start, impl="triton")
            assert torch.equal(out, torch.zeros_like(out))
    far = torch.tensor([-(1 << 32) + 5] * 4)
    assert not ops.decode_attention(torch.ones(4, 1, 16), ring, ring, far, impl="triton").any()
    # padding cannot lie before the first position
    q, given, _, _ = case((40,), 2, 1, 16, 64, torch.float32)
    want = ops.decode_attention(q, **given, impl="triton")
    assert torch.equal(ops.decode_attention(q, **given, start=torch.tensor([-7]), impl="triton"), want)


def check_counts_near_the_end_of_32_bits():
    """As far as int32 reaches: the sums of positions do not leave it."""
    slots, queries = 150, 3
    q, given, _, _ = case((slots,) * 2, 4, 2, 16, slots, torch.float16, queries=queries)
    seen = torch.tensor([(1 << 31) - 1, (1 << 30) + 1])
    exact = [given[name].double() for name in ("keys", "values")]
    eager = [given[name] for name in ("keys", "values")]
    for start in (None, seen - 70, seen - (1 << 30) - 5):
        for window in (None, 90):
            rest = seen, start, None, None, window, 0.25
            right = decode_reference.decode_attention(q.double(), *exact, *rest)
            plain = decode_reference.decode_attention(q, *eager, *rest)
            kind = torch.int32 if window is None else torch.int64
            given |= {"seen": seen.to(kind), "start": None if start is None else start.to(kind)}
            out = ops.decode_attention(q, **given, window=window, scale=0.25, impl="triton")
            check_budget(out, plain, right, f"positions near 2^31, {start} {window}")


def check_owners_of_parts():
    """Each program leaves its part in a place of its own, rows of unlike lengths and blocks of rows too."""
    q, given, _, _ = case((300, 150, 9, 0), 72, 2, 16, 200, torch.float16, queries=2)
    rows, chunks = 2 * 36, (4, 3, 1, 0)
    parts = sum(n for n in chunks if n > 1) * 2 * rows * (16 + 2)
    made = check_owners(lambda: ops.decode_attention(q, **given, impl="triton"))
    assert made == q.numel() + parts, f"{made} places written, outputs {q.numel()} and parts {parts}"


def check_cost():
    """Two products for each step that holds a key which some query sees, and none for steps before or behind them."""
    for count, window, queries in ((150, 20, 1), (93, 70, 3), (200, None, 1), (33, 160, 1)):
        q, given, _, _ = case((count,), 2, 1, 16, 160, torch.float32, window=window, queries=queries)
        first = max(0, count - queries + 1 - (window or 160), count - 160)
        step = tuning_decode.decode_config(16, 4, 16).bn
        assert step < tuning_decode.CHUNK
        steps = -(-count // step) - first // step
        made = count_products(
            functools.partial(ops.decode_attention, q, **given, window=window, impl="triton")
        )
        assert made == 2 * steps, f"{made} products for {steps} steps, {count} {window} {queries}"


def check_long_sums():
    """Many steps of one program: a sum that is kept in half precision between them loses bits."""
    before, tuning_decode.CHUNK = tuning_decode.CHUNK, 4096
    check((3000,), 2, 1, 16, 3000, torch.float16)
    # keys that all weigh about the same: their sum is a large number
    q, given, _, _ = case((6000,), 2, 1, 16, 6000, torch.float16)
    rest = given["seen"], None, None, None, None, 0.02
    ring = given["keys"], given["values"]
    right = decode_reference.decode_attention(q.double(), *(x.double() for x in ring), *rest)
    out = ops.decode_attention(q, **given, scale=0.02, impl="triton")
    check_budget(out, decode_reference.decode_attention(q, *ring, *rest), right, "thousands of like weights")
    tuning_decode.CHUNK = before


def check_large_scores():
    """Scores of some hundreds, of either sign: what is taken off them before e to their power counts."""
    q, given, _, _ = case((70, 150), 2, 1, 16, 160, torch.float32)
    rest = given["seen"], None, None, None, None, 0.25
    for factor, keys in ((60, given["keys"]), (60, -q[:, :1, :1].sign().expand_as(given["keys"]) * 5)):
        right, plain = (
            decode_reference.decode_attention(
                (q * factor).to(kind), keys.to(kind), given["values"].to(kind), *rest
            )
            for kind in (torch.float64, torch.float32)
        )
        given["keys"] = keys.contiguous()
        out = ops.decode_attention(q * factor, **given, scale=0.25, impl="triton")
        check_budget(out, plain, right, "large scores")


def check_counts_beyond_32_bits():
    """Refused, and not cut to what is left of them."""
    ring = torch.zeros(1, 1, 16, 16)
    far = (
        {"seen": torch.tensor([(1 << 32) + 3])},
        {"seen": torch.tensor([9]), "start": torch.tensor([1 << 31])},
    )
    for counts, says in zip(far, ("seen must be at most 2147483647, got [4294967299]", "start must be")):
        try:
            ops.decode_attention(torch.zeros(1, 1, 16), ring, ring, **counts, impl="triton")
        except ValueError as error:
            assert says in str(error), error
        else:
            raise AssertionError(f"{counts} was taken")


def check_strides():
    """Queries, keys and values inside wider tensors."""
    q, given, _, _ = case((30, 12), 4, 2, 24, 20, torch.float16)
    plain = ops.decode_attention(q[:, 0], **given, impl="triton")
    wide = torch.randn(2, 4, 72).half()
    wide[..., 24:48] = q[:, 0]
    both = torch.stack((given.pop("keys"), given.pop("values")), dim=3)
    out = ops.decode_attention(wide[..., 24:48], both[..., 0, :], both[..., 1, :], **given, impl="triton")
    assert torch.equal(out, plain)


def check_window_boundary():
    """The key at distance W - 1 counts, the one at distance W does not: by a value that nothing else has."""
    for seen, window, slots in itertools.product((9, 40), (1, 8), (8, 21)):
        for distance, counts in ((window - 1, True), (window, False)):
            newest = seen - 1
            if not newest - distance >= 0 or distance >= slots:
                continue
            keys = torch.zeros(1, 1, slots, 16)
            values = torch.zeros(1, 1, slots, 16)
            values[0, 0, (newest - distance) % slots] = 1.0
            out = ops.decode_attention(
                torch.zeros(1, 1, 16), keys, values, torch.tensor([seen]), window=window, impl="triton"
            )
            assert math.isclose(float(out[0, 0, 0]), (1 / min(window, seen)) * counts, rel_tol=1e-6)


if __name__ == "__main__":
    assert launch.interpreting()
    torch.manual_seed(0)
    poison()
    # several splits at sizes that the interpreter can bear
    tuning_decode.CHUNK = 64
    for dtype in (torch.float16, torch.float32):
        for int8 in (False, True):
            # not full, exactly full, wrapped, wrapped twice, one token, none
            check((20, 45, 0, 61, 1, 131), 3, 1, 24, 45, dtype, int8=int8)
        check((20, 90, 131), 4, 2, 16, 90, dtype, window=70, start=(3, 0, 110), int8=True)
        check((300,), 2, 1, 80, 200, dtype, window=170)
        check((130, 17), 2, 1, 32, 160, dtype, window=100, queries=3, start=(0, 15))
        # the first split holds a key that the first of three queries sees alone
        check((165, 17), 2, 1, 32, 170, dtype, window=100, queries=3)
    check((250, 20, 90), 2, 1, 16, 240, torch.float32, start=(0, 25, -4))
    check((10, 64, 129), 1, 1, 16, 64, torch.float16)
    check((70,), 17, 1, 96, 64, torch.float16)
    check((70, 3), 2, 2, 128, 100, torch.float16, int8=True)
    check((40,), 72, 1, 16, 64, torch.float32, queries=2, window=20)
    check((5, 9), 2, 1, 256, 16, torch.float16)
    check_padding()
    check_steps()
    check_what_breaks_behind()
    check_counts_of_nothing()
    check_counts_near_the_end_of_32_bits()
    check_counts_beyond_32_bits()
    check_owners_of_parts()
    check_cost()
    check_long_sums()
    check_large_scores()
    check_strides()
    check_window_boundary()
    assert launch._locks and not any(bool(c.any()) for sets in launch._locks.values() for c in sets)
    print("interpreted decode attention: all within budget")
