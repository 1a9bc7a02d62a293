"""Decode attention over a ring on the CPU, against torch's attention over the plain history of every row."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from brise.kernels import decode_cpu, decode_reference, ops, tuning_decode
from brise.kernels.budget import check_budget

NAN = float("nan")
SLOTS = 21
# not full, exactly full, wrapped, wrapped twice, one token
SEEN = (13, 21, 30, 55, 1)


def history(seen, groups, width, dtype=torch.float32, int8=False):
    """For each row the keys and values of all its positions: what to write, and what that stands for in float64."""
    rows = []
    for count in seen:
        row = []
        for shift in (0.0, 0.5):
            x = (torch.randn(groups, count, width) + shift).to(dtype)
            if int8:
                scale = x.float().abs().amax(-1) / 127
                codes = (x.float() / scale[..., None]).round().to(torch.int8)
                row.append((codes, scale, codes.double() * scale.double()[..., None]))
            else:
                row.append((x, None, x.double()))
        rows.append(row)
    return rows


def rings(rows, slots):
    """The ring that the history leaves, nan where nothing was written."""
    (codes, scale, _), *_ = rows[0]
    shape = (len(rows), codes.shape[0], slots)
    given = {}
    for i, name in enumerate(("key", "value")):
        ring = torch.full((*shape, codes.shape[2]), 77 if scale is not None else NAN).to(codes.dtype)
        scales = torch.full(shape, NAN)
        for b, row in enumerate(rows):
            for p in range(row[i][0].shape[1]):
                ring[b, :, p % slots] = row[i][0][:, p]
                if scale is not None:
                    scales[b, :, p % slots] = row[i][1][:, p]
        given[name + "s"] = ring
        if scale is not None:
            given[name + "_scales"] = scales
    return given


def attention(q, rows, slots, window, start, dtype):
    """torch's own attention, row by row over what the query may see, in ``dtype``."""
    out = torch.zeros(q.shape, dtype=dtype)
    queries = q.shape[1]
    for b, ((_, _, k), (_, _, v)) in enumerate(rows):
        count = k.shape[1]
        for t in range(queries):
            end = count - queries + 1 + t
            low = max(0 if start is None else start[b], count - slots, 0)
            low = low if window is None else max(low, end - window)
            if low < end:
                out[b, t] = torch.nn.functional.scaled_dot_product_attention(
                    q[b, t, :, None].to(dtype),
                    k[:, low:end].to(dtype),
                    v[:, low:end].to(dtype),
                    enable_gqa=True,
                )[:, 0]
    return out


@pytest.mark.parametrize(
    "window,start", [(None, None), (21, None), (8, (0, 3, 0, 50, 0)), (1, None), (None, (12, 2, 29, 0, 1))]
)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("impl", ["auto", "invariant", "reference"])
def test_as_torch_attention_over_the_history(impl, int8, window, start):
    torch.manual_seed(0)
    how = {"impl": "auto", "batch_invariant": True} if impl == "invariant" else {"impl": impl}
    for dtype, (heads, groups, width) in (
        (torch.float32, (6, 2, 16)), (torch.float16, (4, 4, 24)), (torch.bfloat16, (8, 1, 64)),
    ):  # fmt: skip
        q = torch.randn(len(SEEN), heads, width).to(dtype) * 2
        rows = history(SEEN, groups, width, dtype, int8)
        first = None if start is None else torch.tensor(start, dtype=torch.int32)
        out = ops.decode_attention(
            q, **rings(rows, SLOTS), seen=torch.tensor(SEEN), start=first, window=window, **how
        )
        exact, eager = (
            attention(q[:, None], rows, SLOTS, window, start, kind)[:, 0] for kind in (torch.float64, dtype)
        )
        assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous()
        check_budget(out, eager, exact, f"{impl} {dtype} window {window}")
        # rows whose padding reaches to the end, and what stands before it
        assert not out[exact == 0].any()


