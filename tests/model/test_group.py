"""Several processes at one job, as threads here: what each gathers is added up wherever anything is solved."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from brise.model import stream
from brise.model.reader import CheckpointReader
from brise.model.stream import quantize_checkpoint
from brise.model.trouble import Policy
from brise.quant.config import QuantConfig, QuantSpec, Rule
from brise.quant.gptq import gptq
from brise.quant.presets import PRESETS

IDS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))
INT4 = QuantSpec(format="int4", group_size=32, algorithm="gptq")


class Threads:
    """A group whose processes are threads of this one."""

    def __init__(self, world):
        self.world = world
        self.barrier = threading.Barrier(world, timeout=60)
        self.values = [None] * world
        self.local = threading.local()

    @property
    def rank(self):
        return self.local.rank

    def gather(self, value):
        self.values[self.rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def all_reduce(self, tensor):
        tensor.copy_(sum(self.gather(tensor.clone())))

    def run(self, job):
        def one(rank):
            self.local.rank = rank
            try:
                return job()
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(one, range(self.world)))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(
        vocab_size=64, num_hidden_layers=2, tie_word_embeddings=False, initializer_range=0.2, **shape
    )
    folder = tmp_path_factory.mktemp("untied") / "src"
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("at_once, target", [(False, "full"), (False, "quantized"), (True, "quantized")])
def test_every_hessian_is_the_sum_of_all_windows(untied, tmp_path, monkeypatch, at_once, target):
    """The head's and the blocks', whatever the order of the sums: else the processes come to different weights."""
    calibration = dataclasses.replace(
        PRESETS["gptq-nf4"].calibration, true_sequential=not at_once, target=target
    )
    config = QuantConfig((Rule(("*layers.*", "lm_head"), INT4),), calibration)
    group = Threads(2)
    monkeypatch.setattr(stream, "current_group", lambda: group)
    out = tmp_path / "two"
    reports = group.run(lambda: quantize_checkpoint(untied, out, config, calibration=IDS))
    assert reports[0].to_dict() == reports[1].to_dict()
    monkeypatch.undo()
    one = quantize_checkpoint(untied, tmp_path / "one", config, calibration=IDS)
    for a, b in zip(one.outcomes, reports[0].outcomes, strict=True):
        if a.output_error is not None and "layers.1" not in a.path:
            assert b.output_error == pytest.approx(a.output_error, rel=0.2), a.path


def test_the_first_hessian_is_the_one_of_all_windows(untied, tmp_path, monkeypatch):
    """q of the first block sees what no quantization came before: GPTQ under X^T X of every window, and not of some."""
    calibration = dataclasses.replace(PRESETS["gptq-nf4"].calibration, target="quantized")
    config = QuantConfig((Rule(("*layers.0.self_attn.q_proj",), INT4),), calibration)
    group = Threads(4)
    monkeypatch.setattr(stream, "current_group", lambda: group)
    group.run(lambda: quantize_checkpoint(untied, tmp_path / "q", config, calibration=IDS, policy=Policy()))
    model = MistralForCausalLM.from_pretrained(untied)
    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(IDS)).flatten(0, 1).double()
    wanted = gptq(layer.self_attn.q_proj.weight.detach(), INT4, (x.t() @ x).float())
    got = CheckpointReader(tmp_path / "q")
    for name, tensor in wanted.tensors.items():
        assert torch.equal(got.tensor(f"model.layers.0.self_attn.q_proj.{name}"), tensor)
