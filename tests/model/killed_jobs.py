"""Jobs that are killed, each in a process forked from this one, which has everything imported and computes nothing.

    python killed_jobs.py FOLDER SEED

Prints one line of JSON: how often jobs were killed, and what was wrong.
"""

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import MistralConfig

from brise.model import atomic
from brise.model.job import job_path
from brise.model.mistral import MistralForCausalLM
from brise.model.stream import quantize_checkpoint
from brise.quant.config import QuantConfig, QuantSpec, Rule
from brise.quant.presets import PRESETS

IDS = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(1))
GPTQ = QuantConfig(
    (
        Rule(("*layers.*",), QuantSpec(format="int3", group_size=16, algorithm="gptq")),
        Rule(("*embed_tokens", "lm_head"), QuantSpec(format="nf4", group_size=16, double_quant=True)),
    ),
    PRESETS["gptq-nf4"].calibration,
)
PLAIN = QuantConfig((Rule(("*",), QuantSpec(format="nf4", group_size=16, double_quant=True)),))
# name, config, how activations are kept, shard size: many shards, and one
JOBS = [
    ("plain", PLAIN, "memory", 4000),
    ("gptq-file", GPTQ, "file", 10**9),
    ("gptq-memory", GPTQ, "memory", 4000),
]
problems: list[str] = []
counts = {"kills": 0, "ended": 0, "resumed": 0, "old": 0}


def child(work) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        sys.stderr.write(f"{error!r}\n")
        os._exit(9)


def contents(folder: Path):
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None


def job(src, out, case, **options):
    _, config, memory, shard = case
    ids = IDS if config is GPTQ else None
    quantize_checkpoint(src, out, config, calibration=ids, memory=memory, max_shard_bytes=shard, **options)


def look(out: Path, before, wanted, where: str) -> bool:
    """Whether the job is over; what is at ``out`` must be what was there, or the whole new folder."""
    now = contents(out)
    if now == wanted:
        return True
    if now != before:
        problems.append(f"{where}: neither the old folder nor the new one is there")
    counts["old"] += 1
    return False


def at_random_moments(src, root, case, wanted, seconds, rng, times):
    for number in range(times):
        out = root / f"random-{case[0]}-{number}"
        before = None
        if number % 2:
            job(src, out, ("old", PLAIN, "memory", 10**9))
            before = contents(out)
        while True:
            pid = child(partial(job, src, out, case, resume=True, overwrite=before is not None))
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            counts["kills"] += os.WIFSIGNALED(status)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                problems.append(f"{out.name}: exit code {os.WEXITSTATUS(status)}")
                break
            if look(out, before, wanted, out.name):
                counts["ended"] += 1
                break
            counts["resumed"] += (job_path(out) / "job.json").exists()


def at_every_call(src, root, case, wanted, step):
    """Killed at the n-th of the calls that change what is on the disk, for n = 1, 1 + step, ...; then resumed."""
    names = ["fsync", "fdatasync", "rename", "pwrite", "unlink", "posix_fallocate", "mkdir", "open", "write"]
    n = 1
    while True:
        out = root / f"call-{case[0]}-{n}"

        def work(n=n, out=out):
            seen = 0

            def wrap(real):
                def call(*args, **kwargs):
                    nonlocal seen
                    seen += 1
                    if seen == n:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                return call

            for name in names:
                setattr(os, name, wrap(getattr(os, name)))
            atomic._exchange = wrap(atomic._exchange)
            job(src, out, case)

        status = os.waitpid(child(work), 0)[1]
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status) or contents(out) != wanted:
                problems.append(f"{out.name}: ended with {os.WEXITSTATUS(status)}")
            return
        counts["kills"] += 1
        if look(out, None, wanted, out.name):
            counts["ended"] += 1
        else:
            # at the same calls every time, however busy the machine is
            counts["resumed"] += (job_path(out) / "job.json").exists()
            if os.waitpid(child(lambda out=out: job(src, out, case, resume=True)), 0)[1]:
                problems.append(f"{out.name}: cannot be resumed")
            elif contents(out) != wanted:
                problems.append(f"{out.name}: other bytes than of a job that was never killed")
        n += step


def main(root: Path, seed: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    src = root / "source"
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    MistralForCausalLM(config).save_pretrained(src, max_shard_size="20KB")
    rng = random.Random(seed)
    seconds = {}
    wanted = {}
    for case in JOBS:
        begin = time.perf_counter()
        if os.waitpid(child(lambda case=case: job(src, root / f"whole-{case[0]}", case)), 0)[1]:
            problems.append(f"{case[0]}: fails even where nobody kills it")
        seconds[case[0]] = time.perf_counter() - begin
        wanted[case[0]] = contents(root / f"whole-{case[0]}")
    for case, times, step in zip(JOBS, (3, 2, 1), (4, 29, 37), strict=True):
        at_random_moments(src, root, case, wanted[case[0]], seconds[case[0]], rng, times)
        at_every_call(src, root, case, wanted[case[0]], step)
    left = [p.name for p in root.iterdir() if p.name.startswith(".") and not p.name.endswith(".unfinished")]
    if left:
        problems.append(f"left behind: {left}")
    print(json.dumps({**counts, "problems": problems, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
