"""Several processes of one script on this machine: `python -m curvtrain.launch --processes 2 script.py args...`

The processes meet at a free local port. They learn it from environment variables that `curvtrain.trainer` reads, so the
script needs no change. Process 0 writes to the console as if it were alone; lines of the others get a prefix and go to
standard error. SIGTERM and Ctrl-C are passed on to all processes. When one fails, the others, which would wait for it,
are ended; the exit status is that of the first that failed, or 128 + n if signal n ended it.

Each process gets a GPU of its own, or `--gpus-per-process` of them. With `--devices 4` each gets four virtual CPU
devices instead: for tests, and to try on a laptop whether a script runs on many devices.
"""

import argparse
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import BinaryIO

GRACE = 5.0  # seconds that a process has between SIGTERM and SIGKILL, once another one has failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _options(arguments)
    job = Job(options.processes)
    with _passed_on(job):
        for index in range(options.processes):
            job.start([sys.executable, options.script, *options.arguments], _environment(options, job.port, index))
        return job.wait()


class Job:
    """The processes of one run."""

    def __init__(self, count: int):
        self.count, self.port = count, _free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended: queue.Queue[int] = queue.Queue()  # indices, in the order in which they end
        self._readers: list[threading.Thread] = []
        self._sent: int | None = None  # the last signal to all

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        """Starts the next process, in a session of its own, so that Ctrl-C on the terminal does not reach it twice."""
        index = len(self._processes)
        out, err = (None, None) if index == 0 else (subprocess.PIPE, subprocess.STDOUT)
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=out, stderr=err)
        self._processes.append(process)
        threading.Thread(target=lambda: (process.wait(), self._ended.put(index)), daemon=True).start()
        if process.stdout is not None:
            reader = threading.Thread(target=_copy, args=(process.stdout, f"[{index}] ".encode()), daemon=True)
            reader.start()
            self._readers.append(reader)
        if self._sent is not None:  # it came while the processes were started
            process.send_signal(self._sent)

    def send(self, number: int) -> None:
        """Sends a signal to all processes that still run."""
        self._sent = number
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Waits for all processes; when one fails, ends the others. Returns the first failure's exit status, or 0."""
        status = 0
        for left in reversed(range(self.count)):
            index = self._next_to_end()
            code = self._processes[index].returncode
            if code:
                status = 128 - code if code < 0 else code
                self._report(index, code, left)
                self._end()
                break
        for reader in self._readers:
            reader.join(timeout=1)  # a grandchild may hold the pipe open
        return status

    def _next_to_end(self) -> int:
        while True:  # Python's handler of a signal that comes just before a wait runs after it: none may be long
            with contextlib.suppress(queue.Empty):
                return self._ended.get(timeout=1)

    def _report(self, index: int, code: int, left: int) -> None:
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"failed with status {code}"
        ending = f"; ending the {f'{left} others' if left > 1 else 'other one'}" if left else ""
        text = f"curvtrain.launch: process {index} of {self.count} (pid {self._processes[index].pid}) {how}{ending}"
        print(text, file=sys.stderr, flush=True)

    def _end(self) -> None:
        self.send(signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self.send(signal.SIGKILL)  # JAX takes SIGTERM for a wish to save, and these wait for the dead
        for process in self._processes:
            process.wait()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    first_line, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m curvtrain.launch",
        description=f"{first_line}\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, required=True, help="how many to start")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--devices", type=int, help="virtual CPU devices of each process; uses the CPU only")
    kind.add_argument("--gpus-per-process", type=int, help="GPUs of each process, in order (default: 1)")
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    options = parser.parse_args(arguments)
    for name in ("processes", "devices", "gpus_per_process"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} should be at least 1, not {value}")
    if not Path(options.script).is_file():
        parser.error(f"there is no script {options.script!r} (in {os.getcwd()})")
    return options


def _environment(options: argparse.Namespace, port: int, index: int) -> dict[str, str]:
    """The environment of process `index`, with the variables that `curvtrain.trainer.distributed` and JAX read."""
    environment = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",  # for nobody else
        "JAX_NUM_PROCESSES": str(options.processes),
        "JAX_PROCESS_ID": str(index),
    }
    if options.devices is not None:
        given = [f for f in os.environ.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in f]
        environment["XLA_FLAGS"] = " ".join([*given, f"--xla_force_host_platform_device_count={options.devices}"])
        environment["JAX_PLATFORMS"] = "cpu"
    elif options.processes > 1 and os.environ.get("JAX_PLATFORMS") != "cpu":
        gpus = options.gpus_per_process or 1
        own = range(index * gpus, (index + 1) * gpus)
        environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, own))
    return environment


@contextlib.contextmanager
def _passed_on(job: Job) -> Generator[None]:
    """Passes SIGTERM and SIGINT on to the processes. If the launcher itself fails, it kills them all."""
    before = {n: signal.signal(n, lambda number, _: job.send(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except BaseException:
        job.send(signal.SIGKILL)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _copy(source: BinaryIO, prefix: bytes) -> None:
    """Copies the lines of a process to the launcher's standard error."""
    with source:
        for line in source:
            sys.stderr.buffer.write(prefix + line if line.endswith(b"\n") else prefix + line + b"\n")
            sys.stderr.buffer.flush()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    sys.exit(main())
