"""Make the environments of the peers, one folder each: python tests/interop/environments.py FOLDER [NAME...]

Their pins clash with one another's and with ours, so each has an environment of its own. What is there already with
the same requirements is left alone.
"""

import subprocess
import sys
import venv
from pathlib import Path

# torch and transformers are ours, so that a difference is the peer's; accelerate is what loads quantized folders
TORCH = "torch==2.13.0"
TRANSFORMERS = ["transformers==5.23.0", "accelerate==1.15.0"]
# name -> what is installed, one call of pip after another
PEERS = {
    "bitsandbytes": [[TORCH, "bitsandbytes==0.50.2", *TRANSFORMERS]],
    "compressed-tensors": [[TORCH, "compressed-tensors==0.20.0", *TRANSFORMERS]],
    # the last one that loads packed zero points through transformers: later ones refuse even their own
    "compressed-tensors-0.17": [[TORCH, "compressed-tensors==0.17.1", *TRANSFORMERS]],
    # it asks for a newer torch than it needs on a CPU: itself without its requirements, and what it imports
    "gptqmodel": [
        [
            TORCH,
            *TRANSFORMERS,
            "datasets==5.2.0",
            "defuser>=0.0.28",
            "device-smi>=0.5.7",
            "logbar>=0.4.15",
            "ninja>=1.13.2",
            "pillow>=13.0.0",
            "protobuf>=7.36.2",
            "pypcre>=0.6.4",
            "requests>=2.34.2",
            "threadpoolctl>=3.7.0",
            "tokenicer>=0.0.14",
            "torchao>=0.18.0",
        ],
        ["--no-deps", "gptqmodel==7.7.0"],
    ],
}


def make(folder: Path, calls: list[list[str]]) -> None:
    stamp = folder / "requirements.txt"
    text = "".join(" ".join(call) + "\n" for call in calls)
    if stamp.exists() and stamp.read_text() == text:
        return
    venv.create(folder, with_pip=True, clear=True)
    for call in calls:
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", *call]
        subprocess.run(pip, check=True)
    stamp.write_text(text)


if __name__ == "__main__":
    for name in sys.argv[2:] or PEERS:
        make(Path(sys.argv[1]).absolute() / name, PEERS[name])
