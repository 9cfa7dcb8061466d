"""The compilation cache of a run: a second start compiles nothing, and JAX's own options are left alone."""

import collections
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from meshes import on
from tiny import Counting, Mlp, examples, trainer

from curvtrain import CurvatureSchedule
from curvtrain.trainer import Call

OPTIONS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
START = """
import collections, json, sys
import jax, run_small

events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rsplit("/", 1)[-1]]))
run_small.main(**json.loads(sys.argv[1]))
print(json.dumps([events["cache_hits"], events["cache_misses"]]))
"""


@contextlib.contextmanager
def counted():
    """The numbers of hits and misses of JAX's persistent cache."""
    events = collections.Counter()
    listener = lambda event, **_: events.update([event.rsplit("/", 1)[-1]])
    jax.clear_caches()
    jax.monitoring.register_event_listener(listener)
    yield events
    jax.monitoring.unregister_event_listener(listener)


@pytest.fixture(autouse=True)
def no_cache_of_the_user(quick_compile, monkeypatch):
    """Neither of the environment nor of another test; and one device: of several CPUs nothing is kept."""
    on(1, monkeypatch)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def make(steps=3, **options):
    schedule = CurvatureSchedule(refresh_every=2, start=1)
    rest = dict(curvature=Counting(), schedule=schedule, eval_data=examples(20), eval_every=2)
    return trainer(steps=steps, optimizer=optax.adam(1e-2), ema=0.9, **rest, **options)


def current():
    return [getattr(jax.config, name) for name in OPTIONS]


def test_a_second_start_compiles_nothing(tmp_path):
    before = current()
    with counted() as first:
        make(workdir=tmp_path).fit()
    assert first["cache_misses"] >= 4 > first["cache_hits"]  # two kinds of step, telemetry, evaluation, ...
    assert list((tmp_path / "compiled").iterdir()) and current() == before
    with counted() as resumed:
        make(workdir=tmp_path, steps=5).fit()
    with counted() as again:
        make(workdir=tmp_path / "elsewhere", compilation_cache=tmp_path / "compiled").fit()
    assert again["cache_misses"] == 0 and again["cache_hits"] == first["cache_misses"] + first["cache_hits"]
    assert resumed["cache_hits"] >= 4  # what it may compile are copies of what it reads, a few bytes each
    assert not (tmp_path / "elsewhere" / "compiled").exists()


def test_another_program_is_another_entry(tmp_path):
    make(workdir=tmp_path).fit()
    with counted() as other:
        make(workdir=tmp_path / "wide", compilation_cache=tmp_path / "compiled", model=lambda r: Mlp(r, width=9)).fit()
    assert other["cache_misses"] >= 3


@pytest.mark.parametrize("option", [False, None])
def test_it_can_be_turned_off(tmp_path, option):
    with counted() as events:
        make(workdir=tmp_path, compilation_cache=option).fit()
    assert events["cache_misses"] == events["cache_hits"] == 0 and not (tmp_path / "compiled").exists()


def test_without_a_workdir_nothing_is_kept(tmp_path):
    with counted() as events:
        make().fit()
    assert events["cache_misses"] == 0
    with counted() as events:
        make(compilation_cache=tmp_path / "here").fit()
    assert events["cache_misses"] >= 4 and list((tmp_path / "here").iterdir())


def test_a_cache_of_the_user_is_used_as_it_is(tmp_path):
    seen, own = [], str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", own)
    compilation_cache.reset_cache()
    make(workdir=tmp_path / "run", hooks=[Call(lambda _: seen.append(current()))]).fit()
    assert seen[0] == [own, 1.0] and not (tmp_path / "run" / "compiled").exists()
    make(
        workdir=tmp_path / "run", steps=4, hooks=[Call(lambda _: seen.append(current()))], compilation_cache=tmp_path
    ).fit()
    assert seen[-1] == [str(tmp_path), 0.0] and current() == [own, 1.0]


@pytest.mark.parametrize("whose", ["the run's", "a folder", "the user's"])
def test_on_several_cpu_devices_nothing_is_kept_or_read(tmp_path, monkeypatch, whose):
    """Programs with collectives may hang when they are read back. Outside of `fit` the user's cache is JAX's affair."""
    on(2, monkeypatch)
    own, folder = str(tmp_path / "own"), {"a folder": tmp_path / "here"}.get(whose, True)
    if whose == "the user's":
        jax.config.update("jax_compilation_cache_dir", own)
        compilation_cache.reset_cache()
    for name in ("first", "second"):
        with counted() as events:
            make(workdir=tmp_path / name, compilation_cache=folder).fit()
        assert events["cache_hits"] == 0 or whose == "the user's"
    kept = [path.name for path in tmp_path.rglob("*-cache")]
    assert not any(name.startswith("jit_step") for name in kept) and jax.config.jax_enable_compilation_cache


def test_options_are_put_back_after_an_error(tmp_path):
    def fail(_):
        raise ZeroDivisionError

    before = current()
    with pytest.raises(ZeroDivisionError):
        make(workdir=tmp_path, hooks=[Call(fail)]).fit()
    assert current() == before


def test_an_entry_that_a_full_disk_cut_short_is_removed(tmp_path):
    def cut(_):
        for path in (tmp_path / "compiled").glob("jit_step*-cache"):
            path.write_bytes(path.read_bytes()[:-5])

    make(workdir=tmp_path, hooks=[Call(cut)]).fit()
    kept = list((tmp_path / "compiled").iterdir())
    assert kept and not any(path.name.startswith("jit_step") for path in kept)


def test_an_entry_that_a_kill_cut_short_is_passed_over(tmp_path):
    make(workdir=tmp_path).fit()
    for entry in (tmp_path / "compiled").glob("jit_step*-cache"):
        entry.write_bytes(entry.read_bytes()[:100])
    jax.clear_caches()
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry for 'jit_step'"):
        result = make(workdir=tmp_path, steps=5).fit()
    assert result.step == 5


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["lanczos", "kfac", "psgd"])
def test_programs_are_the_same_in_every_process(tmp_path, estimator):
    """Whatever the order of Python's sets: a new process finds all that the first has compiled."""
    found = []
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ""}
    for seed, name in (("1", "first"), ("2", "second")):
        options = dict(
            workdir=str(tmp_path / name), compilation_cache=str(tmp_path / "cache"), steps=6, estimator=estimator
        )
        done = subprocess.run(
            [sys.executable, "-c", START, json.dumps(options)],
            env={**environment, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (repeated, compiled), (hits, missed) = found  # small programs may be the same one
    assert missed == 0 and hits == compiled + repeated and compiled >= 5
