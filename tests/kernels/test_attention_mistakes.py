"""What sliding-window attention refuses, and when its kernels are left out."""

import pytest
import torch

from brise.kernels import attention_checks, tuning_attention
from brise.kernels.attention_ops import sliding_attention


def states(batch):
    """6 queries of 4 heads over 9 keys of 2."""
    return [torch.randn(batch, *shape, 8) for shape in ((6, 4), (9, 2), (9, 2))]


def _meta(shape):
    return torch.empty(shape, device="meta")


def _ints(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


MISTAKES = [
    (
        {"q": torch.randn(6, 4, 8)},
        ValueError,
        r"q must be \[batch, positions, heads, head_dim\], got \[6, 4, 8\]",
    ),
    ({"q": torch.ones(2, 6, 4, 8).int()}, TypeError, "got torch.int32"),
    ({"k": torch.randn(2, 9, 2, 8).half()}, TypeError, "q is torch.float32, k is torch.float16"),
    ({"v": torch.randn(2, 8, 2, 8)}, ValueError, r"\[2, 9, 2, 8\] and \[2, 8, 2, 8\]"),
    (
        {"q": torch.randn(3, 6, 4, 8)},
        ValueError,
        r"batch and head_dim, got \[3, 6, 4, 8\] and \[2, 9, 2, 8\]",
    ),
    ({"q": torch.randn(2, 6, 4, 16)}, ValueError, "batch and head_dim"),
    ({"q": torch.randn(2, 6, 5, 8)}, ValueError, "a multiple of k's, got 5 and 2"),
    ({"q": torch.randn(2, 6, 0, 8)}, ValueError, "got 0 and 2"),
    ({"k": _meta((2, 9, 2, 8))}, ValueError, "q is on cpu, k on meta"),
    ({"window": 0}, ValueError, "window must be at least 1 .*, got 0"),
    ({"window": -3}, ValueError, "got -3"),
    ({"window": 2.0}, TypeError, "window must be an int or None, got float 2.0"),
    ({"window": True}, TypeError, "got bool True"),
    ({"window": 4, "causal": False}, ValueError, "window of 4 counts back .* needs causal=True"),
    ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
    ({"scale": float("nan")}, ValueError, "got nan"),
    ({"impl": "cuda"}, ValueError, "got 'cuda'"),
    ({"starts": _ints(0, 10)}, ValueError, r"starts must lie in 0 .. 9, got \[0, 10\]"),
    ({"starts": _ints(0)}, ValueError, r"starts must be \[2\], one a sequence, got \[1\]"),
    ({"starts": torch.zeros(2)}, TypeError, "starts must be int32 or int64, got torch.float32"),
    (
        {"starts": _ints(3, 0), "lengths": _ints(7, 9)},
        ValueError,
        r"starts \+ lengths at most 9, got \[7, 9\]",
    ),
    ({"lengths": _ints(-1, 4)}, ValueError, r"got \[-1, 4\]"),
    ({"starts": _meta(2).long()}, ValueError, "meta"),
    ({"cu_seqlens": _ints(0, 6)}, ValueError, "a batch of 2: flatten it"),
    ({"cu_seqlens_k": _ints(0, 6)}, ValueError, "cu_seqlens_k needs cu_seqlens"),
    ({"bounds": torch.zeros(2, 2, 6, dtype=torch.int32), "window": 3}, ValueError, "leave out window"),
    (
        {"bounds": torch.zeros(2, 2, 6)},
        TypeError,
        r"bounds must be int32 \[2 or 1, 2, 6\], got torch.float32",
    ),
    ({"bounds": torch.zeros(2, 6, 2, dtype=torch.int32)}, ValueError, r"got \[2, 6, 2\]"),
    (
        {"bounds": _ints(*[0, 9, 9, 9, 9, 10] * 2, dtype=torch.int32).view(1, 2, 6)},
        ValueError,
        r"0 .. 9, got \[\[\[0",
    ),
    ({"bounds": torch.full((1, 2, 6), -1, dtype=torch.int32)}, ValueError, "bounds must lie in 0 .. 9"),
    ({"impl": "triton"}, ValueError, "needs a GPU tensor"),
    # nothing that is given is passed over
    ({"starts": [0, 5]}, TypeError, r"starts must be an integer tensor, got list \[0, 5\]"),
    ({"lengths": 4}, TypeError, "lengths must be an integer tensor, got int 4"),
    ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be an integer tensor, got list"),
    ({"offset": 3.0}, TypeError, "offset must be an int or an integer tensor .*, got float 3.0"),
    ({"offset": True}, TypeError, "got bool True"),
    ({"offset": 1 << 30}, ValueError, "offset must lie within 1073741823 of 0, got 1073741824"),
]
PACKED_MISTAKES = [
    ({"cu_seqlens": _ints(0, 5)}, r"cu_seqlens must rise from 0 to the 6 queries, got \[0, 5\]"),
    ({"cu_seqlens": _ints(1, 6)}, r"got \[1, 6\]"),
    ({"cu_seqlens": _ints(0, 4, 3, 6)}, r"got \[0, 4, 3, 6\]"),
    ({"cu_seqlens": _ints(0, 6)}, "0 to the 9 keys .* give cu_seqlens_k"),
    ({"cu_seqlens": _ints(0, 6), "cu_seqlens_k": _ints(0, 3, 9)}, "2 entries, cu_seqlens_k 3"),
    ({"cu_seqlens": _ints(0, 6).view(1, 2)}, r"cu_seqlens must be \[sequences \+ 1\], got \[1, 2\]"),
    ({"cu_seqlens": _ints(0, 6), "starts": _ints(0)}, "leave out starts"),
    ({"cu_seqlens": _ints(0, 6), "offset": 3}, "leave out offset"),
]


@pytest.mark.parametrize("change,error,says", MISTAKES)
def test_mistakes_are_refused(change, error, says):
    q, k, v = states(2)
    with pytest.raises(error, match=says):
        sliding_attention(**({"q": q, "k": k, "v": v} | change))


@pytest.mark.parametrize("change,says", PACKED_MISTAKES)
def test_mistakes_of_packing_are_refused(change, says):
    q, k, v = states(1)
    with pytest.raises(ValueError, match=says):
        sliding_attention(q, k, v, **change)


def test_more_query_heads_than_the_narrowest_tile_has_rows_are_no_error(monkeypatch):
    """By default the kernels are left out; asked for by name they say so themselves."""
    smallest = min(
        getattr(c, kernel).bm
        for c in (tuning_attention.configs(a, d, 2) for a in (80, 90) for d in (64, 96, 128, 256))
        for kernel in ("forward", "dq", "dkdv")
    )
    assert smallest == attention_checks.MAX_GROUPS
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for heads, runs in ((32, True), (33, False)):
        q, k = torch.zeros(1, 2, heads, 8).half(), torch.zeros(1, 2, 1, 8).half()
        assert attention_checks.runs_triton("auto", q, k) is runs
