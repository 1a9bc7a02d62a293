"""Whole checkpoints in other libraries' formats: written, read back to the same model, refused where that fails."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig

from brise.model.checkpoint import CheckpointError, load_model, save_model
from brise.model.foreign.export import export_checkpoint, plan_export
from brise.model.foreign.formats import FORMATS
from brise.model.foreign.plan import Verdict
from brise.model.mistral import MistralForCausalLM
from brise.quant.apply import quantize_model
from brise.quant.config import QuantConfig
from brise.quant.linear import QuantLinear

IDS = torch.arange(12)[None] * 7 % 40
BODY = "*layers.*"
CONFIGS = {
    "int4": [{"match": BODY, "format": "int4", "group_size": 32}],
    "asym": [{"match": BODY, "format": "int4", "group_size": 32, "symmetric": False}],
    "row8": [{"match": BODY, "format": "int8"}],
    "int3": [{"match": BODY, "format": "int3", "group_size": 32}],
    "nf4": [{"match": BODY, "format": "nf4"}],
    "nf4-dq": [{"match": BODY, "format": "nf4", "double_quant": True}],
    "mixed": [
        {"match": "*down_proj", "format": "int8", "group_size": 32},
        {"match": "*layers.0.*q_proj", "keep": True},
        {"match": BODY, "format": "int4", "group_size": 32},
    ],
    "all": [{"match": "*", "format": "int4", "group_size": 32}],
}
LOSSLESS = [
    ("int4", "gptq"),
    ("int4", "gptq_v2"),
    ("int4", "awq"),
    ("int4", "compressed-tensors"),
    ("asym", "gptq_v2"),
    ("asym", "awq"),
    ("asym", "compressed-tensors"),
    ("row8", "gptq"),
    ("row8", "bitsandbytes-int8"),
    ("row8", "compressed-tensors"),
    ("int3", "gptq"),
    ("nf4", "bitsandbytes"),
    ("nf4-dq", "bitsandbytes"),
    ("mixed", "gptq"),
    ("mixed", "compressed-tensors"),
    ("all", "gptq"),
]


def tiny(tied: bool = False, dtype: torch.dtype = torch.float32) -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return MistralForCausalLM(config).to(dtype)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """One folder of ours for every config, and the model they come from."""
    root = tmp_path_factory.mktemp("sources")
    save_model(tiny(), root / "dense")
    for name, rules in CONFIGS.items():
        model = tiny(tied=name == "all")
        quantize_model(model, QuantConfig.from_dict({"rules": rules}))
        save_model(model, root / name)
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The decoded weight of every quantized Linear."""
    model = load_model(folder)
    return {p: m.quantized().dequantize() for p, m in model.named_modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("name, format", LOSSLESS)
def test_what_is_called_lossless_comes_back_to_the_bit(sources, tmp_path, name, format):
    plan = export_checkpoint(sources / name, tmp_path / "out", format)
    assert plan.lossless and "lossless" in plan.describe()
    before, after = weights(sources / name), weights(tmp_path / "out")
    kept = {path for path in before if ".layers." in path}
    assert set(after) == kept and len(kept) >= 13
    assert all(torch.equal(before[path], after[path]) for path in kept)
    logits = [load_model(folder)(IDS).logits for folder in (sources / name, tmp_path / "out")]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == FORMATS[format].entry.__name__.replace(
        "bits4", "bitsandbytes"
    ).replace("int8", "bitsandbytes").replace("gptq_1", "gptq").replace("gptq_2", "gptq").replace("_", "-")


@pytest.mark.parametrize("name, format", [(n, f) for n, f in LOSSLESS if n not in ("all", "int3")])
def test_a_folder_of_theirs_becomes_any_other_and_ours_again(sources, tmp_path, name, format):
    """theirs -> every format that holds it -> theirs again: the same bytes."""
    export_checkpoint(sources / name, tmp_path / "first", format)
    others = [f for n, f in LOSSLESS if n == name and f != format] or [format]
    export_checkpoint(tmp_path / "first", tmp_path / "other", others[0])
    export_checkpoint(tmp_path / "other", tmp_path / "again", format)
    first, again = (load_file(tmp_path / f / "model.safetensors") for f in ("first", "again"))
    assert set(first) == set(again)
    assert all(torch.equal(first[n], again[n]) and first[n].dtype == again[n].dtype for n in first)
    entries = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("first", "again")]
    assert entries[0] == entries[1]
    save_model(load_model(tmp_path / "first"), tmp_path / "ours")
    before, ours = weights(sources / name), weights(tmp_path / "ours")
    assert all(torch.equal(before[path], ours[path]) for path in before)


