"""Several processes of one run: how they find each other, agree on a value, and end together.

| environment | variables |
|---|---|
| explicit, and `python -m curvtrain.launch` | `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID` |
| SLURM, under `srun` | `SLURM_STEP_NUM_TASKS` (else `SLURM_NTASKS`), `SLURM_PROCID`, ... |
| Open MPI, under `mpirun` | `OMPI_COMM_WORLD_SIZE`, `OMPI_COMM_WORLD_RANK`, ... |

The first row whose variables are set counts. JAX reads the rest itself: the coordinator's address of SLURM and Open
MPI 4, the GPUs of each process of a host, `JAX_LOCAL_DEVICE_IDS` and `JAX_COORDINATOR_BIND_ADDRESS`.
"""

import atexit
import collections
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_polls = itertools.count(1)  # numbers the calls of `preempted` over this process's life
_exits: list[int] = []  # the status of the SystemExit that left `exits_noted`, if one did


def start() -> None:
    """Starts `jax.distributed` if the environment says that this process is one of several; else does nothing.

    A Trainer calls it when it is made, so a script needs it only if it uses JAX's devices before that. It may be called
    any number of times, and does nothing where the script itself called `jax.distributed.initialize`.

    From here on an error that nobody catches ends the process at once, and so does a SystemExit with a status other
    than 0 that leaves `Trainer.fit`. Python's usual end waits for the other processes, which in turn wait for this one:
    to end all processes from elsewhere in a script, raise an error; `sys.exit` waits up to five minutes.

    Raises:
      ValueError: the variables contradict each other, or some are missing; processes have different numbers of devices.
      RuntimeError: devices were used before; the other processes cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    job = job_of(os.environ)
    if job is None:
        return
    source, count, index = job
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except RuntimeError as error:
        if "before any JAX calls" not in str(error):
            raise
        raise RuntimeError(
            f"This process is number {index} of {count} ({source}), but JAX's devices were used before they could be "
            f"joined. Make the Trainer first, or call curvtrain.trainer.distributed.start() at the top of the script."
        ) from None
    _end_at_once_on_errors()
    _check_devices()


def job_of(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(the variable that says so, number of processes, index of this one), by the environment; None for one process."""
    have = lambda name: name in environment
    if have(COUNT) or have(INDEX):
        missing = [name for name in (ADDRESS, COUNT, INDEX) if not have(name)]
        names = (COUNT, INDEX)
    elif have("SLURM_PROCID") and have("SLURM_STEP_NODELIST"):  # a step of srun, not a plain batch script
        missing, names = (
            [],
            ("SLURM_STEP_NUM_TASKS" if have("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS", "SLURM_PROCID"),
        )
    elif have("OMPI_COMM_WORLD_SIZE"):
        missing, names = [], ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    elif have(ADDRESS):
        missing, names = [COUNT, INDEX], (COUNT, INDEX)
    else:
        return None
    if missing:
        raise ValueError(
            f"The environment of one of several processes should set {ADDRESS}, {COUNT} and {INDEX}; "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing."
        )
    count, index = (_integer(environment, name) for name in names)
    if not 0 <= index < count:
        raise ValueError(f"{names[1]}={index} should be at least 0 and below {names[0]}={count}.")
    if count == 1:
        return None
    if names[0].startswith("OMPI") and not (have(ADDRESS) or have("OMPI_MCA_orte_hnp_uri")):
        raise ValueError(
            f"This Open MPI does not tell where its processes can meet (Open MPI 4 did): set {ADDRESS}=host:port, the "
            f"host of process 0 and a free port there, as in mpirun -x {ADDRESS}=node1:41234 ..."
        )
    return f"{names[0]}={count}", count, index


def preempted() -> bool:
    """Says whether SIGTERM came to any process; all processes learn of it in the same call.

    Every process should call it equally often: JAX's service picks, in the background, a call that none of them has
    made yet. A call costs well below a microsecond. Calls are numbered over the life of the process, not by step: the
    service compares numbers for equality, so after a resume the step would be past what it picks.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_polls))


def gather(value: Any) -> list[Any]:
    """A plain JSON value of every process, by process index. All processes should call it."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(own.size))).ravel()
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: own.size] = own
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(act: Callable[[], Any]) -> Any:
    """Calls `act` on process 0 alone and returns its result, plain JSON, on all; an OSError there is raised on all."""
    value = error = None
    if jax.process_index() == 0:
        try:
            value = act()
        except OSError as caught:
            error = caught
    value, problem = gather([value, None if error is None else str(error)])[0]
    if problem is not None:
        raise error or OSError(problem)
    return value


def first_problem(problem: str | None) -> str | None:
    """The problem of the first process that has one, with that process's index, for all processes to raise alike."""
    problems = gather(problem)
    for index, found in enumerate(problems):
        if found is not None:
            return f"{found} (on process {index} of {len(problems)})" if len(problems) > 1 else found
    return None


def check_same(run: Mapping[str, Any]) -> None:
    """Raises ValueError on all processes if an entry, plain JSON, is not the same on all: names it and the values."""
    everyones = gather(dict(run))
    differences = []
    for name in dict.fromkeys(name for other in everyones for name in other):
        values = [other.get(name) for other in everyones]
        odd = next((index for index, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            differences.append(f"{name}: {values[0]} on process 0, {values[odd]} on process {odd}")
    if differences:
        raise ValueError(
            "All processes should be given the same run, and these differ:\n  " + "\n  ".join(differences) + "\n"
            "What depends on the process (its index, host, time or random numbers) should not get into it."
        )


def _integer(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.strip().isdecimal():
        raise ValueError(f"The environment variable {name} should be a whole number, and is {text!r}.")
    return int(text)


def _check_devices() -> None:
    """Raises ValueError unless all processes have equally many devices: every process knows all, so all raise."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"All processes should have the same number of devices, and they have {dict(sorted(counts.items()))}, by "
            f"process. Give them equally many: --devices or --gpus-per-process, JAX_LOCAL_DEVICE_IDS, SLURM's options."
        )


@contextlib.contextmanager
def exits_noted() -> Generator[None]:
    """A SystemExit with a status other than 0 that leaves this context ends the process, when its script ends, at once.

    `fit` is such a context. Python does not tell its exit handlers the status, so it is noted here, and kept until the
    next such context begins: a script that catches the SystemExit ends with its status too.
    """
    _exits.clear()
    try:
        yield
    except SystemExit as end:
        if _status(end):
            _exits.append(_status(end))
        raise


def _end_at_once_on_errors() -> None:
    """Otherwise JAX, at the interpreter's end, waits five minutes for the others, and they wait in a collective."""
    before = sys.excepthook

    def hook(kind, value, trace):
        try:
            before(kind, value, trace)
        finally:
            _end(130 if issubclass(kind, KeyboardInterrupt) else 1)

    def at_exit():
        if _exits:
            _end(_exits[-1])

    sys.excepthook = hook
    atexit.register(at_exit)  # Handlers run in reverse order: this one is registered after JAX's, and runs before it.


def _status(end: SystemExit) -> int:
    return end.code if isinstance(end.code, int) else int(end.code is not None)


def _end(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)
