"""Speed: the statistics by hand, and what is timed by a model with a clock of its own."""

import gc
import mmap

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from brise.eval import speed
from brise.eval.speed import SpeedProtocol, measure_speed, rate


def tiny() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=None,
        )
    )


def test_rate_by_hand():
    # 100 tokens in 1, 2, 4, 5 and 10 seconds: 100, 50, 25, 20, 10 a second
    got = rate(100, [1.0, 2.0, 4.0, 5.0, 10.0])
    # linear between neighbours: 10 + 0.8 * 10 and 50 + 0.2 * 50
    assert (got.median, got.p20, got.p80) == pytest.approx((25, 18, 60))
    assert rate(3, [2.0]) == speed.Rate(1.5, 1.5, 1.5)


def test_what_is_timed(monkeypatch):
    """The clock advances by 1 a prompt token and by 10 a decoded one, far more in the repetitions not to be timed."""
    clock = [0.0]
    monkeypatch.setattr(speed, "_now", lambda device: clock[0])
    model, calls, plain = tiny(), [], MistralForCausalLM.forward

    def forward(self, input_ids, **kwargs):
        calls.append(tuple(input_ids.shape))
        warming_up = len(calls) <= 2 * 5
        clock[0] += (input_ids.shape[1] if input_ids.shape[1] > 1 else 10) * (100 if warming_up else 1)
        seen = kwargs["past_key_values"].get_seq_length() if kwargs.get("past_key_values") else 0
        out = plain(self, input_ids=input_ids, **kwargs)
        assert out.past_key_values.get_seq_length() == seen + input_ids.shape[1]
        assert out.logits.shape == (3, 1, 50)
        return out

    monkeypatch.setattr(MistralForCausalLM, "forward", forward)
    seen = []
    protocol = SpeedProtocol(prompt=20, new_tokens=4, batch=3, warmup=2, repeats=3)
    got = measure_speed(model, protocol, progress=lambda *step: seen.append(step))
    assert calls == ([(3, 20)] + [(3, 1)] * 4) * 5
    assert got.prefill == rate(60, [20.0] * 3) and got.prefill.median == pytest.approx(3)
    assert got.decode == rate(12, [40.0] * 3)
    assert (got.prompt, got.new_tokens, got.batch, got.repeats) == (20, 4, 3, 3)
    assert seen == [("speed", i, 5) for i in range(1, 6)]


def test_decoding_goes_on_as_generate_does():
    model = tiny().eval()
    tokens = []
    plain = model.forward

    def forward(**kwargs):
        tokens.append(kwargs["input_ids"])
        return plain(**kwargs)

    model.forward = forward
    measure_speed(model, SpeedProtocol(prompt=9, new_tokens=5, warmup=0, repeats=1), seed=3)
    model.forward = plain
    prompt = tokens[0]
    expected = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.cat(tokens[1:], dim=1).tolist() == expected[:, 9:].tolist()


def test_real_times_are_positive_and_ordered():
    got = measure_speed(tiny(), SpeedProtocol(prompt=8, new_tokens=2, warmup=1, repeats=3))
    for r in (got.prefill, got.decode):
        assert 0 < r.p20 <= r.median <= r.p80


@pytest.mark.parametrize("field", ["prompt", "new_tokens", "batch", "repeats"])
def test_protocols_that_time_nothing(field):
    with pytest.raises(ValueError, match=f"expected {field} of at least 1, got 0"):
        SpeedProtocol(**{field: 0})
    with pytest.raises(ValueError, match="warmup"):
        SpeedProtocol(warmup=-1)


