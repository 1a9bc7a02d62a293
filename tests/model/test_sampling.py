"""The sampler beside transformers' logits processors, its random numbers, and what it does with broken logits."""

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from brise.model.sampling import BROKEN, SamplerState, Sampling, choose, filtered, record, uniform

VOCAB = 97


def state_of(*samplings, prompt=()):
    state = SamplerState(len(samplings), VOCAB, torch.device("cpu"))
    for row, sampling in enumerate(samplings):
        state.begin(row, sampling, torch.tensor(prompt, dtype=torch.int64))
    return state


SETTINGS = [
    Sampling(1.0),
    Sampling(0.7, top_k=5),
    Sampling(1.5, top_p=0.6),
    Sampling(0.9, min_p=0.1),
    Sampling(1.3, top_k=20, top_p=0.8, min_p=0.05),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_p=0.01),
]


# of equals a share keeps what it comes to first; these keep all
EQUALS = [Sampling(1.0, top_k=1), Sampling(1.0, min_p=1.0), Sampling(0.9, top_k=6, min_p=0.5)]


@pytest.mark.parametrize(
    "sampling, equals", [*((s, False) for s in SETTINGS), *((s, True) for s in EQUALS)], ids=str
)
def test_the_filters_leave_what_those_of_transformers_leave(sampling, equals):
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB) * 2
    if equals:
        logits[:, 7] = logits[:, 70] = logits.amax(-1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    wanted = torch.softmax(warpers(torch.zeros(3, 1, dtype=torch.int64), logits), dim=-1)
    weights, tokens = filtered(logits, state_of(*[sampling] * 3))
    got = torch.zeros_like(logits).scatter(1, tokens, weights / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(got, wanted)
    assert torch.equal(got > 0, wanted > 0)


def test_tokens_come_as_often_as_their_probability_says():
    torch.manual_seed(1)
    logits = torch.randn(1, VOCAB)
    draws = 20000
    sampling = Sampling(1.2, top_k=10, seed=11)
    state = state_of(*[sampling] * draws)
    state.count = torch.arange(draws)
    chosen = choose(logits.expand(draws, -1), state, plain=False)
    weights, tokens = filtered(logits, state.rows(0, 1))
    wanted = torch.zeros(VOCAB).scatter(0, tokens[0], weights[0] / weights.sum())
    got = torch.bincount(chosen, minlength=VOCAB) / draws
    # five standard deviations of a share
    assert ((got - wanted).abs() <= 5 * (wanted * (1 - wanted) / draws).sqrt()).all()


def test_random_numbers_are_even_and_those_of_splitmix64():
    """Of a plain loop over Python's integers."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    seeds, counts = [0, 1, 2**62, -5], [0, 1, 7, 1000]
    for seed in seeds:
        for count in counts:
            z = mix((seed * golden + 1) % 2**64)
            wanted = (mix((z + count * golden) % 2**64) >> 40) / 2**24
            assert float(uniform(torch.tensor([seed]), torch.tensor([count]))) == wanted
    many = uniform(torch.arange(300)[:, None], torch.arange(300)[None])
    assert float(many.min()) >= 0 and float(many.max()) < 1
    shares = torch.histc(many, bins=20, min=0, max=1) / many.numel()
    assert ((shares - 0.05).abs() < 5 * (0.05 * 0.95 / many.numel()) ** 0.5).all()


def test_a_row_does_not_know_of_the_others():
    torch.manual_seed(2)
    logits = torch.randn(4, VOCAB)
    samplings = [
        Sampling(0.8, seed=5),
        Sampling(),
        Sampling(2.0, top_p=0.5, seed=6),
        Sampling(repetition_penalty=2.0),
    ]
    together, alone = [], []
    state = state_of(*samplings, prompt=[3, 4])
    for _ in range(6):
        chosen = choose(logits, state, plain=False)
        record(chosen, state, plain=False)
        together.append(chosen.tolist())
    for row, sampling in enumerate(samplings):
        own = state_of(sampling, prompt=[3, 4])
        alone.append([])
        for _ in range(6):
            chosen = choose(logits[row : row + 1], own, plain=False)
            record(chosen, own, plain=False)
            alone[-1].append(int(chosen))
    assert list(map(list, zip(*together))) == alone
    assert len(set(alone[0])) > 1 and len(set(alone[1])) == 1


def test_the_repetition_penalty_is_that_of_transformers_and_remembers():
    torch.manual_seed(3)
    logits = torch.randn(1, VOCAB)
    state = state_of(Sampling(repetition_penalty=1.7), prompt=[0, 1])
    text = [0, 1]
    for _ in range(10):
        penalised = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([text]), logits)
        chosen = choose(logits, state, plain=False)
        assert int(chosen) == int(penalised.argmax())
        record(chosen, state, plain=False)
        text.append(int(chosen))
    assert len(set(text)) > 3


@pytest.mark.parametrize("plain", [True, False])
def test_broken_logits_are_seen_in_their_row(plain):
    logits = torch.zeros(5, VOCAB)
    logits[:, 8] = 1
    logits[1, 3] = float("nan")
    logits[2, 3] = float("inf")
    logits[3] = float("-inf")
    logits[4, 3] = float("-inf")
    assert choose(logits, state_of(*[Sampling()] * 5), plain).tolist() == [8, BROKEN, BROKEN, BROKEN, 8]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1},
        {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"seed": 1 << 63}, {"seed": 1.5}, {"top_k": 2.5},
        {"top_k": True}, {"temperature": "hot"}, {"min_p": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)


def test_a_share_of_one_leaves_nothing_out():
    """One token is so likely that the sum is 1, as rounded, before the others."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 30
    assert bool((filtered(logits, state_of(Sampling(1.0)))[0] > 0).all())


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-40, 1e-46])
def test_however_low_the_temperature_the_likeliest_token_comes(temperature):
    """The last two are subnormal in fp32, and nothing at all."""
    logits = torch.arange(VOCAB).roll(40)[None] * 0.5
    assert choose(logits, state_of(Sampling(temperature)), plain=False).tolist() == [39]
