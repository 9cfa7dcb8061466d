"""The launcher on scripts that do not use JAX: what the processes are told, and how they end."""

import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import curvtrain
from curvtrain import launch
from curvtrain.trainer import distributed


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text("import os, signal, sys, time\nindex = int(os.environ['JAX_PROCESS_ID'])\n" + text)
    return str(path)


def test_processes_are_told_what_a_trainer_reads(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8")
    main = script(tmp_path, "import json; print(json.dumps([dict(os.environ), sys.argv[1:]]))")
    assert launch.main(["--processes", "3", "--devices", "2", main, "a", "--processes", "9"]) == 0
    out, err = capfd.readouterr()
    lines = [out.strip(), *sorted(err.strip().splitlines())]
    assert lines[1].startswith("[1] ") and lines[2].startswith("[2] ")
    told = [json.loads(line.removeprefix(f"[{index}] ")) for index, line in enumerate(lines)]
    assert all(arguments == ["a", "--processes", "9"] for _, arguments in told)
    jobs = [distributed.job_of(environment) for environment, _ in told]
    assert jobs == [("JAX_NUM_PROCESSES=3", 3, index) for index in range(3)]
    (address,) = {environment["JAX_COORDINATOR_ADDRESS"] for environment, _ in told}
    assert address.startswith("127.0.0.1:")
    assert told[1][0]["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=2"
    assert told[1][0]["JAX_PLATFORMS"] == "cpu" and "JAX_LOCAL_DEVICE_IDS" not in told[1][0]


def test_each_process_has_gpus_of_its_own(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    main = script(tmp_path, "print(os.environ['JAX_LOCAL_DEVICE_IDS'])")
    assert launch.main(["--processes", "2", "--gpus-per-process", "2", main]) == 0
    assert capfd.readouterr() == ("0,1\n", "[1] 2,3\n")


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("sys.exit(7)", 7, "failed with status 7"),
        ("raise ValueError('on purpose')", 1, "failed with status 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was ended by SIGKILL"),
    ],
)
def test_one_that_fails_ends_all(tmp_path, capfd, end, status, said):
    main = script(tmp_path, f"if index == 1: {end}\ntime.sleep(60)")
    began = time.monotonic()
    assert launch.main(["--processes", "3", main]) == status
    assert time.monotonic() - began < 5
    err = capfd.readouterr().err
    assert "curvtrain.launch: process 1 of 3 (pid " in err and f"{said}; ending the 2 others" in err
    assert ("[1] ValueError: on purpose" in err) == ("ValueError" in end)


def test_one_that_does_not_hear_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.2)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif index == 1: time.sleep(1); sys.exit(3)\ntime.sleep(60)"
    assert launch.main(["--processes", "2", script(tmp_path, deaf)]) == 3


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_signals_are_passed_on_once(tmp_path, number, name):
    heard = f"""
def hear(*_):
    print("heard", index, flush=True)
    time.sleep(0.5)
    sys.exit(0)
signal.signal(signal.{name}, hear)
print("ready", index, flush=True)
for _ in range(300):  # a signal that comes just before a sleep is heard after it
    time.sleep(0.1)
"""
    # without the package around it, which takes seconds to import
    command = [sys.executable, launch.__file__, "--processes", "2", script(tmp_path, heard)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "ready 0\n" and job.stderr.readline() == "[1] ready 1\n"
        job.send_signal(number)
        out, err = job.communicate(timeout=50)
    assert job.returncode == 0
    assert (out, err) == ("heard 0\n", "[1] heard 1\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes", "2", "nowhere.py"], "there is no script 'nowhere.py'"),
        (["--processes", "0", curvtrain.__file__], "--processes should be at least 1, not 0"),
        (["--processes", "2", "--devices", "-1", curvtrain.__file__], "--devices should be at least 1, not -1"),
        (["--processes", "two", curvtrain.__file__], "invalid int value: 'two'"),
        ([curvtrain.__file__], "required: --processes"),
        (["--processes", "2", "--devices", "2", "--gpus-per-process", "1", "a.py"], "not allowed with argument"),
    ],
)
def test_bad_command_lines(capsys, arguments, said):
    with pytest.raises(SystemExit) as end:
        launch.main(arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------------- what says that there are several

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        (EXPLICIT, ("JAX_NUM_PROCESSES=4", 4, 3)),
        ({**SLURM, **MPI, **EXPLICIT}, ("JAX_NUM_PROCESSES=4", 4, 3)),
        ({**EXPLICIT, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, ("SLURM_STEP_NUM_TASKS=2", 2, 1)),
        (without(SLURM, "SLURM_STEP_NUM_TASKS"), ("SLURM_NTASKS=8", 8, 1)),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # a shell in an allocation of eight
        (without(SLURM, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"), None),  # a batch script, not under srun
        (MPI, ("OMPI_COMM_WORLD_SIZE=2", 2, 0)),
        ({**without(MPI, "OMPI_MCA_orte_hnp_uri"), "JAX_COORDINATOR_ADDRESS": "a:1"}, ("OMPI_COMM_WORLD_SIZE=2", 2, 0)),
    ],
)
def test_environments(environment, job):
    assert distributed.job_of(environment) == job


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (without(EXPLICIT, "JAX_COORDINATOR_ADDRESS"), "JAX_COORDINATOR_ADDRESS is missing"),
        (without(EXPLICIT, "JAX_PROCESS_ID"), "JAX_PROCESS_ID is missing"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID are missing"),
        ({**EXPLICIT, "JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 should be at least 0 and below JAX_NUM_PROCESSES=4"),
        ({**EXPLICIT, "JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES should be a whole number, and is 'four'"),
        (without(MPI, "OMPI_MCA_orte_hnp_uri"), "set JAX_COORDINATOR_ADDRESS=host:port"),
    ],
)
def test_environments_that_contradict_themselves(environment, said):
    with pytest.raises(ValueError, match=said):
        distributed.job_of(environment)


def test_a_single_process_starts_nothing():
    distributed.start()
    distributed.start()
    assert not distributed.preempted() and distributed.gather({"a": 1}) == [{"a": 1}]


def several(monkeypatch, index, others):
    """As if this were one of several processes, of which the others gather these values."""
    import jax

    monkeypatch.setattr(jax, "process_index", lambda: index)
    values = iter(others)
    monkeypatch.setattr(
        distributed, "gather", lambda own: (lambda all: [*all[:index], own, *all[index:]])(next(values))
    )
    monkeypatch.setattr(jax, "process_count", lambda: len(others[0]) + 1)


def test_what_differs_is_named(monkeypatch):
    several(monkeypatch, 1, [[{"a": 1, "b": [2]}, {"a": 1, "b": [2], "c": None}]])
    with pytest.raises(ValueError, match=r"these differ:\n  b: \[2\] on process 0, \[3\] on process 1\nWhat"):
        distributed.check_same({"a": 1, "b": [3]})


def test_a_problem_of_one_is_that_of_all(monkeypatch):
    several(monkeypatch, 0, [["full"], [None]])
    assert distributed.first_problem(None) == "full (on process 1 of 2)" and distributed.first_problem(None) is None


def test_what_process_0_alone_does(monkeypatch):
    several(monkeypatch, 1, [[[[1, 2], None]], [[None, "No space left"]]])
    assert distributed.from_first(lambda: pytest.fail("not here")) == [1, 2]
    with pytest.raises(OSError, match="No space left"):
        distributed.from_first(lambda: pytest.fail("not here"))


def test_unequal_numbers_of_devices(monkeypatch):
    import jax

    devices = [types.SimpleNamespace(process_index=index) for index in (0, 0, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(ValueError, match=r"the same number of devices, and they have \{0: 2, 1: 1\}, by process"):
        distributed._check_devices()


def test_devices_that_were_used_before(monkeypatch):
    import jax

    assert jax.devices()
    for name, value in EXPLICIT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"3 of 4 \(JAX_NUM_PROCESSES=4\), but JAX's devices were used"):
        distributed.start()