def test_a_grid_of_speeds_says_what_a_step_must_read(tiny_checkpoint):
    from brise.eval.memory import kv_cache_bytes
    from brise.eval.speed import measure_speeds
    from brise.model.checkpoint import load_model

    model = load_model(tiny_checkpoint)
    protocol = SpeedProtocol(new_tokens=2, warmup=0, repeats=2)
    seen = []
    points = measure_speeds(model, (1, 3), (4, 16), protocol, progress=lambda *s: seen.append(s))
    assert [(p.batch, p.context) for p in points] == [(1, 4), (1, 16), (3, 4), (3, 16)]
    assert seen[-1] == ("speeds", 4, 4)
    weights = sum(p.nbytes for p in model.parameters())  # the embedding is the head: it is read
    rotary = sum(b.nbytes for b in model.buffers())
    for point in points:
        cache = kv_cache_bytes(model.config, point.context + 1, batch=point.batch)
        assert point.bytes_a_step == weights + rotary + cache
        assert point.bandwidth == pytest.approx(point.bytes_a_step * point.decode.median / point.batch)


def test_an_embedding_that_is_no_head_is_not_read():
    from brise.eval.memory import kv_cache_bytes
    from brise.eval.speed import measure_speeds

    model = tiny().to(torch.bfloat16)  # untied
    (point,) = measure_speeds(model, (2,), (4,), SpeedProtocol(new_tokens=4, warmup=0, repeats=1))
    names = dict(model.named_parameters())
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(names)
    read = sum(p.nbytes for name, p in names.items() if "embed_tokens" not in name)
    read += sum(b.nbytes for b in model.buffers())
    # keys and values in the model's precision; over four steps the cache holds 6 tokens on the average
    assert point.bytes_a_step == read + kv_cache_bytes(model.config, 6, batch=2, dtype=torch.bfloat16)


def test_on_a_gpu_the_clock_waits(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    assert speed._now(torch.device("cuda")) > 0 and waited == [torch.device("cuda")]


def test_each_peak_is_of_its_phase_alone(monkeypatch):
    """Memory that grows by 1000 a token of a prompt and by 10 a step, and was far higher before."""
    from brise.eval import memory_peaks

    peak, steps = [10**6], []

    def reset():
        peak[0] = 0
        return True

    monkeypatch.setattr(memory_peaks, "process_peak", lambda: peak[0])
    monkeypatch.setattr(memory_peaks, "reset_peak", reset)
    plain = MistralForCausalLM.forward

    def forward(self, input_ids, **kwargs):
        steps.append(tuple(input_ids.shape))
        prompt = input_ids.shape[1] > 1
        peak[0] = max(peak[0], 1000 * input_ids.shape[1] if prompt else 10 * (len(steps) - 1))
        return plain(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(MistralForCausalLM, "forward", forward)
    found = memory_peaks.measure_peaks(tiny(), 5, 20, 4)
    assert found == memory_peaks.Peaks(5, 20_000, 40, 20, 4)
    assert steps == [(1, 20)] + [(1, 1)] * 4
    monkeypatch.setattr(memory_peaks, "reset_peak", lambda: False)
    assert memory_peaks.measure_peaks(tiny(), 5, 20, 4) == memory_peaks.Peaks(None, None, None, 20, 4)
    monkeypatch.setattr(memory_peaks, "gpu_peak", lambda device: 7)
    assert memory_peaks.current_peak(torch.device("cuda")) == 7
    assert memory_peaks.current_peak(torch.device("cpu")) == peak[0] != 7


def test_peaks_are_of_their_phase(tiny_checkpoint):
    from brise.eval.memory_peaks import measure_peaks
    from brise.model.checkpoint import load_model

    model = load_model(tiny_checkpoint)
    gc.collect()  # what tests before this one left may be given back between the two measurements
    peaks = measure_peaks(model, 123, 64, 2)
    assert (peaks.prompt, peaks.new_tokens) == (64, 2)
    if peaks.prefill is None:
        pytest.skip("this system does not let a process's peak begin anew")
    assert peaks.load == 123 and peaks.prefill > 10**6 and peaks.decode > 10**6
    # pages of its own: what an allocator gives may have been freed, and still be resident
    held = torch.frombuffer(mmap.mmap(-1, 200_000_000), dtype=torch.uint8).fill_(1)
    with_more = measure_peaks(model, None, 64, 2)
    assert with_more.prefill - peaks.prefill > 150_000_000
    del held
