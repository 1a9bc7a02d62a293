"""The folder of a job that may die: what it was, which of its steps are done, and the checkpoint as far as it got.

``.OUT.unfinished`` beside ``OUT`` holds ``job.json`` (what is made of what), ``journal`` (a line for what was finished
at once, with a checksum, written after its data are on the disk) and ``folder``, which is renamed to ``OUT`` in the
end. It is locked while a process works on it; the lock goes with the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .atomic import check_target, clean_up, fsync_folder, put_in_place, try_lock, write_file
from .safetensors_header import CheckpointError

_FORMAT = 2
_JOB, _JOURNAL, _PID, _CONTENTS = "job.json", "journal", "pid", "folder"


class UnfinishedJobError(CheckpointError):
    """There is an unfinished job in the way, or it is another one than the one to go on with."""


class JobFolder:
    """The state of a job on disk, locked by this process.

    Attributes:
        path: the job's folder. folder: in it, the checkpoint to be.
        records: what :meth:`append` was given by this process and those before it, in order.
        resumed: whether there was something to go on with.

    Args:
        target: where the checkpoint is to be.
        identity: what makes the job: JSON-ready, the parts by name.
        overwrite: whether a checkpoint at ``target`` may be replaced; without ``resume`` also an unfinished job.
        resume: go on with an unfinished job of the same identity, or begin where there is none.
        goes_on: (part, as it was, as it is) -> whether the finished steps are what they would be; the job has the new
            part from then on.

    Raises:
        UnfinishedJobError: an unfinished job is there and neither is allowed, or its identity is another.
        CheckpointError: another process is at work on it, or ``target`` may not be replaced.
    """

    def __init__(
        self,
        target: str | Path,
        identity: dict[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
        goes_on: Callable[[str, Any, Any], bool] = lambda part, old, new: bool(old == new),
    ) -> None:
        self.target = Path(target).expanduser().resolve()
        self.path = job_path(self.target)
        self.folder = self.path / _CONTENTS
        self.records: list[dict[str, Any]] = []
        self.resumed = False
        if not (resume and self.path.exists()):
            check_target(self.target, overwrite)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = self._take_lock()
        try:
            state = self._load()
            self.overwrite = overwrite or bool(resume and state and state["overwrite"])
            check_target(self.target, self.overwrite)
            clean_up(self.target, self.overwrite)
            if state is not None and resume:
                self._compare(state, identity, goes_on)
                self.records, good = read_journal(self.path / _JOURNAL)
                os.truncate(self.path / _JOURNAL, good)
                self.resumed = True
            elif (
                state is not None
                and not overwrite
                and (done := _steps(read_journal(self.path / _JOURNAL)[0]))
            ):
                raise UnfinishedJobError(
                    f"{self.target} was begun before, {done} steps are done: go on with it (resume), or allow "
                    "overwriting to begin anew"
                )
            if not self.resumed:
                self._begin(identity)
        except BaseException:
            if not (self.path / _JOB).exists():
                shutil.rmtree(self.path, ignore_errors=True)
            self.close()
            raise

    def start(self) -> None:
        """Put the job on record, once ``folder`` holds its files: before this, nothing can be resumed."""
        if self.resumed:
            return
        write_file(self.path / _JOURNAL, b"")
        self._write_state(self._identity)
        fsync_folder(self.path.parent)

    def append(self, record: dict[str, Any]) -> None:
        """Put steps (``record["steps"]``) on record, all or none of them; their data must be on the disk."""
        text = json.dumps(record)
        line = f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
        fd = os.open(self.path / _JOURNAL, os.O_WRONLY | os.O_APPEND)
        try:
            written = os.write(fd, line)
            if written != len(line):
                raise OSError(
                    f"{self.path / _JOURNAL}: {written} of {len(line)} bytes written: is the disk full?"
                )
            os.fsync(fd)
        finally:
            os.close(fd)
        self.records.append(record)

    @property
    def done(self) -> int:
        """Steps on record."""
        return _steps(self.records)

    def commit(self) -> None:
        """Rename ``folder``, whose files are on disk already, to the target, and leave nothing else behind."""
        put_in_place(self.folder, self.target, self.overwrite)
        self.discard()

    def discard(self) -> None:
        """Remove all of it, and give up the lock."""
        # first of all what makes it a job, so that nobody goes on with half of one
        (self.path / _JOB).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Give up the lock, and leave the job to be resumed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> int:
        while True:
            with contextlib.suppress(FileExistsError):
                self.path.mkdir()
            lock = try_lock(self.path)
            if lock is not None:
                (self.path / _PID).write_text(str(os.getpid()))
                return lock
            if self.path.exists():
                raise CheckpointError(
                    f"another process{self._its_pid()} is writing {self.target}; wait for it, or choose another folder"
                )
            # it has just finished, and its folder went with it

    def _its_pid(self) -> str:
        try:
            return f" ({(self.path / _PID).read_text()})"
        except OSError:
            return ""

    def _load(self) -> dict[str, Any] | None:
        """What is on record of an unfinished job; None where there is none, or it got to its end."""
        try:
            state: dict[str, Any] = json.loads((self.path / _JOB).read_text())
        except FileNotFoundError:
            return None
        # killed after the last rename: the folder is at its target, and another one, or none, in its place
        finished = not self.folder.exists() or self.folder.stat().st_ino != state["inode"]
        return None if finished else state

    def _write_state(self, identity: dict[str, Any]) -> None:
        state = {
            "format": _FORMAT,
            "identity": identity,
            "overwrite": self.overwrite,
            "inode": self.folder.stat().st_ino,
        }
        (self.path / "job.tmp").unlink(missing_ok=True)
        write_file(self.path / "job.tmp", (json.dumps(state, indent=1) + "\n").encode())
        os.rename(self.path / "job.tmp", self.path / _JOB)
        fsync_folder(self.path)

    def _compare(
        self, state: dict[str, Any], identity: dict[str, Any], goes_on: Callable[[str, Any, Any], bool]
    ) -> None:
        new = json.loads(json.dumps({"format": _FORMAT, **identity}))
        old = {"format": state["format"], **state["identity"]}
        unlike = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if unlike and all(goes_on(key, old.get(key), new.get(key)) for key in unlike):
            self._write_state(identity)
        elif unlike:
            parts = ", ".join(f"{key} ({_say(old.get(key))}, now {_say(new.get(key))})" for key in unlike)
            raise UnfinishedJobError(
                f"{self.target} was begun as another job, which differs in {parts}: go on with that one, or allow "
                "overwriting to begin anew"
            )

    def _begin(self, identity: dict[str, Any]) -> None:
        (self.path / _JOB).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.name != _PID:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._identity = identity
        self.folder.mkdir()


def job_path(target: Path) -> Path:
    """Where the unfinished job of a target is kept."""
    return target.parent / f".{target.name}.unfinished"


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records up to the first line that is not whole, and the bytes that they take."""
    records: list[dict[str, Any]] = []
    good = 0
    for line in path.read_bytes().splitlines(keepends=True):
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
            break
        records.append(json.loads(text))
        good += len(line)
    return records, good


def _steps(records: list[dict[str, Any]]) -> int:
    return sum(len(record["steps"]) for record in records)


def _say(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}... {zlib.crc32(text.encode()):08x}"
