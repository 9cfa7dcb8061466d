"""The folder of a run: it has to be writable, and one job at a time writes it."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
from collections.abc import Generator
from pathlib import Path

from curvtrain.trainer.mesh import distributed

LOCK = ".lock"

log = logging.getLogger("curvtrain")

_held: set[int] = set()  # the files of the locks that this process holds


class WorkdirInUse(RuntimeError):
    """Another job trains in the workdir. The message names its host, process and start."""


@contextlib.contextmanager
def claimed(folder: Path) -> Generator[None]:
    """Makes the folder if it is not there, and keeps other jobs out of it; process 0 does so for all processes.

    The lock is the kernel's (`flock` on a file in the folder): it ends with the process, however that ends. The file
    stays, and says who held it last.

    Raises:
      ValueError: a process cannot write the folder.
      WorkdirInUse: another job is at work in it. Either on all processes.
    """
    if (unwritable := distributed.first_problem(_unwritable(folder))) is not None:
        raise ValueError(unwritable)
    with contextlib.ExitStack() as stack:
        refused = distributed.from_first(lambda: _lock(folder, stack))
        if refused is not None:
            raise WorkdirInUse(refused)
        yield


def _lock(folder: Path, stack: contextlib.ExitStack) -> str | None:
    """Takes the lock until the stack is left. Returns None, or the reason why it cannot be taken."""
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    stack.callback(os.close, file)  # closing the file ends the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return (
            f"TrainerConfig(workdir={os.fspath(folder)!r}) is in use by another job{_holder(file)}. "
            f"Choose another workdir, or end that job."
        )
    except OSError as error:  # some network file systems have no locks
        log.warning("%s cannot be locked (%s): make sure that no other job uses it.", folder, error)
        return None
    _held.add(file)
    stack.callback(_held.discard, file)
    started = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    with contextlib.suppress(OSError):  # a full disk: the lock holds without
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)
    return None


def _holder(file: int) -> str:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        return f": process {holder['pid']} on {holder['host']}, since {holder['started']}"
    except (ValueError, KeyError, OSError):  # it has not written it yet
        return ""


def _unwritable(folder: Path) -> str | None:
    """Returns the reason why the folder cannot be written, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".curvtrain-{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)  # a process of the same number on another host may have been faster
    except OSError as error:
        return f"TrainerConfig(workdir={os.fspath(folder)!r}) cannot be written: {error}. Choose another folder."
    return None


def _leave_to_parent() -> None:
    """Closes the lock in a forked child (a data worker), where it would outlive the parent."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
