"""Perplexity and divergence: by hand, against slow float64 twins, and against transformers' own loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from brise.eval import scoring
from brise.eval.data import Windows, cut_windows
from brise.eval.divergence import divergence, same_first_choice, token_kl
from brise.eval.perplexity import NonFiniteError, perplexity, relative_perplexity, token_nll
from brise.eval.scoring import measure_baseline, score
from brise.eval.statistics import Estimate, exp_of, mean_per_token

VOCAB = 61


def tiny(seed: int = 0, tied: bool = False) -> MistralForCausalLM:
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=7,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return MistralForCausalLM(config).eval()


def make(length: int, count: int, stride: int | None = None, seed: int = 0) -> Windows:
    tokens = torch.randint(VOCAB, (400,), generator=torch.Generator().manual_seed(seed))
    ids, first = cut_windows(tokens, length, count, stride=stride)
    return Windows(ids, first, "random", "0" * 64, False, stride or length)


# ---- statistics -------------------------------------------------------------------------------------


def test_mean_by_hand():
    # windows of 2 and 2 tokens with sums 2 and 6: means 1 and 3, mean 2, sd sqrt(2), se 1
    assert mean_per_token(torch.tensor([2.0, 6.0]), torch.tensor([2, 2])) == Estimate(2.0, 1.0)
    # unequal windows: sums 3 and 3 over 1 and 3 tokens: m = 1.5, residuals 1.5 and -1.5,
    # se^2 = 2/1 * (2.25 + 2.25) / 16 = 0.5625
    assert mean_per_token(torch.tensor([3.0, 3.0]), torch.tensor([1, 3])) == Estimate(1.5, 0.75)
    assert mean_per_token(torch.tensor([3.0]), torch.tensor([2])) == Estimate(1.5, None)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30), st.integers(1, 9))
def test_equal_windows_give_the_plain_standard_error(means, tokens):
    means_t = torch.tensor(means, dtype=torch.float64)
    got = mean_per_token(means_t * tokens, torch.full((len(means),), tokens))
    assert got.value == pytest.approx(float(means_t.mean()), abs=1e-9)
    assert got.stderr == pytest.approx(float(means_t.std()) / math.sqrt(len(means)), abs=1e-9)


def test_the_standard_error_is_the_spread_of_repeated_measurements():
    """Monte Carlo: the mean of the estimated errors is the standard deviation of the estimates."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([5, 10, 15, 20] * 10)
    estimates = []
    for _ in range(1500):
        level = 3 + torch.randn(40, generator=generator, dtype=torch.float64)  # the window's own
        estimates.append(mean_per_token(level * tokens, tokens))
    spread = float(torch.tensor([e.value for e in estimates]).std())
    mean_error = sum(e.stderr for e in estimates if e.stderr is not None) / len(estimates)
    assert mean_error == pytest.approx(spread, rel=0.06)  # sd of an sd over 1500 draws: 1.8%


def test_what_both_models_share_cancels_in_the_relative_perplexity():
    # windows of two tokens: 1 nat harder for both is no error, half a nat a token worse is
    got = relative_perplexity(torch.tensor([3.0, 7.0]), torch.tensor([2.0, 6.0]), torch.tensor([2, 2]))
    assert got.value == pytest.approx(math.exp(0.5) - 1) and got.stderr == 0


def test_delta_method_against_a_difference_quotient():
    x, h = 2.3, 1e-6
    slope = (math.exp(x + h) - math.exp(x - h)) / (2 * h)
    got = exp_of(Estimate(x, 0.05))
    assert got.value == math.exp(x) and got.stderr == pytest.approx(0.05 * slope, rel=1e-6)
    assert exp_of(Estimate(0.0, 0.5), minus=1.0) == Estimate(0.0, 0.5)
    assert exp_of(Estimate(1e4, None)) == Estimate(math.inf, None)


# ---- tokens -----------------------------------------------------------------------------------------


def test_a_uniform_guess_has_the_vocabularys_perplexity():
    nll = token_nll(torch.zeros(6, 50), torch.arange(6))
    result = perplexity(nll.double().view(2, 3).sum(1), torch.tensor([3, 3]))
    assert result.value == pytest.approx(50, rel=1e-6) and result.stderr == 0
    assert (result.tokens, result.windows) == (6, 2)


def test_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert token_kl(p, q).item() == pytest.approx(expected, rel=1e-6)
    assert token_kl(p + 3, q - 5).item() == pytest.approx(expected, rel=1e-5)  # logits: any offset
    # not symmetric: from q's side of (1/2, 1/2) against (3/4, 1/4)
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    assert token_kl(p, q).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-6)
    assert token_kl(q, p).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


@given(
    st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 30.0]), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_tokens_against_a_float64_twin(seed, scale, dtype):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(5, 300, generator=generator).mul(scale).to(dtype) for _ in range(2))
    targets = torch.randint(300, (5,), generator=generator)
    p, q = (torch.softmax(x.double(), -1) for x in (a, b))
    nll = [-math.log(float(q[t, targets[t]])) for t in range(5)]
    kl = [sum(float(p[t, v]) * math.log(float(p[t, v] / q[t, v])) for v in range(300)) for t in range(5)]
    # fp32 log-probabilities, up to twice the largest logit and log V, carry an error of a few units of theirs
    bound = 4 * 2**-24 * 2 * float(a.float().abs().max() + b.float().abs().max() + math.log(300))
    assert token_nll(b, targets).tolist() == pytest.approx(nll, abs=bound)
    assert token_kl(a, b).tolist() == pytest.approx(kl, abs=bound)


