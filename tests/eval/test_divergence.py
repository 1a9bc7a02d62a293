"""The distribution of the divergence, its bootstrap, predictions in 16 bits, and llama.cpp's file of them."""

import dataclasses
import itertools
import struct

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from brise.eval.bootstrap import Interval, draws, mean_interval, quantile_intervals
from brise.eval.data import Windows, cut_windows
from brise.eval.divergence import TokenFigures, describe, shared_of_five
from brise.eval.evaluate import baseline_of, evaluate, make_setting
from brise.eval.logprobs import (
    LogProbError,
    cache_key,
    decode_rows,
    encode_rows,
    load_baseline,
    read_kld,
    save_baseline,
    write_kld,
)
from brise.eval.model_info import ModelInfo
from brise.eval.scoring import measure_baseline, score

VOCAB = 61


def tiny(seed: int = 0) -> MistralForCausalLM:
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return MistralForCausalLM(config).eval()


def make(length: int, count: int, stride: int | None = None) -> Windows:
    tokens = torch.randint(VOCAB, (400,), generator=torch.Generator().manual_seed(0))
    ids, first = cut_windows(tokens, length, count, stride=stride)
    return Windows(ids, first, "random", "0" * 64, False, stride or length)


def near(seed: int = 1) -> MistralForCausalLM:
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return model


# ---- bootstrap --------------------------------------------------------------------------------------


def test_intervals_against_resampling_by_hand():
    """Every resample is built token by token, and its figures are numpy's."""
    generator = torch.Generator().manual_seed(3)
    sizes = [3, 7, 5, 1]
    window = torch.tensor([i for i, n in enumerate(sizes) for _ in range(n)])
    values = torch.randint(6, (16,), generator=generator).float()  # with ties
    counts = draws(4, 50, seed=9)
    assert counts.sum(1).eq(4).all() and torch.equal(counts, draws(4, 50, seed=9))
    levels = (0.5, 0.9, 0.999)
    means, quantiles = [], []
    for row in counts.long().tolist():
        tokens = np.concatenate([values[window == w].numpy() for w, n in enumerate(row) for _ in range(n)])
        means.append(tokens.mean(dtype=np.float64))
        quantiles.append([np.quantile(tokens, q, method="inverted_cdf") for q in levels])
    got = mean_interval(values, window, counts)
    low, high = np.quantile(means, [0.025, 0.975])
    assert (got.value, got.low, got.high) == pytest.approx((float(values.mean()), low, high))
    for i, interval in enumerate(quantile_intervals(values, window, counts, levels)):
        low, high = np.quantile([q[i] for q in quantiles], [0.025, 0.975])
        own = np.quantile(values.numpy(), levels[i], method="inverted_cdf")
        assert (interval.value, interval.low, interval.high) == pytest.approx((own, low, high))


def test_an_interval_covers_the_truth_nineteen_times_in_twenty():
    generator = torch.Generator().manual_seed(0)
    counts = draws(40, 400)
    window = torch.arange(40).repeat_interleave(8)
    inside = 0
    for _ in range(300):
        values = (torch.randn(40, 1, generator=generator) + torch.randn(40, 8, generator=generator)).flatten()
        got = mean_interval(values, window, counts)
        inside += got.low < 0 < got.high
    assert 0.90 < inside / 300 < 0.98


def test_one_window_has_no_interval():
    values, window = torch.tensor([1.0, 2.0]), torch.zeros(2, dtype=torch.int64)
    assert mean_interval(values, window, draws(1)) == Interval(1.5)
    assert quantile_intervals(values, window, draws(1), (0.5,)) == [Interval(1.0)]


def test_each_quantile_stands_under_its_own_name():
    kl = torch.arange(1, 2001).float()[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    window = torch.arange(2000) // 500
    rest = torch.zeros(2000)
    found = describe(TokenFigures(window, kl, rest, rest, rest), 4, resamples=20)
    values = [getattr(found, name).value for name in ("median", "p90", "p99", "p999")]
    assert values == [1000, 1800, 1980, 1998] and found.mean.value == 1000.5


# ---- the figures ------------------------------------------------------------------------------------


def test_every_figure_against_a_float64_twin():
    base, model, windows = tiny(), near(), make(16, 8, 5)
    kl, same, five, change = [], [], [], []
    for ids, first in zip(windows.ids, windows.first_target):
        with torch.no_grad():
            p, q = (torch.softmax(m(ids[None]).logits[0].double(), -1) for m in (base, model))
        for t in range(first, 16):
            a, b = p[t - 1], q[t - 1]
            kl.append(float((a * (a.log() - b.log())).sum()))
            order_a, order_b = (x.sort(descending=True).indices[:5].tolist() for x in (a, b))
            same.append(order_a[0] == order_b[0])
            five.append(len(set(order_a) & set(order_b)) / 5)
            change.append(float(b[ids[t]] - a[ids[t]]))
    details = score(model, windows, measure_baseline(base, windows), batch=3).divergence.details
    assert details.mean.value == pytest.approx(np.mean(kl), rel=1e-4)
    for name, level in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999)):
        expected = np.quantile(kl, level, method="inverted_cdf")
        assert getattr(details, name).value == pytest.approx(expected, rel=1e-3), name
    assert details.top1.value == pytest.approx(np.mean(same))
    assert details.top5.value == pytest.approx(np.mean(five))
    assert details.true_token.value == pytest.approx(np.mean(change), rel=1e-3)
    assert details.true_token_rms.value == pytest.approx(np.mean(np.square(change)) ** 0.5, rel=1e-3)
    assert details.mean.low < details.mean.value < details.mean.high
    assert 0 < details.median.value < details.p90.value < details.p99.value


