"""A command in a process of its own, watched: how long it took, how busy it was, what it held in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# seconds between two looks
INTERVAL = 0.02


@dataclass(frozen=True)
class Watched:
    """Of one process, in seconds and bytes.

    Attributes:
        cpu_seconds: of all its threads, in the system too.
        anonymous_peak: the most memory of its own that was resident at a look: everything but pages of files.
        resident_peak: the most that was resident at all, pages of mapped files included.
        samples: looks that were taken.
        output: what it wrote on stdout.
    """

    seconds: float
    cpu_seconds: float
    anonymous_peak: int
    resident_peak: int
    samples: int
    output: str


class ProcessError(RuntimeError):
    """A watched process ended with an error; the message has its last words."""


def watch(arguments: list[str], interval: float = INTERVAL) -> Watched:
    """Run ``brise`` with these arguments in a fresh process, and look at its memory until it ends (Linux only).

    Raises:
        ProcessError: it ended with an error.
    """
    command = [sys.executable, "-c", "from brise.cli.main import main; main()", *arguments]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        anonymous = resident = samples = 0
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                own, every = memory_of(process.pid)
                anonymous, resident, samples = max(anonymous, own), max(resident, every), samples + 1
                time.sleep(interval)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        output, errors = process.communicate()
    if process.returncode:
        words = errors.strip().splitlines()[-1:] or ["no word on stderr"]
        raise ProcessError(f"brise {' '.join(arguments)} ended with {process.returncode}: {words[0]}")
    return Watched(seconds, usage.ru_utime + usage.ru_stime, anonymous, resident, samples, output)


def memory_of(pid: int) -> tuple[int, int]:
    """Resident bytes of a process: (anonymous and shared memory, with the pages of files); zeros once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {
        k: int(v.split()[0]) << 10
        for k, _, v in (line.partition(":") for line in lines)
        if k.startswith("Rss")
    }
    own = sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)
    return own, own + sizes.get("RssFile", 0)
