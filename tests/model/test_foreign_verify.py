"""``brise verify`` finds damage of every kind that is planted here, names the module, and nothing in good folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig

from brise.model.checkpoint import save_model
from brise.model.foreign.doctor import examine
from brise.model.foreign.export import export_checkpoint
from brise.model.mistral import MistralForCausalLM
from brise.model.stream import quantize_checkpoint
from brise.quant.config import QuantConfig

PATH = "model.layers.1.mlp.up_proj"
OTHER = "model.layers.0.mlp.up_proj"
RULES = {
    "sym": {"format": "int4", "group_size": 32},
    "asym": {"format": "int4", "group_size": 32, "symmetric": False},
    "order": {
        "format": "int4",
        "group_size": 32,
        "algorithm": "gptq",
        "options": {"act_order": True, "static_groups": False},
    },
    "nf4-dq": {"format": "nf4", "double_quant": True},
    "nf4": {"format": "nf4"},
    "row8": {"format": "int8"},
}
# folder -> (source of ours, format)
FOLDERS = {
    "ours": ("sym", None),
    "ours-dq": ("nf4-dq", None),
    "gptq": ("sym", "gptq"),
    "gptq_v2": ("sym", "gptq_v2"),
    "gptq-asym": ("asym", "gptq_v2"),
    "gptq-order": ("order", "gptq"),
    "awq": ("asym", "awq"),
    "ct": ("sym", "compressed-tensors"),
    "bnb": ("nf4", "bitsandbytes"),
    "bnb-dq": ("nf4-dq", "bitsandbytes"),
    "bnb-int8": ("row8", "bitsandbytes-int8"),
    "gguf": ("sym", "gguf-q4_0"),
    "gguf-min": ("asym", "gguf-q4_1"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=None,
            initializer_range=0.1,
        )
    )
    save_model(model, root / "source")
    for name, rule in RULES.items():
        config = QuantConfig.from_dict({"rules": [{"match": "*layers.*", **rule}]})
        ids = torch.arange(64).view(4, 16) if config.needs_calibration else None
        quantize_checkpoint(root / "source", root / name, config, calibration=ids)
    for name, (source, format) in FOLDERS.items():
        if format is None:
            shutil.copytree(root / source, root / name)
        else:
            export_checkpoint(root / source, root / name, format)
    return root


@pytest.mark.parametrize("name", [*FOLDERS, "source"])
def test_nothing_is_wrong_with_a_good_folder(good, name):
    for against in (None, good / "source"):
        found = examine(good / name, against)
        assert found.findings == []
    assert found.modules == (0 if name == "source" else 14) == len(found.errors)
    assert all(0 < error < 0.05 for error in found.errors.values())


def tensors(change):
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        stored = {n: t.clone() for n, t in load_file(file).items()}
        change(stored)
        save_file(stored, file)

    return damage


def config(change):
    def damage(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        change(data)
        (folder / "config.json").write_text(json.dumps(data))

    return damage


def put(leaf: str, where, value):
    """One module's tensor with ``value`` (a number, or a function of what was there) at ``where``."""

    def change(stored):
        tensor = stored[f"{PATH}.{leaf}"]
        tensor[where] = value(tensor[where]) if callable(value) else value

    return tensors(change)


def swap(*leaves: str):
    def change(stored):
        for leaf in leaves:
            a, b = f"{PATH}.{leaf}", f"{OTHER}.{leaf}"
            stored[a], stored[b] = stored[b], stored[a]

    return tensors(change)


def setting(**new):
    return config(lambda data: data["quantization_config"].update(new))


def state(old: bytes, new: bytes):
    def change(stored):
        name = f"{PATH}.weight.quant_state.bitsandbytes__nf4"
        text = bytes(stored[name].tolist())
        assert old in text
        stored[name] = torch.tensor(list(text.replace(old, new)), dtype=torch.uint8)

    return tensors(change)


def block(kind: str, at: int, data: bytes):
    """Bytes of one block (row 3, the second of the row) of the module's weight in a GGUF file."""

    def damage(folder: Path) -> None:
        gguf = pytest.importorskip("gguf")
        file = next(folder.glob("*.gguf"))
        stored = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        offset = int(stored.data_offset) + (3 * 2 + 1) * size + at
        raw = bytearray(file.read_bytes())
        raw[offset : offset + len(data)] = data
        file.write_bytes(raw)

    return damage


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop(leaf: str):
    return tensors(lambda stored: stored.pop(f"{PATH}.{leaf}"))


