"""An export takes the memory of a weight, however many there are: measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

# one block of the measured checkpoints: in fp32, and all that may lie about of it
_BLOCK = 4 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 768)


def test_a_longer_checkpoint_takes_no_more_memory(tmp_path):
    script = Path(__file__).with_name("exports_measured.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for format, (short, long, nbytes) in json.loads(done.stdout.splitlines()[-1]).items():
        assert nbytes > 1.2 * _BLOCK, format  # all of it would show
        assert long - short < _BLOCK / 2, format
