"""The Triton kernels on the CPU: TRITON_INTERPRET has to be set before triton is imported, so each in a
process."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


def release(package: str) -> tuple[int, ...]:
    """Its major and minor version; (0, 0) where it is not installed."""
    try:
        return tuple(int(part) for part in version(package).split(".")[:2])
    except PackageNotFoundError:
        return 0, 0


@pytest.mark.skipif(
    release("triton") < (3, 7) and release("numpy") >= (2, 4),
    reason="triton before 3.7 (or none): its interpreter makes a number of an array, which numpy 2.4 refuses",
)
@pytest.mark.parametrize("script", sorted(p.name for p in FOLDER.glob("*.py")))
def test_the_kernels_agree_with_float64(script):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all within budget" in done.stdout