def replace(leaf: str, made):
    return tensors(lambda stored: stored.update({f"{PATH}.{leaf}": made(stored[f"{PATH}.{leaf}"])}))


def nibbles(t: torch.Tensor) -> torch.Tensor:
    return (t << 4) | (t >> 4)


# what: (folder, damage, against the source?, said, the module named)
DAMAGE = {
    "a scale is NaN": ("ours", put("scales", (3, 1), float("nan")), False, "NaN", PATH),
    "a scale is infinite": ("gptq", put("scales", (1, 3), float("inf")), False, "infinite", PATH),
    "a scale is zero": ("awq", put("scales", (1, 3), 0.0), False, "scales are 0", PATH),
    "an exponent's bit flipped": (
        "ct",
        put("weight_scale", (5, 0), lambda s: s * 2**14),
        False,
        "median",
        PATH,
    ),
    "rows are missing": ("ours", replace("qweight", lambda t: t[:-8].clone()), False, "config", PATH),
    "channels are missing": ("gptq", replace("qweight", lambda t: t[:-1].clone()), False, "holds", PATH),
    "a tensor is missing": ("gptq", drop("qzeros"), False, "has no qzeros", PATH),
    "a tensor is left over": (
        "awq",
        tensors(lambda s: s.update({f"{PATH}.g_idx": torch.zeros(64, dtype=torch.int32)})),
        False,
        "has g_idx",
        PATH,
    ),
    "another dtype": ("gptq", replace("qweight", lambda t: t.long()), False, "int64", PATH),
    "codes are lost": (
        "ours",
        put("qweight", (slice(2, 9), slice(0, 16)), 0),
        False,
        "codes are the same",
        PATH,
    ),
    "words are lost": ("gptq", put("qweight", (slice(0, 4), 7), 0), False, "codes are the same", PATH),
    "version 2 called 1": ("gptq_v2", setting(checkpoint_format="gptq"), False, "label is wrong", None),
    "version 1 called 2": ("gptq", setting(checkpoint_format="gptq_v2"), False, "label is wrong", None),
    "zeros minus one": (
        "gptq-asym",
        put("qzeros", slice(None), lambda z: z - 0x11111111),
        False,
        "zero points lie",
        PATH,
    ),
    "asymmetric called symmetric": ("gptq-asym", setting(sym=True), False, "says symmetric", None),
    "g_idx beyond the groups": ("gptq-order", put("g_idx", 5, 2), False, "must be 0..1", PATH),
    "g_idx of uneven groups": ("gptq-order", put("g_idx", slice(0, 40), 1), False, "channels each", PATH),
    "an order that is not declared": (
        "gptq",
        put("g_idx", slice(None), lambda g: g.flip(0)),
        False,
        "desc_act is false",
        PATH,
    ),
    "bits of another file": ("gptq", setting(bits=8), False, "bits 8", None),
    "groups of another file": (
        "ct",
        config(
            lambda d: d["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=64)
        ),
        False,
        "no group",
        None,
    ),
    "weight_shape": ("ct", put("weight_shape", 0, 64), False, "weight_shape", PATH),
    "another table of values": ("bnb", put("weight.quant_map", 3, -0.5), False, "not the table", PATH),
    "another nested table": ("bnb-dq", put("weight.nested_quant_map", 9, 0.5), False, "dynamic map", PATH),
    "a nested absmax is NaN": ("bnb-dq", put("weight.nested_absmax", 0, float("nan")), False, "NaN", PATH),
    "the state's shape": ("bnb", state(b"[128, 64]", b"[64, 128]"), False, "config.json asks for", PATH),
    "the state is no JSON": ("bnb", state(b"{", b"["), False, "no JSON", PATH),
    "an absmax is negative": ("bnb", put("weight.absmax", 9, lambda a: -a), False, "negative", PATH),
    "SCB is NaN": ("bnb-int8", put("SCB", 2, float("nan")), False, "NaN", PATH),
    "the file is cut short": ("gptq", cut, False, "truncated", None),
    "a norm is NaN": (
        "gptq",
        tensors(lambda s: s["model.norm.weight"].__setitem__(3, float("nan"))),
        False,
        "1 values are NaN",
        "model.norm",
    ),
    "heads of another model": (
        "gptq",
        config(lambda d: d.update(num_key_value_heads=4)),
        False,
        "asks for",
        None,
    ),
    "blocks of another model": (
        "awq",
        config(lambda d: d.update(num_hidden_layers=3)),
        False,
        "2 blocks",
        None,
    ),
    "a norm is lost": (
        "ct",
        tensors(lambda s: s["model.norm.weight"].zero_()),
        False,
        "is all zeros",
        "model.norm",
    ),
    "a norm is missing": (
        "awq",
        tensors(lambda s: s.pop("model.norm.weight")),
        False,
        "has it, the folder does not",
        "model.norm",
    ),
    "a block too many": (
        "ours",
        tensors(lambda s: s.update({"model.layers.1.mlp.gate.weight": torch.ones(4, 64)})),
        False,
        "the model of config.json does not",
        "model.layers.1.mlp.gate",
    ),
    "a kept weight of integers": (
        "gptq",
        tensors(lambda s: s.update({"lm_head.weight": s["lm_head.weight"].mul(100).to(torch.int8)})),
        False,
        "is torch.int8, expected floats",
        "lm_head",
    ),
    "a block's scale is NaN": ("gguf", block("Q4_0", 0, b"\x00\x7e"), False, "1 scales are NaN", PATH),
    "a block's bytes are lost": ("gguf", block("Q4_0", 2, bytes(16)), False, "codes are the same", PATH),
    "a block of minimums is lost": (
        "gguf-min",
        block("Q4_1", 4, bytes(16)),
        False,
        "codes are the same",
        PATH,
    ),
    "a block's exponent": ("gguf-min", block("Q4_1", 0, b"\x00\x7b"), False, "times the median", PATH),
    "scales of another size": (
        "ours",
        put("scales", slice(None), lambda s: s * 1.5),
        True,
        "differs from the source",
        PATH,
    ),
    "nibbles the other way round": (
        "ours-dq",
        replace("qweight", nibbles),
        True,
        "differs from the source",
        PATH,
    ),
    # far below what rounding to 8 bits may do, and far above what it did elsewhere
    "rows a little too large": (
        "bnb-int8",
        put("SCB", slice(0, 4), lambda s: s * 1.15),
        True,
        "of the others",
        PATH,
    ),
    "two modules exchanged": ("gptq", swap("qweight", "scales"), True, "differs from the source", PATH),
    "columns in plain order": (
        "awq",
        replace("qweight", lambda t: t.roll(1, 1)),
        True,
        "differs from the source",
        PATH,
    ),
    "a kept weight was touched": (
        "gptq",
        tensors(lambda s: s["lm_head.weight"].__setitem__((2, 3), 1.0)),
        True,
        "is not quantized and yet differs",
        "lm_head",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_its_module_named(good, tmp_path, case):
    name, damage, needs_source, says, module = DAMAGE[case]
    folder = tmp_path / "damaged"
    shutil.copytree(good / name, folder)
    damage(folder)
    found = examine(folder, good / "source" if needs_source else None)
    assert any(says in finding.what for finding in found.findings), [str(f) for f in found.findings]
    if module is not None:
        assert module in {f.module for f in found.findings if says in f.what}
        allowed = {module, OTHER} if case == "two modules exchanged" else {module}
        assert {f.module for f in found.findings} <= allowed, [str(f) for f in found.findings]
    if needs_source:
        assert examine(folder).healthy, "this damage shows only against the source"


@pytest.mark.parametrize("change, says", [
    (lambda s: s.update({"lm_head.weight": torch.ones(32, 64)}), "is [64, 64], in the source [32, 64]"),
    (lambda s: s.pop(f"{PATH}.weight"), "the source has no such weight"),
    (lambda s: s.update({f"{PATH}.weight": torch.ones(64, 64)}), "is [128, 64], in the source [64, 64]"),
])  # fmt: skip
def test_a_source_of_another_model_is_noticed(good, tmp_path, change, says):
    shutil.copytree(good / "source", tmp_path / "source")
    tensors(change)(tmp_path / "source")
    found = examine(good / "gptq", tmp_path / "source")
    module = "lm_head" if "32" in says else PATH
    assert [str(f) for f in found.findings] == [f"{module}: {says}"]


def test_every_module_is_as_far_from_another_source(good, tmp_path):
    """All errors alike: none stands out, so it is the bound of the format that finds them."""
    shutil.copytree(good / "source", tmp_path / "source")
    tensors(lambda s: [t.mul_(-1) for n, t in s.items() if ".layers." in n and t.ndim == 2])(
        tmp_path / "source"
    )
    found = examine(good / "gptq", tmp_path / "source").findings
    assert len(found) == 14 and all("differs from the source" in f.what for f in found)
