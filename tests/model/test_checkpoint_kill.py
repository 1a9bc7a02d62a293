"""A writer that is killed at any moment, or whose disk is full, leaves the old folder or the new one."""

import errno
import os
import resource
import signal
import sys

import pytest
import torch

from brise.model import atomic
from brise.model.atomic import AtomicFolder
from brise.model.checkpoint import CheckpointWriter

from .written import siblings, state, write

# --- a kill at any moment


def child(work):
    """Run ``work`` in a forked process; its exit status as os.waitpid has it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(9)
    return os.waitpid(pid, 0)[1]


_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock")


def killed_at(step, work):
    """Kill a process that does ``work`` right before its ``step``-th dealing with the file system."""

    def run():
        seen = 0

        def count():
            nonlocal seen
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(lambda event, args: count() if event in _EVENTS else None)
        real_exchange, real_fsync = atomic._exchange, os.fsync
        os.fsync = lambda fd: (count(), real_fsync(fd))[1]
        atomic._exchange = lambda a, b: (count(), real_exchange(a, b), count())[1]
        work()

    return child(run)


@pytest.mark.parametrize("swap", [True, False])
def test_a_kill_leaves_the_old_or_the_new(tmp_path, swap):
    out = tmp_path / "m"
    write(out)
    outcomes = []

    def work():
        if not swap:
            atomic._exchange = lambda a, b: False
        write(out, fill=2, overwrite=True, max_shard_bytes=600)

    for step in range(1, 500):
        status = killed_at(step, work)
        if not out.exists():
            # only without a swap of names: the next writer puts the old folder back before anything else
            assert not swap
            write(out, fill=5, finish=False, overwrite=True)
            assert state(out) == 1
        outcomes.append(state(out))
        assert outcomes[-1] in (1, 2)
        # the next run cleans up what the dead one left
        write(out, overwrite=True)
        assert siblings(out) == [] and state(out) == 1
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert status == 0 and len(outcomes) > 20
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}


def test_only_what_a_dead_writer_of_this_folder_left_is_removed(tmp_path):
    out = tmp_path / "m"

    def work():
        with CheckpointWriter(out) as writer:
            writer.add("a", torch.ones(1))
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(child(work)) == signal.SIGKILL
    (left,) = siblings(out)
    assert left.startswith(".m.brise-")
    (tmp_path / ".m.other").mkdir()
    (tmp_path / ".mm.brise-12345678").mkdir()
    (tmp_path / ".m.brise-file").write_text("a file by that name")
    live = AtomicFolder(out)
    assert left not in siblings(out)
    (live.path / "work").write_text("in progress")
    write(out)
    assert (live.path / "work").exists()
    live.discard()
    assert siblings(out) == [".m.brise-file", ".m.other", ".mm.brise-12345678"]


# --- a disk that is full


@pytest.mark.parametrize("limit", [0, 100, 700, 1300])
def test_a_full_disk_leaves_nothing(tmp_path, limit):
    """The system lets no file grow past a limit, met at the first tensor, in the shard, or anywhere between."""
    out = tmp_path / "m"
    write(out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    largest = max(map(len, before.values()))
    assert limit < largest

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError) as caught:
            write(out, fill=2, overwrite=True)
        assert caught.value.errno == errno.EFBIG

    assert child(work) == 0
    assert siblings(out) == []
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
