"""A folder that is there whole or not at all: written beside its place under another name, then renamed.

While it is written, the temporary folder is locked (``flock`` on the folder itself), so that what a killed
run left behind can be told from what a live one is still writing: the lock goes with the process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import uuid
from pathlib import Path

from .safetensors_header import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class AtomicFolder:
    """A folder to fill at ``.path``; :meth:`commit` puts it at ``target``, :meth:`discard` leaves no trace.

    A kill at any moment leaves at ``target`` what was there before or what was committed. Replacing a folder
    swaps both names in one system call on Linux; where a file system cannot do that it takes two renames, and
    the old folder is put back by the next writer should the process die between them.

    Args:
        target: where the folder is to be.
        overwrite: whether a checkpoint (a folder with a config.json) that is there already may be replaced,
            with all that is in it.

    Raises:
        CheckpointError: something is at ``target`` that may not be replaced.
    """

    def __init__(self, target: str | Path, *, overwrite: bool = False) -> None:
        self.target = Path(target).expanduser().resolve()
        self.overwrite = overwrite
        check_target(self.target, overwrite)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        clean_up(self.target, overwrite)
        self.path, self._lock = self._make()

    def commit(self) -> None:
        """Rename the folder, whose files are on disk already, to its place."""
        put_in_place(self.path, self.target, self.overwrite)
        self.discard()  # after an exchange the old folder bears the temporary name

    def discard(self) -> None:
        """Remove what bears the temporary name, and give up the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _make(self) -> tuple[Path, int | None]:
        while True:
            path = self.target.parent / f"{_prefix(self.target)}{uuid.uuid4().hex[:8]}"
            path.mkdir()
            lock = try_lock(path)
            # between mkdir and lock another writer's clean-up may have taken it for a dead one's
            if lock is not None:
                return path, lock


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that is not a writer's to replace.

    Raises:
        CheckpointError: something is there that may not be replaced.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; choose another folder to write to")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{target} exists and is not empty; choose another folder, or allow overwriting"
        )
    if not (target / "config.json").is_file():
        raise CheckpointError(
            f"{target} is not empty and no checkpoint (it has no config.json), so it is not replaced; "
            "choose another folder"
        )


def put_in_place(path: Path, target: Path, overwrite: bool) -> None:
    """Rename a folder, whose files are on disk already, to ``target``; one that was there may then be at ``path``."""
    check_target(target, overwrite)
    fsync_folder(path)
    if not (target.exists() and any(target.iterdir())):
        os.rename(path, target)  # over an empty folder too: rename(2) is atomic there
    elif not _exchange(path, target):
        _rename_twice(path, target)
    fsync_folder(target.parent)


def clean_up(target: Path, overwrite: bool) -> None:
    """Remove what dead writers of this target left behind; bring back a folder that they moved."""
    prefix = _prefix(target)
    for path in sorted(target.parent.glob(f"{glob.escape(prefix)}*")):
        lock = try_lock(path)
        if lock is None:
            continue
        if path.name.startswith(f"{prefix}old-") and not target.exists():
            os.rename(path, target)
            check_target(target, overwrite)
        else:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _prefix(target: Path) -> str:
    return f".{target.name}.brise-"


def _rename_twice(path: Path, target: Path) -> None:
    """Replace the target where names cannot be swapped; locked, so that no clean-up takes the old one."""
    lock = try_lock(target)
    old = target.parent / f"{_prefix(target)}old-{uuid.uuid4().hex[:8]}"
    try:
        os.rename(target, old)
        try:
            os.rename(path, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def try_lock(path: Path) -> int | None:
    """A locked descriptor of the folder, or None where somebody else holds the lock or the folder is gone."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(path)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def fsync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
