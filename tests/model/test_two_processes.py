"""The same job by one process and by two of torch's own distributed (gloo)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from brise.model.reader import CheckpointReader

DOWN, NORM = "model.layers.1.mlp.down_proj", "model.norm"


@pytest.fixture(scope="module")
def made(tiny_checkpoint, tmp_path_factory) -> Path:
    """Folders ``1`` and ``2``: what one and two processes made of a model with weights that have to be kept.

    The second process has the step of each.
    """
    root = tmp_path_factory.mktemp("two")
    src = root / "src"
    src.mkdir()
    for path in tiny_checkpoint.iterdir():
        (src / path.name).write_bytes(path.read_bytes())
    tensors = load_file(src / "model.safetensors")
    tensors[f"{DOWN}.weight"][0, 0] = float("inf")
    tensors[f"{NORM}.weight"][3] = float("nan")
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    script = str(Path(__file__).with_name("two_processes.py"))
    running = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        (root / str(world)).mkdir(exist_ok=True)
        words = [str(rank), str(world), str(root / "rendezvous"), str(src), str(root / str(world))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        running.append(
            subprocess.Popen(
                [sys.executable, script, *words], stderr=subprocess.PIPE, text=True, env=environment
            )
        )
    for process in running:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-3000:]
    return root


def test_plain_algorithms_give_the_same_bytes(made):
    one, two = ({p.name: p.read_bytes() for p in (made / n / "plain").iterdir()} for n in "12")
    assert one == two and len([name for name in one if name.startswith("model-")]) > 3
    report = json.loads(two["quantization_report.json"])
    assert report["copied"] == {NORM: "it holds 1 NaN or infinite weights"}
    reader = CheckpointReader(made / "2/plain")
    assert f"{DOWN}.weight" in reader.names and f"{DOWN}.qweight" not in reader.names


def test_gptq_sums_the_hessians_of_both(made):
    """Sums come in another order, and a code that falls otherwise moves all behind it: what is lost is equal."""
    one, two = (
        {
            m["path"]: m
            for m in json.loads((made / n / "gptq/quantization_report.json").read_text())["modules"]
        }
        for n in "12"
    )
    assert list(one) == list(two)
    for path, module in one.items():
        assert module["spec"] == two[path]["spec"]
        if module["output_error"] is not None and ".layers.0." in path:
            assert two[path]["output_error"] == pytest.approx(module["output_error"], rel=0.1), path


def test_nothing_is_left_beside(made):
    for n in "12":
        assert sorted(p.name for p in (made / n).iterdir()) == ["gptq", "plain"]
