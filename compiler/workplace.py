"""The folder in which a compile works, beside the one to be: hidden from loaders, and one compile's alone."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from .errors import CompilerError

PREFIX = ".compiling-"
LOCK = "lock"  # held by the compile as long as its process lives, however that ends


def workplace(folder: Path, name: str) -> Path:
    """`.compiling-NAME`, new and empty but for its lock. Raises CompilerError if another compile is at work in it.

    What compiles left that could not clean up, as the machine went down or they were killed, is removed first.
    """
    remove_abandoned(folder)
    work = Path(folder, PREFIX + name)
    try:
        work.mkdir()
    except FileExistsError:
        raise CompilerError(
            f"'{name}' is being compiled already, in {work}: wait for that, or choose another name."
        ) from None
    hold(work)
    return work


def hold(work: Path) -> int:
    """Locks a folder as one that is worked in; the handle, which keeps it locked until it is closed or the process ends."""
    # locked before it is there by its name
    unlocked = work / "new"
    handle = os.open(unlocked, os.O_CREAT | os.O_RDWR, 0o644)
    with contextlib.suppress(OSError):  # a network's file system may have no locks: then nothing is taken for abandoned
        fcntl.flock(handle, fcntl.LOCK_EX)
    unlocked.rename(work / LOCK)
    return handle


def remove_abandoned(folder: Path):
    for lock in Path(folder).glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):
            handle = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(handle)