def test_first_choice():
    a = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 1.0, 3.0]])
    b = torch.tensor([[0.0, 9.0, 8.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert same_first_choice(a, b).tolist() == [True, True, False]


# ---- the pass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_perplexity_is_exp_of_transformers_own_loss(batch, tied):
    model, windows = tiny(tied=tied), make(20, 5)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in windows.ids]
    result = score(model, windows, batch=batch).perplexity
    assert result.nll == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert result.value == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    stderr = torch.tensor(losses, dtype=torch.float64).std() / math.sqrt(5)
    assert result.nll_stderr == pytest.approx(float(stderr), rel=1e-4)
    assert result.stderr == pytest.approx(result.value * float(stderr), rel=1e-4)
    assert (result.tokens, result.windows) == (5 * 19, 5)


def twin(model, base, windows):
    """Everything in float64, token by token, from whole logits."""
    rows = []
    for row, first in zip(windows.ids, windows.first_target):
        with torch.no_grad():
            q, p = (torch.log_softmax(m.double()(row[None]).logits[0], -1) for m in (model, base))
        for m in (model, base):
            m.float()
        sums = [0.0, 0.0, 0]
        for t in range(first, len(row)):
            sums[0] -= float(q[t - 1, row[t]])
            sums[1] += float((p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum())
            sums[2] += int(p[t - 1].argmax() == q[t - 1].argmax())
        rows.append(sums)
    return torch.tensor(rows, dtype=torch.float64).T


@pytest.mark.parametrize("stride", [None, 6])
@pytest.mark.parametrize("at_once", [1 << 25, 5 * VOCAB, 1])
def test_one_pass_against_the_float64_twin(stride, at_once, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", at_once)
    base, model, windows = tiny(0), tiny(0), make(16, 6, stride)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    nll, kl, agree = twin(model, base, windows)
    baseline = measure_baseline(base, windows)
    scores = score(model, windows, baseline)
    assert 0.2 < float(agree.sum()) / windows.scored_tokens < 1 and float(kl.sum()) > 0.1
    torch.testing.assert_close(scores.nll, nll, rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.kl, kl, rtol=1e-3, atol=0)  # a difference of fp32 logits
    assert torch.equal(scores.agree, agree)
    assert scores.tokens.tolist() == [16 - f for f in windows.first_target]
    assert scores.divergence == divergence(scores.kl, scores.agree, scores.tokens, scores.figures)
    assert scores.divergence.kl == pytest.approx(float(kl.sum()) / windows.scored_tokens, rel=1e-4)
    ratio = scores.perplexity.value / baseline.scores.perplexity.value - 1
    assert scores.relative.value == pytest.approx(ratio, rel=1e-9)
    assert scores.relative == relative_perplexity(scores.nll, baseline.scores.nll, scores.tokens)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_at_no_distance_from_itself(tied):
    model, windows = tiny(tied=tied), make(16, 4)
    baseline = measure_baseline(model, windows)
    scores = score(model, windows, baseline)
    assert scores.divergence.kl == 0 and scores.divergence.top1 == 1
    assert scores.relative.value == 0 and scores.relative.stderr == 0
    assert torch.equal(scores.nll, baseline.scores.nll)


def test_the_baselines_logits_come_back_to_the_bit():
    model, windows = tiny(), make(16, 3)
    baseline = measure_baseline(model, windows)
    with torch.no_grad():
        for row, hidden in zip(windows.ids, baseline.hidden):
            assert torch.equal(baseline.head(hidden), model(row[None]).logits[0])


def test_progress_and_no_baseline():
    seen = []
    scores = score(tiny(), make(16, 3), batch=2, progress=lambda *step: seen.append(step))
    assert seen == [("score", 2, 3), ("score", 3, 3)]
    assert scores.divergence is None and scores.relative is None


def test_other_windows_are_refused():
    baseline = measure_baseline(tiny(), make(16, 3))
    for other in (make(16, 2), make(15, 3), make(16, 3, seed=1), make(16, 3, stride=8)):
        with pytest.raises(ValueError, match="other windows"):
            score(tiny(), other, baseline)


def test_what_is_not_finite_is_counted_and_an_error():
    model, windows = tiny(), make(16, 3)
    token = int(windows.ids[1, 5])
    with torch.no_grad():
        model.lm_head.weight[token, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"^45 figures over 45 scored tokens .* in window 0 at token 1:"):
        score(model, windows)


def test_a_single_bad_token_is_found():
    class Head(torch.nn.Module):
        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:-1], VOCAB)
            logits[:, 3] = -math.inf  # an impossible token: infinite surprise where it comes
            return logits

    model, windows = tiny(), make(16, 3)
    windows.ids[windows.ids == 3] = 4
    windows.ids[1, 5] = 3
    model.lm_head = Head()
    with pytest.raises(NonFiniteError, match=r"^1 figures over 45 .* in window 1 at token 5:"):
        score(model, windows)


def test_a_divergence_that_is_not_finite_is_found_where_every_likelihood_is():
    class Head(torch.nn.Module):
        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:-1], VOCAB)
            logits[
                :, 3
            ] = -math.inf  # a token that never comes: no likelihood is asked of it, but the baseline has it
            return logits

    model, windows = tiny(), make(16, 3)
    windows.ids[windows.ids == 3] = 4
    baseline = measure_baseline(tiny(1), windows)
    model.lm_head = Head()
    assert math.isfinite(score(model, windows).perplexity.value)
    with pytest.raises(NonFiniteError, match=r"^45 figures over 45 .* in window 0 at token 1:"):
        score(model, windows, baseline)


def test_dropout_is_not_for_scoring():
    model, windows = tiny(), make(16, 3)
    expected = score(model, windows).nll
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert torch.equal(score(model.train(), windows).nll, expected)
