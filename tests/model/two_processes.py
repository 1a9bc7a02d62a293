"""One of the processes of a job: ``python two_processes.py RANK WORLD RENDEZVOUS SRC OUT``; two jobs and two errors."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from brise.model.group import current_group
from brise.model.stream import quantize_checkpoint
from brise.model.trouble import Policy
from brise.quant.presets import PRESETS

IDS = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))


def jobs(src: Path, out: Path) -> None:
    group = current_group()
    sums = torch.tensor([1.0, 10.0]) * (group.rank + 1)
    group.all_reduce(sums)
    assert sums.tolist() == ([1.0, 10.0] if group.world == 1 else [3.0, 30.0])
    policy = Policy(nonfinite="keep")
    options = {"max_shard_bytes": 9000, "policy": policy}
    quantize_checkpoint(src, out / "plain", PRESETS["nf4-dq-all"], **options)
    quantize_checkpoint(
        src, out / "gptq", PRESETS["gptq-int4-g32"], calibration=IDS, memory="file", **options
    )
    # an error of one process, and of all of them
    for config, says in ((PRESETS["nf4-dq-all"], "exists"), (PRESETS["gptq-int4-g32"], "calibration")):
        try:
            quantize_checkpoint(src, out / "plain", config)
        except (ValueError, RuntimeError) as error:
            assert says in str(error), error
        else:
            raise AssertionError("no error")


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, world, rendezvous, src, out = sys.argv[1:]
    if int(world) > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world)
        )
    jobs(Path(src), Path(out))
    if int(world) > 1:
        dist.destroy_process_group()
