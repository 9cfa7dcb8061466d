"""The bytes that a device stores and sends when a model of equal layers is spread over eight of them by "fsdp"."""

import functools

import numpy as np
import optax
import pytest
from flax import nnx

from curvtrain import CurvatureSchedule, TrainerConfig, losses, optim
from curvtrain.curvature import KFAC, PSGD, Kron, Lanczos, LowRank
from curvtrain.trainer.run.layout import Task
from curvtrain.trainer.run.plan import Plan
from curvtrain.trainer.run.step import Kind
from curvtrain.trainer.watch.report import ProgramReport, collectives

pytestmark = pytest.mark.usefixtures("quick_compile")

UNIT, UPDATE, REFRESH = Kind(), Kind(update=True), Kind(refresh=True)


def kfac():
    return optim.kfac(1e-3, 0.9, 1e-2)


CASES = {
    "Adam": (lambda: optax.adam(1e-3), None),
    "Lanczos": (lambda: optim.fosi(optax.adam(1e-3)), Lanczos(k=5, m=19)),
    "KFAC": (kfac, KFAC()),
    "KFAC, eigh": (kfac, KFAC(inverse="eigh")),
    "KFAC, ekfac": (kfac, KFAC(inverse="ekfac", stale=0.1)),
    "PSGD, Kron": (lambda: optim.psgd(1e-3), PSGD(Kron(block_size=16))),
    "PSGD, Kron whole": (lambda: optim.psgd(1e-3), PSGD(Kron(block_size=None))),
    "PSGD, LowRank": (lambda: optim.psgd(1e-3), PSGD(LowRank(10))),
}


class Equal(nnx.Module):
    def __init__(self, rngs, layers, width):
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(layers)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return x


@functools.cache
def plan_of(name, layers=16, width=64, sharding="fsdp"):
    optimizer, estimator = CASES[name]
    loss = losses.SquaredError()
    task = Task("Equal", lambda rngs: Equal(rngs, layers, width), lambda m, batch: m(batch["x"]), loss, loss.metrics)
    mesh = {"fsdp": 8} if sharding == "fsdp" else {"data": 8}
    config = TrainerConfig(steps=8, batch_size=512, mesh=mesh, sharding=sharding)
    data = {key: np.zeros((512, width), np.float32) for key in ("x", "target")}
    return Plan(config, task, data, optimizer(), estimator, CurvatureSchedule(update_every=2, refresh_every=4, start=1))


@pytest.mark.parametrize("name", [name for name in CASES if name != "Adam"])
def test_bytes_of_a_device(name):
    """A device holds an eighth of the state of optimizer and curvature; nothing large is on every device."""
    report = plan_of(name).state_report()
    parts = report["opt_state"], report["curvature"]
    assert sum(part.per_device for part in parts) <= 1.15 / 8 * sum(part.whole for part in parts), f"\n{report}"
    assert sum(part.replicated for part in parts) <= 0.02 * sum(part.whole for part in parts), f"\n{report}"


@functools.cache
def sent(name, kind, **options):
    """(bytes of all collectives of a program, {kind: bytes}, bytes of the parameters, the text); of four layers."""
    plan = plan_of(name, layers=4, width=128, **options)
    compiled = plan.programs.lower(kind).compile()
    found = ProgramReport.of(str(kind), compiled).sent
    return sum(found.values()), found, plan.state_report()["params"].whole, compiled.as_text()


def test_an_unscheduled_step_sends_what_adams_does():
    """And inner products, or what preconditioning needs: K-FAC's gradients on their way to the owners and back, of Kron
    the factors (blocks of 16 rows of 128) of the sides that are not split."""
    plain, by_kind, params, _ = sent("Adam", UNIT)
    assert by_kind["all-gather"] > 0.9 * params  # of the weights, which are split
    for name, extra in {
        "Lanczos": 0.05,
        "PSGD, Kron": 16 / 128 + 0.02,
        "PSGD, LowRank": 0.05,
        "KFAC, eigh": 0.6,
    }.items():
        total, found, *_ = sent(name, UNIT)
        assert total <= plain + extra * params, (name, found, by_kind, params)


def test_a_refresh_of_eigenpairs_gathers_weights_alone():
    """They are gathered one at a time, for the products; the basis, 19 times the parameters, stays where it is."""
    for sharding, times in (("fsdp", 3), ("replicated", 0)):
        plain = sent("Adam", UNIT, sharding=sharding)[1].get("all-gather", 0)
        _, found, params, text = sent("Lanczos", REFRESH, sharding=sharding)
        assert found.get("all-gather", 0) <= plain + times * params, found
        assert found["all-reduce"] <= 4 * params, found
        for line in text.splitlines():
            if " all-gather(" in line:
                assert collectives(line)[1]["all-gather"] <= 4 * 128 * 128, line
