"""Make the environments of the peers, one folder each: python tests/interop/environments.py FOLDER [NAME...]

Their pins clash with one another's and with ours, so each has an environment of its own. What is there already with
the same requirements is left alone.
"""

import subprocess
import sys
import venv
from pathlib import Path

# torch comes as each of them wants it; accelerate is what transformers loads quantized folders with
PEERS = {
    "gptqmodel": ["gptqmodel==7.7.0", "accelerate==1.15.0"],
    "compressed-tensors": [
        "compressed-tensors==0.20.0",
        "transformers==5.23.0",
        "accelerate==1.15.0",
        "torch",
    ],
    "bitsandbytes": ["bitsandbytes==0.50.2", "transformers==5.23.0", "accelerate==1.15.0", "torch"],
}


def make(folder: Path, requirements: list[str]) -> None:
    stamp = folder / "requirements.txt"
    text = "\n".join(requirements) + "\n"
    if stamp.exists() and stamp.read_text() == text:
        return
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--disable-pip-version-check", *requirements], check=True)
    stamp.write_text(text)


if __name__ == "__main__":
    for name in sys.argv[2:] or PEERS:
        make(Path(sys.argv[1]).absolute() / name, PEERS[name])
