"""The ledger: by hand, against files on disk, and against what a real cache holds."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

from brise.eval.memory import (
    LedgerError,
    check_ledger,
    gpu_peak,
    human_bytes,
    kv_cache_bytes,
    kv_cache_grid,
    ledger_of_checkpoint,
    loaded_bytes,
    predict_ledger,
    process_peak,
    reset_peak,
)
from brise.quant.config import ConfigError, QuantConfig, QuantSpec, Rule


def config(**changes) -> MistralConfig:
    defaults = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    return MistralConfig(**{**defaults, **changes})


# weights of one block: q 64x64, k and v 32x64, o 64x64, gate and up 96x64, down 64x96
BLOCK = 64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3
PARAMETERS = 2 * (BLOCK + 2 * 64) + 64 + 100 * 64


def test_a_plain_model_by_hand():
    ledger = predict_ledger(config(), None)
    assert ledger.parameters == PARAMETERS
    assert ledger.nbytes == 2 * PARAMETERS and ledger.bits_per_weight == 16
    assert ledger.by_part() == {"linear": 4 * BLOCK, "embedding": 12800, "head": 0, "norm": 2 * 64 * 5}
    assert ledger.by_kind()["kept"] == ledger.nbytes and ledger.bits_per_quantized_weight is None
    untied = predict_ledger(config(tie_word_embeddings=False), None, dtype=torch.float32)
    assert untied.parameters == PARAMETERS + 6400 and untied.nbytes == 4 * (PARAMETERS + 6400)
    assert untied.by_part()["head"] == 25600


def test_int4_by_hand():
    spec = QuantSpec(format="int4", group_size=32, symmetric=False, scale_dtype="float16")
    ledger = predict_ledger(config(), QuantConfig((Rule(("*layers.*",), spec),)))
    codes = 2 * BLOCK // 2  # half a byte a weight
    scales = 2 * BLOCK // 32 * 2
    # zeros: 4 bits a group, a row's padded to whole bytes: rows of 64 have 2 groups, of 96 three
    zeros = 2 * ((64 * 2 + 32 * 2 + 96 * 2) * 1 + 64 * 2)
    kind = ledger.by_kind()
    assert (kind["codes"], kind["scales"], kind["zeros"]) == (codes, scales, zeros)
    assert (kind["double_quant"], kind["order"]) == (0, 0)
    assert kind["kept"] == 2 * (6400 + 64 * 5)
    assert ledger.quantized_parameters == 2 * BLOCK
    assert ledger.bits_per_quantized_weight == 8 * (codes + scales + zeros) / (2 * BLOCK)
    assert ledger.bits_per_weight == 8 * (codes + scales + zeros + kind["kept"]) / PARAMETERS
    assert sum(ledger.by_part().values()) == sum(kind.values()) == ledger.nbytes
    assert ledger.to_dict()["bytes"] == ledger.nbytes


def test_double_quantization_by_hand():
    spec = QuantSpec(format="nf4", group_size=64, double_quant=True)
    rules = QuantConfig((Rule(("*q_proj",), spec),))
    kind = predict_ledger(config(), rules).by_kind()
    # 64 rows of one group: 64 scale codes, one absmax of 256 scales, one offset; two layers
    assert (kind["codes"], kind["scales"], kind["double_quant"]) == (2 * 2048, 2 * 64, 2 * 8)


def test_a_tied_head_is_counted_once_when_quantized():
    spec = QuantSpec(format="int8")
    both = QuantConfig((Rule(("*embed_tokens", "lm_head"), spec),))
    ledger = predict_ledger(config(), both)
    assert [e.name for e in ledger.entries if e.kind == "codes"] == ["model.embed_tokens.qweight"]
    assert ledger.by_part()["head"] == 0
    untied = predict_ledger(config(tie_word_embeddings=False), both)
    assert untied.by_part()["head"] == untied.by_part()["embedding"] == 6400 + 100 * 2


def test_rules_that_do_not_fit_are_known_before_anything_runs():
    spec = QuantSpec(format="int4", group_size=48)
    with pytest.raises(ConfigError, match="no multiple of group_size 48"):
        predict_ledger(config(), QuantConfig((Rule(("*layers.*",), spec),)))
    no_dtype = config()
    no_dtype.dtype = None
    with pytest.raises(LedgerError, match="name one"):
        predict_ledger(no_dtype, None)


def save(folder, tensors, model_config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model_config.to_dict() | {"dtype": "bfloat16"}))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_prediction_and_files_agree(tied, tmp_path):
    model_config = config(tie_word_embeddings=tied)
    model = MistralForCausalLM(model_config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "whole")
    found = ledger_of_checkpoint(tmp_path / "whole")
    predicted = predict_ledger(model_config, None)
    check_ledger(predicted, found)
    assert found.nbytes == predicted.nbytes and found.parameters == predicted.parameters
    assert [entry.name for entry in found.entries] == [entry.name for entry in predicted.entries]
    model.save_pretrained(tmp_path / "shards", max_shard_size="30kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    check_ledger(predicted, ledger_of_checkpoint(tmp_path / "shards"))


def test_a_quantized_folder_and_every_way_to_differ(tmp_path):
    spec = QuantSpec(format="nf4", group_size=32)
    predicted = predict_ledger(config(), QuantConfig((Rule(("*down_proj",), spec),)))
    tensors = {e.name: torch.zeros(e.shape, dtype=e.dtype) for e in predicted.entries}
    found = ledger_of_checkpoint(save(tmp_path / "same", tensors, config()))
    check_ledger(predicted, found)
    assert found.quantized_parameters == predicted.quantized_parameters == 2 * 64 * 96
    assert found.by_kind() == predicted.by_kind() and found.by_part() == predicted.by_part()

    name = "model.layers.1.mlp.down_proj.scales"
    extra = {name + ".extra.zeros": torch.zeros(3)}
    for number, change in enumerate(
        [{name: None}, {name: tensors[name].half()}, {name: tensors[name][1:]}, extra]
    ):
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        other = ledger_of_checkpoint(save(tmp_path / str(number), changed, config()))
        with pytest.raises(LedgerError, match=r"^1 tensors .* model\.layers\.1\.mlp\.down_proj\.scales"):
            check_ledger(predicted, other)
    strange = save(tmp_path / "strange", tensors | {"model.layers.0.lookup": torch.zeros(3)}, config())
    with pytest.raises(LedgerError, match=r"model\.layers\.0\.lookup has no place"):
        ledger_of_checkpoint(strange)


def test_another_architecture_is_refused(tmp_path):
    folder = save(tmp_path / "other", {"a.weight": torch.zeros(2)}, config())
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"model_type": "gpt2"}))
    with pytest.raises(LedgerError, match="model_type mistral, got 'gpt2'"):
        ledger_of_checkpoint(folder)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kv_cache_against_a_real_one(window, dtype):
    from transformers import DynamicCache

    model_config = config(sliding_window=window)
    model = MistralForCausalLM(model_config).to(dtype).eval()
    # without a configuration the cache keeps everything; what a window needs is cut from it by hand
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.randint(100, (3, 20)), past_key_values=cache, use_cache=True)
    held = sum(
        x[:, :, -(window or 20) :].nbytes for layer in cache.layers for x in (layer.keys, layer.values)
    )
    assert kv_cache_bytes(model_config, 20, batch=3, dtype=dtype) == held
    assert kv_cache_bytes(model_config, 20) == 2 * 2 * 2 * 16 * (window or 20) * 2
    assert kv_cache_bytes(model_config, 5) == 2 * 2 * 2 * 16 * 5 * 2


def test_the_kv_cache_against_context_and_window():
    model_config = config(sliding_window=8)
    token = 2 * 2 * 2 * 16 * 2
    grid = kv_cache_grid(model_config, [4, 20], [None, 6, 100])
    assert [(cell["context"], cell["window"], cell["bytes"] // token) for cell in grid] == [
        (4, None, 4),
        (4, 6, 4),
        (4, 100, 4),
        (20, None, 8),
        (20, 6, 6),
        (20, 100, 20),
    ]
    assert model_config.sliding_window == 8


def test_loaded_bytes_counts_a_tied_weight_once():
    tied, untied = (MistralForCausalLM(config(tie_word_embeddings=t)).float() for t in (True, False))
    buffers = sum(b.nbytes for b in tied.buffers())
    assert loaded_bytes(tied) == 4 * PARAMETERS + buffers
    assert loaded_bytes(untied) == 4 * (PARAMETERS + 6400) + buffers
    one, other = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    other.weight = torch.nn.Parameter(one.weight.data)  # another parameter, the same memory
    assert loaded_bytes(torch.nn.Sequential(one, other)) == 4 * 16


def test_on_a_gpu_the_peak_is_torchs_own(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: begun.append(True))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 77)
    reset_peak()
    assert begun == [True] and gpu_peak(torch.device("cuda")) == 77


def test_the_process_peak_follows_what_was_held():
    if not reset_peak():
        pytest.skip("this system does not let a process reset its peak")
    before = process_peak()
    assert before is not None
    block = torch.ones(30_000_000)  # 120 MB
    del block
    after = process_peak()
    assert after is not None and 100e6 < after - before < 150e6
    assert before % 4096 == after % 4096 == 0  # whole pages
    assert reset_peak() and (process_peak() or after) < after - 80e6
    assert gpu_peak(torch.device("cpu")) is None


def test_human_bytes():
    assert human_bytes(134_515_008) == "135 MB (128 MiB)"
    assert human_bytes(14_484_000_000) == "14.5 GB (13.5 GiB)"
    assert human_bytes(17) == "17 B"