@pytest.mark.parametrize("impl", ["auto", "invariant", "reference"])
def test_several_queries_see_what_each_would_alone(impl):
    torch.manual_seed(1)
    how = {"impl": "auto", "batch_invariant": True} if impl == "invariant" else {"impl": impl}
    for seen, window, start in (
        ((13, 30, 55), 17, None),
        ((13, 30, 55), 17, (11, 29, 0)),
        ((9, 9, 9), None, None),
    ):
        q, rows = torch.randn(3, 5, 4, 16), history(seen, 2, 16)
        first = None if start is None else torch.tensor(start)
        out = ops.decode_attention(
            q, **rings(rows, SLOTS), seen=torch.tensor(seen), start=first, window=window, scale=0.25, **how
        )
        exact = attention(q, rows, SLOTS, window, start, torch.float64)
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_key_at_the_edge_of_the_window(impl):
    """W keys with the query's own: a value that one key alone has comes through at distance W - 1, not at W."""
    for seen in (9, 21, 40):
        for window, distance, weight in ((8, 7, 1 / 8), (8, 8, 0.0), (1, 0, 1.0), (1, 1, 0.0)):
            keys, values = torch.zeros(1, 1, SLOTS, 4), torch.zeros(1, 1, SLOTS, 4)
            values[0, 0, (seen - 1 - distance) % SLOTS] = 1
            out = ops.decode_attention(
                torch.zeros(1, 1, 4), keys, values, torch.tensor([seen]), window=window, impl=impl
            )
            torch.testing.assert_close(out, torch.full((1, 1, 4), weight))


def test_what_is_broken_in_a_row_stays_there():
    torch.manual_seed(2)
    rows = history((9, 30, 5), 2, 16)
    q = torch.randn(3, 4, 16)
    given = rings(rows, SLOTS) | {"seen": torch.tensor((9, 30, 5))}
    sound = ops.decode_attention(q, **given)
    given["values"][1, 0, 3] = float("inf")
    given["keys"][1, 1, 2] = NAN
    for impl in ("auto", "reference"):
        out = ops.decode_attention(q, **given, impl=impl)
        assert bool(out[[0, 2]].isfinite().all()) and not out[1].isfinite().any()
        torch.testing.assert_close(out[[0, 2]], sound[[0, 2]])


@pytest.mark.parametrize("impl", ["auto", "invariant", "reference"])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [17, None])
def test_a_query_sees_nothing_of_what_breaks_behind_it(impl, int8, window):
    """A draft that is nan: the queries before it are what they are without it, those behind it are nan."""
    torch.manual_seed(7)
    seen, slots = (13, 30, 9), SLOTS
    how = {"impl": "auto", "batch_invariant": True} if impl == "invariant" else {"impl": impl}
    q, rows = torch.randn(3, 4, 4, 16), history(seen, 2, 16, int8=int8)
    exact = attention(q, rows, slots, window, None, torch.float64)
    for broken in (NAN, float("inf")):
        given = rings(rows, slots) | {"seen": torch.tensor(seen)}
        for b, behind in ((0, 1), (1, 2)):
            slot = (seen[b] - behind) % slots
            names = ("key_scales", "value_scales") if int8 else ("keys", "values")
            for name in names:
                given[name][b, :, slot] = broken
        out = ops.decode_attention(q, **given, window=window, **how)
        whole = torch.ones(3, 4, dtype=torch.bool)
        whole[0, 3:] = whole[1, 2:] = False
        torch.testing.assert_close(out[whole].double(), exact[whole], rtol=1e-5, atol=1e-6)
        assert not out[~whole].isfinite().any()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_what_another_text_left_in_the_ring_is_not_seen(impl):
    """A row that is given to a new text keeps the finite numbers of the old one."""
    torch.manual_seed(6)
    seen = (3, 9, 13)
    for int8 in (False, True):
        rows = history(seen, 2, 16, int8=int8)
        given = {name: t.nan_to_num(50.0) for name, t in rings(rows, SLOTS).items()} | {
            "seen": torch.tensor(seen)
        }
        q = torch.randn(3, 1, 4, 16)
        for window in (None, 15, 4):
            exact = attention(q, rows, SLOTS, window, None, torch.float64)
            out = ops.decode_attention(q, **given, window=window, impl=impl)
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_autocast_leaves_the_dtype_that_was_asked_for(impl):
    torch.manual_seed(7)
    given = rings(history((3, 9), 2, 8), 10) | {"seen": torch.tensor((3, 9)), "impl": impl}
    q = torch.randn(2, 4, 8)
    for invariant in (False, True):
        plain = ops.decode_attention(q, **given, batch_invariant=invariant)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.decode_attention(q, **given, batch_invariant=invariant), plain)


