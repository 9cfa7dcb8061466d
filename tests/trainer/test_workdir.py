"""Two jobs in one workdir: the second is refused while the first lives, and only then."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from curvtrain.trainer import WorkdirInUse
from curvtrain.trainer.disk.workdir import LOCK, claimed

HOLD = """
import os, sys, time, warnings
from pathlib import Path
from curvtrain.trainer.disk.workdir import claimed
warnings.simplefilter("ignore")  # jax's, about forks
with claimed(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_second_job_is_refused_until_the_first_is_killed(tmp_path):
    """A data worker that the first one forked, and that outlives it, does not hold the lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        child = int(first.stdout.readline())
        holder = f"process {first.pid} on {socket.gethostname()}, since 20"
        said = re.escape(f"TrainerConfig(workdir='{tmp_path}') is in use by another job: {holder}")
        for _ in range(2):
            with pytest.raises(WorkdirInUse, match=said), claimed(tmp_path):
                pass
        first.send_signal(signal.SIGKILL)
        first.wait(timeout=10)
        try:
            with claimed(tmp_path):
                assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_job_that_ends_gives_the_workdir_back(tmp_path):
    def fail():
        with claimed(tmp_path / "new"):
            with pytest.raises(WorkdirInUse, match=f"process {os.getpid()} on"), claimed(tmp_path / "new"):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with claimed(tmp_path / "new"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(tmp_path), claimed(tmp_path):
        pass
    assert "cannot be locked ([Errno 37] No locks available)" in caplog.text


def test_a_holder_that_has_not_said_who_it_is(tmp_path):
    with claimed(tmp_path):
        (tmp_path / LOCK).write_text("")
        with pytest.raises(WorkdirInUse, match=r"in use by another job\. Choose"), claimed(tmp_path):
            pass
