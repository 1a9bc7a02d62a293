"""What the plan says a block takes, against every allocation of torch while one is quantized."""

from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from brise.eval.plan import Layout, stage_bytes
from brise.model.calibrated import CalibratedSteps
from brise.model.group import Alone
from brise.model.sequential import Activations, quantize_block
from brise.model.skeleton import empty_model
from brise.model.source import open_source
from brise.model.synth import Size, write_synth
from brise.model.trouble import Policy
from brise.quant import apply, calibrate, gptq
from brise.quant.apply import find_targets, resolve
from brise.quant.presets import PRESETS

# wide where Mistral is, so that it is down_proj's Hessian that counts; and one where it is the weights of gate and up
SIZES = {"hessian": Size(128, 512, 1, 4, 2, vocabulary=64), "weights": Size(256, 384, 1, 4, 2, vocabulary=64)}
IDS = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))


def most_held(function) -> int:
    """Bytes of tensors at most, beyond those there were, by torch's own account of what it allocates and frees."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("synth")
    for name, size in SIZES.items():
        write_synth(size, root / name, None)
    return {name: open_source(root / name) for name in SIZES}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces as small beside these weights as the real ones are beside Mistral's."""
    for module, names in ((calibrate, ("ROWS", "MIRROR")), (gptq, ("_PANEL",)), (apply, ("_ROWS",))):
        for name in names:
            monkeypatch.setattr(module, name, 64)
    monkeypatch.setattr("brise.quant.scales._CHUNK", 1024)
    monkeypatch.setattr("brise.eval.plan.ROWS", 64)
    monkeypatch.setattr("brise.eval.plan.MIRROR", 64)


@pytest.mark.parametrize(
    "most, preset",
    [("hessian", "gptq-int4-g128"), ("hessian", "classic-gptq-int4-g128"), ("weights", "gptq-int4-g128")],
)
def test_a_block_takes_what_the_plan_says(sources, most, preset):
    source, config = sources[most], PRESETS[preset]
    model = empty_model(source.config, "config.json", attn_implementation="sdpa")
    targets = {t.path: t for t in find_targets(model)}
    layout = Layout.of(source)
    steps = CalibratedSteps(
        source,
        model,
        targets,
        resolve(config, targets.values()),
        Policy(),
        torch.device("cpu"),
        Alone(),
        config.calibration,
        IDS,
        "memory",
    )
    streams = 2 if config.calibration.target == "full" else 1
    hidden = torch.randn(2, 8, SIZES[most].width, generator=torch.Generator().manual_seed(1))
    step = layout.steps[1]
    layer = steps._layer(step)
    inputs = Activations(hidden, hidden.clone() if streams == 2 else None)
    walk = steps._walk()
    load = partial(steps._load, step)
    found = most_held(lambda: quantize_block(layer, load, steps.setting, inputs, walk, step.name))
    stages = stage_bytes(layout, streams)
    assert stages.index(max(stages)) == {"hessian": 3, "weights": 2}[most]
    assert max(stages) * 0.95 < found < max(stages) * 1.05