def test_a_row_alone_has_the_bits_it_has_in_a_batch():
    torch.manual_seed(3)
    q, given = torch.randn(5, 6, 16), rings(history(SEEN, 2, 16), SLOTS) | {"seen": torch.tensor(SEEN)}
    for impl in ("auto", "reference"):
        together = ops.decode_attention(q, **given, window=9, impl=impl, batch_invariant=True)
        for b in range(5):
            alone = {name: t[b : b + 1] for name, t in given.items()}
            out = ops.decode_attention(q[b : b + 1], **alone, window=9, impl=impl, batch_invariant=True)
            assert torch.equal(out[0], together[b])


def test_the_ring_is_not_copied():
    """Nothing that is allocated on the way comes near the size of the ring, wrapped or not."""
    keys, values = torch.randn(2, 2, 3, 512, 32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            known = {keys.untyped_storage().data_ptr()}
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    for seen in ((512, 512), (900, 700), (400, 90)):
        for start, invariant in ((None, False), (torch.tensor([5, 0]), False), (None, True)):
            with Watch():
                decode_cpu.decode_attention(
                    torch.randn(2, 1, 6, 32),
                    keys,
                    values,
                    torch.tensor(seen),
                    start,
                    None,
                    None,
                    None,
                    1.0,
                    invariant,
                )
    assert 0 < largest < keys[0].nbytes


def test_opcheck_and_one_graph():
    rows = history((9, 30), 2, 16, int8=True)
    t = rings(rows, SLOTS)
    q, seen = torch.randn(2, 1, 4, 16), torch.tensor((9, 30))
    arguments = (
        q,
        t["keys"],
        t["values"],
        seen,
        seen - 9,
        t["key_scales"],
        t["value_scales"],
        8,
        0.25,
        "auto",
        False,
    )
    torch.library.opcheck(torch.ops.brise.decode_attention.default, arguments)
    plain = rings(history((9, 30), 2, 16), SLOTS)
    f = torch.compile(
        lambda q, seen: ops.decode_attention(q, **plain, seen=seen, window=8).relu(),
        fullgraph=True,
        backend="aot_eager",
    )
    for step in range(2):
        x = torch.randn(2, 4, 16)
        assert torch.equal(
            f(x, seen - step), ops.decode_attention(x, **plain, seen=seen - step, window=8).relu()
        )


def test_no_rows_and_no_positions():
    for impl in ("auto", "reference"):
        ring = torch.full((2, 2, 8, 16), NAN)
        out = ops.decode_attention(torch.randn(2, 4, 16), ring, ring, torch.tensor([0, -3]), impl=impl)
        assert not out.any() and out.shape == (2, 4, 16)
        nobody = torch.zeros(0, dtype=torch.int64)
        none = ops.decode_attention(torch.randn(0, 4, 16), ring[:0], ring[:0], nobody, impl=impl)
        assert none.shape == (0, 4, 16)


def refuse(match, error=ValueError, **changes):
    ring = torch.zeros(2, 2, 8, 16)
    given = {"q": torch.randn(2, 4, 16), "keys": ring, "values": ring, "seen": torch.tensor([3, 9])} | changes
    with pytest.raises(error, match=match):
        ops.decode_attention(**given)


def test_bad_input_is_refused_with_its_values():
    ring, codes, scales = (
        torch.zeros(2, 2, 8, 16),
        torch.zeros(2, 2, 8, 16, dtype=torch.int8),
        torch.ones(2, 2, 8),
    )
    refuse(r"\[B, H, D\] or \[B, T, H, D\], got \[4, 16\]", q=torch.randn(4, 16))
    refuse(r"with T of at least 1, got \[2, 0, 4, 16\]", q=torch.randn(2, 0, 4, 16))
    refuse("floating point, got torch.int64", TypeError, q=torch.ones(2, 4, 16, dtype=torch.int64))
    refuse(r"both be \[B, KV, W, D\], got .*\[2, 2, 9, 16\]", values=torch.zeros(2, 2, 9, 16))
    refuse(r"\[3, KV, W, 16\], got \[2, 2, 8, 16\]", q=torch.randn(3, 4, 16))
    refuse(r"KV, W, 32\], got \[2, 2, 8, 16\]", q=torch.randn(2, 4, 32))
    refuse(r"multiple of KV = 2, got q \[2, 1, 3, 16\]", q=torch.randn(2, 3, 16))
    refuse(r"torch.float32, or torch.int8 with scales, got torch.float16", TypeError, keys=ring.half())
    refuse("int8 keys need their scales", keys=codes, values=codes)
    refuse("scales are for int8 values", value_scales=scales)
    refuse("of one dtype", TypeError, keys=codes, key_scales=scales)
    refuse(
        "must be torch.float32, got torch.float16",
        TypeError,
        keys=codes,
        values=codes,
        key_scales=scales.half(),
    )
    refuse(r"contiguous \[2, 2, 8\], got \[2, 2, 7\]", keys=codes, values=codes, key_scales=scales[..., :7])
    refuse(r"contiguous along D, got strides", keys=torch.zeros(2, 2, 16, 8).transpose(2, 3))
    refuse("int32 or torch.int64, got torch.float32", TypeError, seen=torch.ones(2))
    refuse(r"seen must be \[2\], got \[3\]", seen=torch.tensor([1, 2, 3]))
    refuse(r"start must be \[2\], got \[2, 1\]", start=torch.tensor([[1], [2]]))
    refuse("window must be at least 1.*got 0", window=0)
    refuse("window must be an int or None, got bool True", TypeError, window=True)
    refuse("a window of 9 and 1 queries need 9 slots, the ring has 8", window=9)
    refuse("a window of 7 and 3 queries need 9 slots", q=torch.randn(2, 3, 4, 16), window=7)
    refuse("q is on cpu, keys on meta", keys=ring.to("meta"))
    refuse("q is on cpu, seen on meta", seen=torch.tensor([3, 9], device="meta"))
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        refuse(f"scale must be positive and finite, got {scale}", scale=scale)
    refuse(r"got q \[2, 1, 4, 0\]", q=torch.randn(2, 4, 0), keys=ring[..., :0], values=ring[..., :0])
    refuse("impl must be", impl="fast")
    refuse("needs a GPU tensor", impl="triton")
    wide = torch.zeros(2, 2, 8, 512)
    refuse("heads of at most 256", q=torch.randn(2, 4, 512), keys=wide, values=wide, impl="triton")


def test_the_split_depends_on_the_ring_alone():
    for span in (1, 64, 255, 256, 257, 4096, 8192, 8193, 32768, 131072):
        chunk = tuning_decode.chunk_of(span)
        for queries in (1, 5, 16):
            splits = tuning_decode.splits_of(span, queries)
            # however the visible keys lie to the chunks, the grid covers them
            most = max((low + span + queries - 2) // chunk - low // chunk + 1 for low in range(0, chunk, 7))
            assert most <= splits <= tuning_decode.MAX_SPLITS + 2
        for width, size in ((64, 2), (96, 2), (128, 2), (256, 2), (64, 4), (256, 4)):
            for tile in (16, 64):
                assert chunk % tuning_decode.decode_config(width, size, tile).bn == 0
    assert [tuning_decode.rows_of(n, 2) for n in (1, 16, 17, 33, 72)] == [16, 16, 32, 64, 64]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_the_kernel_at_full_size(dtype, int8):
    torch.manual_seed(5)
    seen, slots = (40, 4096, 5000, 9001), 4100
    rows = history(seen, 8, 128, dtype, int8)
    q = torch.randn(4, 1, 32, 128).to(dtype)
    given = {name: t.cuda() for name, t in rings(rows, slots).items()} | {"seen": torch.tensor(seen).cuda()}
    out = ops.decode_attention(q.cuda(), **given, window=4096)
    assert torch.equal(out, ops.decode_attention(q.cuda(), **given, window=4096))
    eager = decode_reference.decode_attention(
        q, *(given[n].cpu() for n in ("keys", "values", "seen")), None,
        *(given[n].cpu() if int8 else None for n in ("key_scales", "value_scales")), 4096, 128**-0.5,
    )  # fmt: skip
    check_budget(out.cpu(), eager, attention(q, rows, slots, 4096, None, torch.float64), f"gpu {dtype}")
