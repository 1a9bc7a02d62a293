"""Window and cache precision together: against transformers' model with that window, and a cache rounded by hand."""

import json
import shutil

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from brise.eval.evaluate import baseline_of, evaluate, make_setting
from brise.eval.memory import kv_cache_bytes
from brise.eval.surface import PRECISIONS, RoundedCache, measure_surface, round_states, variant_bytes


@pytest.fixture(scope="module")
def surface(tiny_checkpoint, tiny_text):
    setting = make_setting(tiny_checkpoint, str(tiny_text), windows=3, length=48)
    baseline = baseline_of(tiny_checkpoint, setting)
    rows = measure_surface(tiny_checkpoint, setting, baseline, [None, 8], PRECISIONS)
    return setting, {(row.variant.window, row.variant.cache): row for row in rows}


def test_a_window_is_transformers_own(surface, tiny_checkpoint):
    setting, rows = surface
    config = MistralConfig.from_pretrained(tiny_checkpoint)
    config.sliding_window = 8
    theirs = MistralForCausalLM.from_pretrained(tiny_checkpoint, config=config).eval()
    with torch.no_grad():
        nll = sum(float(theirs(x[None], labels=x[None]).loss) for x in setting.windows.ids) / 3
    assert rows[8, "model"].perplexity.nll == pytest.approx(nll, rel=1e-5)
    assert (
        rows[None, "model"].divergence.kl == pytest.approx(0, abs=1e-7)
        and rows[8, "model"].divergence.kl > 0.01
    )


def test_the_cache_is_rounded_as_it_is_stored(surface, tiny_checkpoint):
    """Every layer of transformers' model reads keys and values that were rounded by hand."""
    setting, rows = surface
    theirs = MistralForCausalLM.from_pretrained(tiny_checkpoint, attn_implementation="eager").eval()
    from transformers.models.mistral import modeling_mistral as modeling

    def coarse(x):  # one group: the head's 16 channels
        low = x.amin(-1, keepdim=True).half().float()
        scale = ((x.amax(-1, keepdim=True) - low) / 15).half().float()
        return low + ((x - low) / scale).round().clamp(0, 15) * scale

    plain = modeling.eager_attention_forward

    def rounded(module, query, key, value, *args, **kwargs):
        return plain(module, query, coarse(key), coarse(value), *args, **kwargs)

    modeling.eager_attention_forward = rounded
    try:
        with torch.no_grad():
            nll = sum(float(theirs(x[None], labels=x[None]).loss) for x in setting.windows.ids) / 3
    finally:
        modeling.eager_attention_forward = plain
    assert rows[None, "int4"].perplexity.nll == pytest.approx(nll, rel=1e-4)
    kl = {name: rows[None, name].divergence.kl for name in PRECISIONS}
    assert (
        kl["float16"] < kl["bfloat16"] < kl["int4"] and kl["int8"] < kl["int4"] and kl["float8"] < kl["int4"]
    )


def test_bytes(surface, tiny_checkpoint):
    _, rows = surface
    config = MistralConfig.from_pretrained(tiny_checkpoint)
    full = kv_cache_bytes(config, 48, dtype=torch.float32)
    size = {key: row.variant.kv_bytes for key, row in rows.items()}
    assert size[None, "model"] == full == 2 * size[None, "bfloat16"] == 4 * size[None, "float8"]
    assert size[8, "model"] == full // 6
    # 2 layers of keys and values, 2 heads, 48 tokens: 16 channels in 4 bits and two halves
    assert size[None, "int4"] == 2 * 2 * 2 * 48 * (8 + 4) and size[None, "int8"] == 2 * 2 * 2 * 48 * (16 + 4)
    wide = MistralConfig(head_dim=128, sliding_window=None, num_hidden_layers=1, num_key_value_heads=1)
    assert variant_bytes(wide, 1, "int4", torch.float16, None) == 2 * (64 + 8)
    assert all(row.memory.kv_cache == row.variant.kv_bytes for row in rows.values())


def test_each_is_a_row_of_its_own(surface, tiny_checkpoint, tiny_text):
    _, rows = surface
    assert len({row.key for row in rows.values()}) == len(rows) == 12
    assert not any(row.is_source for row in rows.values())
    assert rows[8, "int4"].name == "tiny w=8 kv=int4"
    plain = evaluate(tiny_checkpoint, text=str(tiny_text), windows=3, length=48)
    assert rows[None, "model"].perplexity == plain.perplexity


def test_own_is_the_models_window_again(tiny_checkpoint, tiny_text, tmp_path):
    """After another one; and each row has the sums of its own windows, by which it is compared."""
    folder = tmp_path / "windowed"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 12}))
    setting = make_setting(folder, str(tiny_text), windows=3, length=48)
    baseline = baseline_of(folder, setting)
    other, own = measure_surface(folder, setting, baseline, [5, None], ["model"])
    plain = evaluate(folder, baseline=baseline, text=str(tiny_text), windows=3, length=48)
    assert (own.perplexity, own.sums, own.variant.kv_bytes) == (
        plain.perplexity,
        plain.sums,
        plain.memory.kv_cache,
    )
    assert own.variant.window is None and other.variant.window == 5
    for row in (own, other):
        assert sum(row.sums.nll) / sum(row.sums.tokens) == pytest.approx(row.perplexity.nll, rel=1e-12)
        assert sum(row.sums.kl) / sum(row.sums.tokens) == pytest.approx(row.divergence.kl, rel=1e-12)
    assert other.sums != own.sums


def test_rounding():
    x = torch.tensor([[0.0, 1.0, 500.0, -3.0]])
    assert round_states(x, "float8").tolist() == [[0.0, 1.0, 448.0, -3.0]]
    assert torch.equal(round_states(torch.full((2, 64), 0.25), "int4"), torch.full((2, 64), 0.25))
    groups = torch.cat([torch.linspace(0, 15, 64), torch.linspace(0, 1500, 64)])[None]
    assert (
        float((round_states(groups, "int4")[0, :64] - groups[0, :64]).abs().max()) < 0.51
    )  # a group's own scale
    with pytest.raises(ValueError, match="expected a cache of model"):
        round_states(x, "int3")


def test_what_is_no_surface(surface, tiny_checkpoint):
    setting, _ = surface
    with pytest.raises(ValueError, match="windows of at least 1"):
        measure_surface(tiny_checkpoint, setting, None, [0], ["model"])
    with pytest.raises(ValueError, match="got 'int3'"):
        measure_surface(tiny_checkpoint, setting, None, [None], ["int3"])


def test_a_cache_goes_on_from_step_to_step(tiny_checkpoint):
    """Written token by token it gives what it gives at once."""
    from brise.model.checkpoint import load_model

    model = load_model(tiny_checkpoint)
    ids = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids, past_key_values=RoundedCache("int4", model.config), use_cache=True).logits
        cache = RoundedCache("int4", model.config)
        steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
