"""The Triton kernels on the CPU: TRITON_INTERPRET has to be set before triton is imported, so each in a
process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("script", sorted(p.name for p in FOLDER.glob("*.py")))
def test_the_kernels_agree_with_float64(script):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all within budget" in done.stdout
