"""Tokenizers written to GGUF and read back, over bytes and sentencepiece's; transformers reads them likewise."""

import json

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, MistralConfig, PreTrainedTokenizerFast

from brise.model.checkpoint import CheckpointError, load_tokenizer, save_model
from brise.model.foreign.export import export_checkpoint
from brise.model.gguf import GGUFError, convert_gguf, open_gguf
from brise.model.gguf_tokenizer import read_tokenizer
from brise.model.mistral import MistralForCausalLM

gguf = pytest.importorskip("gguf")
SIZE = 400
TEXTS = (
    "the 12 winds",
    " he they\n\tthe  the",
    "ünïcödé 3.14 ☃<s>",
    "",
    "    blanks   in runs ",
    "the breeze</s><user>lighter",
)
PROSE = ["the breeze is lighter than the wind and the winds are lighter than the storm"] * 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model as small as may be; tests copy a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = {"vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 1, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    return save_model(MistralForCausalLM(MistralConfig(**config)), folder / "model")


def sentencepiece(prefix: bool = True) -> Tokenizer:
    """What a Mistral of the sentencepiece kind has: bytes to fall back on, runs of blanks, BOS in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, show_progress=False)
    learned.train_from_iterator(PROSE, trainer)
    model = json.loads(learned.to_str())["model"]
    for piece in sorted(model["vocab"], key=model["vocab"].get):
        pieces.append(piece)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in model["merges"]]
    made = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    blanks = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prefix else blanks
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    made.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    made.add_tokens([AddedToken("<user>", normalized=False, special=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def over_bytes(digits: bool = True, bos: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", *alphabet, "he", "Ġt", "12"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("Ġ", "t"), ("1", "2")]))
    split = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if digits else level
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken("<user>", normalized=False, special=False)])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


KINDS = {
    "sentencepiece": sentencepiece,
    "sentencepiece without a prefix": lambda: sentencepiece(prefix=False),
    "bytes": over_bytes,
    "bytes, digits together": lambda: over_bytes(digits=False),
    "bytes, bos": lambda: over_bytes(bos=True),
}


def beside(source, folder, made: Tokenizer) -> PreTrainedTokenizerFast:
    """A copy of the model with this tokenizer."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_comes_back(source, tmp_path, kind):
    before = beside(source, tmp_path / "src", KINDS[kind]())
    export_checkpoint(tmp_path / "src", tmp_path / "out", "gguf-f16")
    file = tmp_path / "out" / "out-F16.gguf"
    after = load_tokenizer(file)
    again = AutoTokenizer.from_pretrained(convert_gguf(file, tmp_path / "dense"))
    for text in TEXTS:
        ids = before(text).input_ids
        assert after(text).input_ids == again(text).input_ids == ids, text
        assert after.decode(ids) == before.decode(ids)
        assert after.decode(ids, skip_special_tokens=True) == before.decode(ids, skip_special_tokens=True)
    assert (after.bos_token_id, after.eos_token_id, after.unk_token_id) == (1, 2, 0)
    assert after.chat_template == "{{ messages }}"
    fields = open_gguf(file).fields
    assert fields["tokenizer.ggml.tokens"].contents()[SIZE - 1] == f"[PAD{SIZE - 1}]"
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[after.convert_tokens_to_ids("<user>")] == 4 and types[SIZE - 1] == 5
    assert types[1] == 3 and types.count(6) == (256 if "sentencepiece" in kind else 0)


def test_transformers_own_reader_agrees_on_sentencepiece(source, tmp_path):
    beside(source, tmp_path / "src", sentencepiece())
    export_checkpoint(tmp_path / "src", tmp_path / "out", "gguf-f16")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="out-F16.gguf")
    ours = load_tokenizer(tmp_path / "out" / "out-F16.gguf")
    for text in ("the breeze is lighter", "ünïcödé ☃ storm", "wind  and   wind"):
        assert (
            ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids
        )


def test_what_the_embedding_or_llama_cpp_has_no_place_for(source, tmp_path):
    large = over_bytes()
    large.add_tokens([f"<{i}>" for i in range(SIZE)])
    beside(source, tmp_path / "large", large)
    pairs = over_bytes()
    pairs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    beside(source, tmp_path / "pairs", pairs)
    beside(source, tmp_path / "words", Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")))
    beside(source, tmp_path / "broken", over_bytes())
    (tmp_path / "broken" / "tokenizer.json").write_text(
        '{"model": {"vocab": {"a": "b"}}, "added_tokens": [3]}'
    )
    for name, says in (
        ("large", f"the embedding only {SIZE} rows"),
        ("pairs", "name for a tokenizer that cuts text by"),
        ("words", "of type 'WordLevel' is not written"),
        ("broken", "make no tokenizer"),
    ):
        with pytest.raises(CheckpointError, match=says):
            export_checkpoint(tmp_path / name, tmp_path / "out", "gguf-f16")
        assert not (tmp_path / "out").exists()


class Field:
    def __init__(self, value):
        self.value = value

    def contents(self):
        return self.value


@pytest.mark.parametrize("change, says", [
    ({"tokens": [1, 2, 3]}, "array of strings"), ({"tokens": "abc"}, "array of strings"),
    ({"tokens": ["a", "a", "b"]}, "1 repeated"), ({"scores": [0.0]}, "a score and a type"),
    ({"token_type": None}, "a score and a type"), ({"eos_token_id": 3}, "eos_token_id is 3, there are 3"),
    ({"unknown_token_id": -1}, "unknown_token_id is -1"), ({"bos_token_id": "1"}, "bos_token_id is 1"),
    ({"model": "gpt2", "pre": "smollm", "merges": ["a x"]}, "merges of tokens into tokens, got 'a x'"),
    ({"model": "bert"}, "got 'bert'"),
])  # fmt: skip
def test_a_section_that_makes_no_tokenizer_is_refused(change, says):
    section = {
        "model": "llama",
        "tokens": ["a", "b", "ab"],
        "scores": [0.0] * 3,
        "token_type": [1] * 3,
    } | change
    fields = {f"tokenizer.ggml.{k}": Field(v) for k, v in section.items() if v is not None}
    with pytest.raises(GGUFError, match=says):
        read_tokenizer(type("Reader", (), {"fields": fields}))