def test_scales_that_are_rounded_are_announced_with_how_much(sources, tmp_path):
    model = tiny(dtype=torch.bfloat16)
    quantize_model(model, QuantConfig.from_dict({"rules": CONFIGS["int4"]}))
    save_model(model, tmp_path / "src")
    said = []
    plan = export_checkpoint(
        tmp_path / "src", tmp_path / "out", "compressed-tensors", announce=lambda p: said.append(p.describe())
    )
    assert not plan.lossless and {step.verdict for step in plan.steps} == {Verdict.ROUNDED}
    assert said == [plan.describe()] and f"{plan.rounding:.2e}" in said[0]
    before, after = (
        load_file(tmp_path / "src/model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    worst = max(
        float(((after[n.replace(".scales", ".weight_scale")].float() - t.float()) / t.float()).abs().max())
        for n, t in before.items()
        if n.endswith(".scales")
    )
    assert plan.rounding == pytest.approx(worst, rel=1e-6) and 0 < worst <= 2**-8


@pytest.mark.parametrize(
    "name, format, why",
    [
        ("nf4", "gptq", "not nf4"),
        ("asym", "gptq", "gptq_v2 holds them"),
        ("int4", "bitsandbytes", "nf4 and fp4"),
        ("row8", "awq", "4 bits"),
        ("int4", "bitsandbytes-int8", "one scale a row"),
        ("dense", "gptq", "not quantized"),
    ],
)
def test_what_needs_new_codes_is_refused_unless_asked_for(sources, tmp_path, name, format, why):
    with pytest.raises(CheckpointError, match=rf"{why}.*--requantize"):
        export_checkpoint(sources / name, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []
    plan = export_checkpoint(sources / name, tmp_path / "out", format, requantize=True)
    assert len(plan.of(Verdict.REQUANTIZED)) == 14 and not plan.lossless
    after = weights(tmp_path / "out")
    exact = dict(tiny().named_parameters())
    for path, weight in after.items():
        error = (weight - exact[f"{path}.weight"]).norm() / exact[f"{path}.weight"].norm()
        assert error < 0.2, path


def test_zero_points_that_newer_loaders_refuse_are_announced(sources):
    """Seen by tests/interop: 0.20 makes its empty model with zero points that are not packed."""
    assert "up to 0.17" in plan_export(sources / "asym", "compressed-tensors").describe()
    assert not plan_export(sources / "int4", "compressed-tensors").notes
    assert not plan_export(sources / "asym", "gptq_v2").notes


def test_embedding_and_head_are_decoded(sources, tmp_path):
    plan = export_checkpoint(sources / "all", tmp_path / "out", "gptq")
    assert [s.path for s in plan.of(Verdict.DECODED)] == ["model.embed_tokens"]
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    table = load_model(sources / "all").model.embed_tokens
    assert torch.equal(stored, table.quantized().dequantize())


def test_modules_of_their_own_kind_are_named_in_the_config(sources, tmp_path):
    for format in ("gptq", "compressed-tensors"):
        export_checkpoint(sources / "mixed", tmp_path / format, format)
    gptq = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert gptq["bits"] == 4 and gptq["group_size"] == 32 and gptq["sym"] is True
    assert gptq["dynamic"] == {
        r"-:^model\.layers\.0\.self_attn\.q_proj$": {},
        r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": 32},
        r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 8, "group_size": 32},
    }
    theirs = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    groups = theirs["config_groups"].values()
    assert sorted(len(g["targets"]) for g in groups) == [2, 11]
    assert theirs["ignore"] == ["lm_head", "model.layers.0.self_attn.q_proj"]
    with pytest.raises(CheckpointError, match="re-quantization"):
        plan = plan_export(sources / "mixed", "awq")
        assert len(plan.of(Verdict.REQUANTIZED)) == 2
        export_checkpoint(sources / "mixed", tmp_path / "awq", "awq")


def test_the_model_card_says_what_it_is_and_how_to_load_it(sources, tmp_path):
    (tmp_path / "src").mkdir()
    for file in (sources / "int4").iterdir():
        (tmp_path / "src" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "src" / "LICENSE").write_text("Do as you like.")
    (tmp_path / "src" / "README.md").write_text("---\nlicense: mit\nbase_model: someone/tiny\n---\nText.\n")
    export_checkpoint(
        tmp_path / "src", tmp_path / "tiny-gptq", "gptq", figures="| perplexity |\n|--|\n| 3.2 |"
    )
    card = (tmp_path / "tiny-gptq" / "README.md").read_text()
    assert card.startswith(
        "---\nbase_model: someone/tiny\nbase_model_relation: quantized\nlibrary_name: transf"
    )
    for part in ("license: mit", "int4, group 32, scales float16", "lossless", "| 3.2 |", "GPTQModel.load",
                 'LLM("tiny-gptq")', "load_model", "someone/tiny: see LICENSE."):  # fmt: skip
        assert part in card, part
    assert (tmp_path / "tiny-gptq" / "LICENSE").read_text() == "Do as you like."
    export_checkpoint(sources / "int4", tmp_path / "plain", "gptq")
    plain = (tmp_path / "plain" / "README.md").read_text()
    assert "Nothing was measured" in plain and "named none" in plain


def test_a_stopped_export_leaves_nothing(sources, tmp_path, monkeypatch):
    def stop(path: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(sources / "int4", tmp_path / "out", "gptq", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_names_of_gptqmodel_for_bitsandbytes_are_read(sources, tmp_path):
    export_checkpoint(sources / "nf4-dq", tmp_path / "out", "bitsandbytes")
    file = tmp_path / "out" / "model.safetensors"
    renamed = {
        n.replace(".weight.quant_state.bitsandbytes__nf4", ".weight_quant_state").replace(
            ".weight.", ".weight_"
        ): t
        for n, t in load_file(file).items()
    }
    assert "model.layers.0.mlp.up_proj.weight_nested_absmax" in renamed
    save_file(renamed, file)
    before, after = weights(sources / "nf4-dq"), weights(tmp_path / "out")
    assert all(torch.equal(before[path], after[path]) for path in before)


def test_blocks_that_reach_over_rows_are_shown_decoded(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    dense = save_model(tiny(), tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    path = "model.layers.0.mlp.down_proj"
    w = tensors.pop(f"{path}.weight")[:, :96].contiguous()
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    extra = {f"{path}.weight.{n}": t for n, t in state.as_dict(packed=True).items()}
    save_file({**tensors, f"{path}.weight": packed, **extra}, dense / "model.safetensors")
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (dense / "config.json").write_text(json.dumps(config))
    plan = plan_export(dense, "bitsandbytes")
    assert [(s.path, s.verdict, s.spec) for s in plan.steps] == [(path, Verdict.REQUANTIZED, None)]
    assert dataclasses.asdict(plan)["format"] == "bitsandbytes"