def test_a_model_against_itself():
    windows = make(16, 4)
    details = score(tiny(), windows, measure_baseline(tiny(), windows)).divergence.details
    assert details.top1 == details.top5 == Interval(1.0, 1.0, 1.0)
    assert details.true_token == Interval(0.0, 0.0, 0.0) == details.true_token_rms
    assert abs(details.p999.value) < 1e-6


def test_five_of_a_small_vocabulary():
    assert shared_of_five(torch.tensor([[1.0, 2, 3]]), torch.tensor([[3.0, 2, 1]])).tolist() == [1.0]


def test_details_are_the_same_for_the_same_seed():
    generator = torch.Generator().manual_seed(0)
    figures = TokenFigures(torch.arange(60) // 2, *(torch.rand(60, generator=generator) for _ in range(4)))
    assert describe(figures, 30, seed=1) == describe(figures, 30, seed=1) != describe(figures, 30, seed=2)


# ---- 16 bits ----------------------------------------------------------------------------------------


def llamacpp_row(logits: list[float]) -> bytes:
    """One row as tools/perplexity/perplexity.cpp makes it, float32 by float32."""
    f = np.float32
    x = np.array(logits, f)
    top, low = x.max(), max(x.min(), f(x.max() - f(16)))
    total = 0.0
    for v in x:
        total += float(np.exp(f(v - top)))
    log_sum = f(np.log(total))
    scale = f(f(top - low) / f(65535))
    out = struct.pack("<ff", scale, f(f(low - top) - log_sum))
    inverse = f(1) / scale if scale else f(0)
    for v in x:
        out += struct.pack("<H", int(np.rint(f(inverse * f(v - low)))) if v > low else 0)
    return out + b"\0\0" * (len(logits) % 2)


def test_rows_are_llamacpps():
    generator = torch.Generator().manual_seed(0)
    for width, spread in itertools.product((5, 8), (0.0, 1.0, 9.0)):
        logits = spread * torch.randn(3, width, generator=generator)
        rows = encode_rows(logits, 16.0)
        assert rows.tobytes() == b"".join(llamacpp_row(row) for row in logits.tolist())


def test_what_comes_back_is_within_half_a_step():
    logits = 5 * torch.randn(50, 33, generator=torch.Generator().manual_seed(0))
    exact = torch.log_softmax(logits.double(), -1)
    reach = (exact.max(-1).values - exact.min(-1).values)[:, None]
    off = (decode_rows(encode_rows(logits), 33).double() - exact).abs()
    assert float((off / (reach / 65535)).max()) < 0.51  # what is over is float32's


def test_a_kept_baseline_gives_the_divergence_of_the_exact_one(tmp_path):
    base, model, windows = tiny(), near(), make(16, 6, 5)
    info = ModelInfo("base", "a" * 64)
    exact = measure_baseline(base, windows)
    scores = save_baseline(base, windows, info, tmp_path / "kept", batch=2)
    kept = load_baseline(tmp_path / "kept", windows)
    assert torch.allclose(scores.nll, exact.nll) and torch.equal(kept.nll, scores.nll)
    assert kept.info == info and kept.precision == "16-bit" and exact.precision == "exact"
    a, b = score(model, windows, exact), score(model, windows, kept)
    assert torch.equal(a.nll, b.nll)
    assert torch.allclose(a.kl, b.kl, rtol=1e-3, atol=0) and not torch.equal(a.kl, b.kl)
    assert torch.equal(a.agree, b.agree)
    assert score(base, windows, kept).kl.max() / 15 < 1e-7  # and of a model from itself nearly none
    with pytest.raises(LogProbError, match="other windows"):
        load_baseline(tmp_path / "kept", make(16, 5, 5))
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_the_cache_is_keyed_by_model_text_and_protocol(tiny_checkpoint, tiny_text, tmp_path, monkeypatch):
    how = {"text": str(tiny_text), "windows": 3, "length": 16}
    row = evaluate(tiny_checkpoint, baseline=tiny_checkpoint, baseline_cache=tmp_path, **how)
    assert row.protocol.baseline == "16-bit" and abs(row.divergence.kl) < 1e-7
    exact = evaluate(tiny_checkpoint, baseline=tiny_checkpoint, **how)
    assert exact.protocol.baseline == "exact" and exact.key != row.key
    (first,) = tmp_path.iterdir()
    monkeypatch.setattr(
        "brise.eval.evaluate.load_model", lambda *a, **k: pytest.fail("the baseline ran again")
    )
    baseline_of(tiny_checkpoint, make_setting(tiny_checkpoint, **how), tmp_path)
    monkeypatch.undo()
    others = [{**how, "windows": 2}, {**how, "dtype": torch.bfloat16}]
    for other in others:
        baseline_of(tiny_checkpoint, make_setting(tiny_checkpoint, **other), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3 and first in tmp_path.iterdir()


def test_another_model_text_protocol_or_precision_is_another_file():
    windows, info = make(16, 4), ModelInfo("a", "0" * 64)
    others = [
        (dataclasses.replace(info, sha256="1" * 64), windows, torch.float32, "cpu"),
        (info, dataclasses.replace(windows, text_sha256="1" * 64), torch.float32, "cpu"),
        (info, dataclasses.replace(windows, ids=windows.ids + 1), torch.float32, "cpu"),
        (info, dataclasses.replace(windows, protocol="gptq-2048"), torch.float32, "cpu"),
        (info, windows, torch.bfloat16, "cpu"),
        (info, windows, torch.float32, "cuda"),
    ]
    keys = [cache_key(*what) for what in [(info, windows, torch.float32, "cpu"), *others]]
    assert len(set(keys)) == 7
    same = dataclasses.replace(info, name="b")
    assert cache_key(same, windows, torch.float32, "cpu") == keys[0]


def halves(length: int = 16, count: int = 4) -> Windows:
    windows = make(length, count)
    first = (length // 2 + 1,) * count
    return Windows(windows.ids, first, "random", "0" * 64, False, length, "llamacpp-512")


def test_llamacpps_file_comes_and_goes(tmp_path):
    path, windows = tmp_path / "base.kld", halves()
    written = write_kld(path, tiny(), windows)
    data = path.read_bytes()
    assert data[:20] == b"_logits_" + struct.pack("<iii", 16, VOCAB, 4)
    assert data[20 : 20 + 4 * 64] == windows.ids.numpy().astype("<i4").tobytes()
    assert len(data) == 20 + 4 * 64 + 4 * 7 * 2 * (4 + 62)
    with torch.no_grad():
        logits = tiny()(windows.ids).logits[:, 8:15]
    # the rows of positions 8 .. 14; the model ran alone here, so a code may be off by float32's last bit
    rows = np.frombuffer(data[20 + 4 * 64 :], "<u2").reshape(28, 66)
    assert np.abs(rows.astype(int) - encode_rows(logits.reshape(28, -1), 16.0).astype(int))[:, 4:].max() <= 1
    read, theirs = read_kld(path)
    assert torch.equal(theirs.ids, windows.ids) and theirs.first_target == (9,) * 4
    assert torch.allclose(read.nll, written.nll, atol=1e-2, rtol=1e-4)
    exact = score(near(), windows, measure_baseline(tiny(), windows))
    assert torch.allclose(score(near(), theirs, read).kl, exact.kl, rtol=1e-3)
    bos = read_kld(path, bos_id=1)[1]
    assert bos.ids[:, 0].eq(1).all() and torch.equal(bos.ids[:, 1:], windows.ids[:, 1:])


def test_llamacpps_file_keeps_sixteen_nats_below_the_likeliest(tmp_path):
    model, windows = tiny(), halves()
    with torch.no_grad():
        model.lm_head.weight *= 20
        logits = model(windows.ids[:1]).logits[0, 8:15]
    write_kld(tmp_path / "base.kld", model, windows)
    read = read_kld(tmp_path / "base.kld")[0].logits(0, slice(8, 15), torch.device("cpu"))
    wanted = torch.log_softmax(logits, -1)
    assert (wanted.amax(-1) - wanted.amin(-1)).min() > 20
    cut = torch.maximum(wanted, wanted.amax(-1, keepdim=True) - 16)
    assert torch.allclose(read, cut, atol=16 / 65535)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "base.kld"
    write_kld(path, tiny(), halves())
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"0"):
        path.write_bytes(damaged)
        with pytest.raises(LogProbError, match=r"expected \d+ bytes, got \d+: was its writing cut off"):
            read_kld(path)
    path.write_bytes(b"_logitz_" + bytes(12))
    with pytest.raises(LogProbError, match="begins with _logits_"):
        read_kld(path)
    with pytest.raises(LogProbError, match="second half of each window"):
        write_kld(path, tiny(), make(16, 2))
