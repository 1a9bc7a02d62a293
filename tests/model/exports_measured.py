"""How much memory of its own an export takes, by the length of the checkpoint: ``python exports_measured.py FOLDER``.

Prints a line of JSON: format -> peaks in bytes of a short and of a long checkpoint, and the bytes of the long one.
"""

import json
import sys
import threading
import time
from pathlib import Path

import torch

from brise.model.foreign.export import export_checkpoint
from brise.model.stream import quantize_checkpoint
from brise.model.synth import Size, write_synth
from brise.quant.presets import PRESETS

SHORT, LONG = 2, 12
CASES = {"nf4": ("bitsandbytes",), "int4-g128": ("gptq", "compressed-tensors", "gguf-q4_0")}


def own() -> int:
    """Anonymous memory of this process: pages of mapped files are the system's to take back."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("the system does not say RssAnon")


def peak_of(work) -> int:
    peak, over = own(), threading.Event()

    def watch():
        nonlocal peak
        while not over.is_set():
            peak = max(peak, own())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        over.set()
        thread.join()
    return peak


def main(root: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for blocks in (SHORT, LONG):
        write_synth(Size(512, 768, blocks, 4, 2, vocabulary=512), root / f"s{blocks}", None)
    for preset, formats in CASES.items():
        for blocks in (SHORT, LONG):
            quantize_checkpoint(root / f"s{blocks}", root / f"{preset}-{blocks}", PRESETS[preset])
        for format in formats:

            def export(blocks, format=format, preset=preset):
                out = root / f"{format}-{blocks}{'.gguf' if 'gguf' in format else ''}"
                requantize = "gguf" in format
                export_checkpoint(
                    root / f"{preset}-{blocks}", out, format, requantize=requantize, overwrite=True
                )

            peaks = [peak_of(lambda n=n: export(n)) for n in (SHORT, SHORT, LONG)]
            size = sum(p.stat().st_size for p in (root / f"{preset}-{LONG}").glob("*.safetensors"))
            found[format] = [peaks[1], peaks[2], size]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
