"""Sensitivities: against one backward pass through the whole model, and against divergences that are measured."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from brise.eval.divergence import token_kl
from brise.eval.sensitivity import measure_sensitivities
from brise.model.checkpoint import load_model
from brise.model.source import open_source
from brise.quant.config import QuantSpec
from brise.quant.gptq import gptq
from brise.quant.rtn import rtn

IDS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(3))
SPECS = {f"int{bits}": QuantSpec(format=f"int{bits}", group_size=32) for bits in (3, 4, 8)}
SPECS["gptq"] = QuantSpec(format="int4", group_size=32, algorithm="gptq")


@pytest.fixture(scope="module")
def losses(tiny_checkpoint, tmp_path_factory):
    return measure_sensitivities(open_source(tiny_checkpoint), IDS, SPECS, tmp_path_factory.mktemp("cache"))


def test_equals_a_backward_pass_through_the_whole_model(tiny_checkpoint, losses):
    """The same tokens drawn; every Linear's inputs and gradients kept for all tokens at once."""
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    inputs: dict[str, list[torch.Tensor]] = {n: [] for n in linears}
    gradients: dict[str, list[torch.Tensor]] = {n: [] for n in linears}
    for window in IDS.split(1):
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def hook(module, inputs, output, seen=seen):
            output.retain_grad()
            seen[module.name] = (inputs[0].detach(), output)

        handles = []
        for name, module in linears.items():
            module.name = name
            handles.append(module.register_forward_hook(hook))
        log_p = model(window).logits[0].log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, drawn).sum().backward()
        for handle in handles:
            handle.remove()
        for name, (x, out) in seen.items():
            inputs[name].append(x.flatten(0, -2))
            gradients[name].append(out.grad.flatten(0, -2))
    for name in linears:
        w, x, g = linears[name].weight.detach(), torch.cat(inputs[name]), torch.cat(gradients[name])
        for key, spec in SPECS.items():
            q = gptq(w, spec, x.T @ x) if spec.needs_hessian else rtn(w, spec)
            moved = ((x @ (q.dequantize() - w).T) * g).sum(-1)
            assert losses[name][key] == pytest.approx(0.5 * float(moved.square().mean()), rel=1e-3), name


def measured(model, path, spec):
    """KL of the model with one weight quantized, on the same tokens."""
    with torch.no_grad():
        base = model(IDS).logits
        weight = model.get_submodule(path).weight
        kept = weight.clone()
        weight.copy_(rtn(kept, spec).dequantize())
        kl = torch.stack([token_kl(a, b) for a, b in zip(base, model(IDS).logits, strict=True)]).mean()
        weight.copy_(kept)
    return float(kl)


def test_predicts_what_is_measured(tiny_checkpoint, losses):
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    paths = [p for p in losses if p.endswith("proj")]
    for key in ("int8", "int4"):
        pairs = [(losses[p][key], measured(model, p, SPECS[key])) for p in paths]
        ratio = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
        assert 0.5 < ratio < 2, (key, ratio)
        ranks = torch.tensor(pairs).log().argsort(0).argsort(0).double()
        assert torch.corrcoef(ranks.T)[0, 1] > 0.7


def test_the_head_is_predicted_exactly_to_second_order(tiny_checkpoint, tmp_path):
    """An untied head: its own loss, of which nothing is drawn."""
    src = tmp_path / "untied"
    shutil.copytree(tiny_checkpoint, src)
    tensors = load_file(src / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file({**tensors, "lm_head.weight": head}, src / "model.safetensors")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    found = measure_sensitivities(open_source(src), IDS, {"int8": SPECS["int8"]}, tmp_path / "cache")
    kl = measured(load_model(src, dtype=torch.float32), "lm_head", SPECS["int8"])
    assert found["lm_head"]["int8"] == pytest.approx(kl, rel=0.03)


def test_what_was_measured_is_not_measured_again(tiny_checkpoint, tmp_path, monkeypatch, losses):
    from brise.eval import sensitivity

    real, paths = sensitivity.quantize_weight, []

    def counting(path, *args):
        paths.append(path)
        if len(paths) == 36:
            raise KeyboardInterrupt
        return real(path, *args)

    monkeypatch.setattr(sensitivity, "quantize_weight", counting)
    source = open_source(tiny_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivities(source, IDS, SPECS, tmp_path)
    again = measure_sensitivities(source, IDS, SPECS, tmp_path)
    assert again == losses
    # the blocks from the last one on: 7 modules and 4 formats each were done before the interrupt
    assert sum(p.startswith("model.layers.1.") for p in paths) == 28
    count = len(paths)
    assert measure_sensitivities(source, IDS, SPECS, tmp_path) == losses and len(paths) == count
    other = measure_sensitivities(source, IDS.flip(0), SPECS, tmp_path)
    assert other != losses
    assert measure_sensitivities(source, IDS, SPECS, tmp_path, seed=1) != losses
    few = {"int4": QuantSpec(format="int4", group_size=64)}
    found = measure_sensitivities(source, IDS, few, tmp_path)
    assert all(found[p].keys() == {"int4"} and found[p]["int4"] != losses[p]["int4"] for p in losses)
    named = {**SPECS, "int8": few["int4"]}  # the same names, another spec under one
    assert measure_sensitivities(source, IDS, named, tmp_path) != losses
    changed = tmp_path / "changed"
    shutil.copytree(tiny_checkpoint, changed)
    tensors = load_file(changed / "model.safetensors")
    save_file({n: t * 1.5 for n, t in tensors.items()}, changed / "model.safetensors")
    assert measure_sensitivities(open_source(changed), IDS, SPECS, tmp_path) != losses


def test_an_embedding_and_the_head_that_is_tied_to_it(tiny_checkpoint, losses):
    """The divergence of both together, measured; each alone is far from it."""
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    kl = measured(model, "model.embed_tokens", SPECS["int8"])
    assert losses["model.embed_tokens"]["int8"] == pytest.approx(kl, rel=0.3)
