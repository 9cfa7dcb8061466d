"""`Trainer(trainable=...)`: frozen parameters stay as they are, are sharded and saved, and are in nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from test_trainer import batches
from tiny import CLASSES, FEATURES, Counting, Mlp, assert_trees_close, assert_trees_equal, examples, losses_of, trainer

from curvtrain import optim
from curvtrain.curvature import KFAC, PSGD, Lanczos
from curvtrain.objective import by_path

pytestmark = pytest.mark.usefixtures("quick_compile")
OUTER = nnx.PathContains("outer")
PATHS = {("outer", "bias"), ("outer", "kernel")}


def names(tree):
    """The parameters' names that occur in the paths of a tree."""
    return {part for path in by_path(tree) for part in path if part in ("inner", "outer", "frozen")}


class Adapted(nnx.Module):
    """A layer with a low-rank addition, and a normed head."""

    def __init__(self, rngs):
        self.inner = nnx.LoRALinear(FEATURES, 8, lora_rank=2, rngs=rngs)
        self.norm, self.outer = nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.tanh(self.norm(self.inner(x))))


def test_the_trained_part_moves_as_in_a_loop_over_it_alone():
    run = trainer(steps=5, optimizer=optax.adam(1e-2), trainable=OUTER, log_every=1, ema=0.9)
    before = jax.tree.map(np.asarray, run.state.frozen)
    head, tx, expected = Mlp(nnx.Rngs(0)).outer, optax.adam(1e-2), []
    params = jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(head)))
    body = nnx.merge(*nnx.split(Mlp(nnx.Rngs(0)).inner))
    opt_state = tx.init(params)

    def loss(params, batch):
        logits = nnx.tanh(body(batch["x"])) @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    for batch in batches(5):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        expected.append(value)
    np.testing.assert_allclose(losses_of(run.fit()), expected, rtol=1e-4)
    assert_trees_close(run.state.params["outer"], params, rtol=1e-4, atol=1e-5)
    assert set(by_path(run.state.params)) == set(by_path(run.state.ema)) == PATHS
    assert set(by_path(run.state.frozen)) == {("inner", "bias"), ("inner", "kernel")}
    assert names(run.state.opt_state) == {"outer"}
    assert_trees_equal(run.state.frozen, before)
    np.testing.assert_array_equal(run.model.inner.kernel[...], before["inner"]["kernel"])


@pytest.mark.parametrize(
    ("tx", "estimator"),
    [
        (optax.sgd(0.1), Counting()),
        (optim.fosi(optax.sgd(0.1)), Lanczos(k=2)),
        (optim.kfac(0.1, 0.5, 0.1), KFAC()),
        (optim.psgd(1e-2), PSGD()),
    ],
    ids=["Counting", "Lanczos", "KFAC", "PSGD"],
)
def test_curvature_is_that_of_the_trained_part(tx, estimator):
    run = trainer(steps=4, optimizer=tx, curvature=estimator, trainable=OUTER, train_data=examples(), log_every=1)
    before = jax.tree.map(np.asarray, run.state.frozen)
    assert "inner" not in names((run.state.curvature, run.state.opt_state))
    history = losses_of(run.fit())
    assert np.all(np.isfinite(history))
    assert_trees_equal(run.state.frozen, before)


@pytest.mark.parametrize("trainable", [nnx.LoRAParam, lambda path, _: path[-1] in ("lora_a", "lora_b")])
def test_low_rank_adapters(trainable):
    run = trainer(model=Adapted, steps=20, optimizer=optax.adam(5e-2), trainable=trainable, log_every=1)
    assert {path[-1] for path in by_path(run.state.params)} == {"lora_a", "lora_b"}
    assert len(by_path(run.state.frozen)) == 6
    frozen, statistics = jax.tree.map(np.asarray, (run.state.frozen, run.state.model_state))
    history = losses_of(run.fit())
    assert history[-1] < history[0]
    assert_trees_equal(run.state.frozen, frozen)
    assert np.abs(run.state.model_state["norm"]["mean"] - statistics["norm"]["mean"]).max() > 0  # it is no parameter


def test_a_filter_of_paths_trains_parameters_alone():
    """Not the batch statistics that it matches too."""
    run = trainer(model=Adapted, steps=1, trainable=nnx.PathContains("norm"))
    assert {path[-1] for path in by_path(run.state.params)} == {"scale", "bias"}


def test_frozen_parameters_are_sharded_like_others():
    rules = [("inner/kernel", P(None, "data")), ("outer/kernel", P("data"))]
    run = trainer(steps=2, trainable=OUTER, sharding=rules)
    run.fit()
    assert run.state.frozen["inner"]["kernel"].sharding.spec == P(None, "data")
    assert run.state.params["outer"]["kernel"].sharding.spec == P("data")
    wide = trainer(
        model=lambda rngs: Mlp(rngs, width=512), trainable=OUTER, mesh={"data": 2, "fsdp": 4}, sharding="fsdp"
    )
    assert wide.state.frozen["inner"]["kernel"].addressable_shards[0].data.shape == (FEATURES, 128)
    parts = wide.dry_run().state
    assert parts["frozen"].whole == 4 * 512 * (FEATURES + 1) and parts["params"].whole == 4 * CLASSES * 513


def test_frozen_parameters_are_in_checkpoints(tmp_path):
    options = dict(model=Adapted, optimizer=optax.adam(1e-2), trainable=nnx.LoRAParam, eval_data=examples(20, seed=1))
    whole = trainer(steps=4, **options)
    scores = whole.fit().metrics
    trainer(steps=2, workdir=tmp_path, **options).fit()

    # what is restored counts, not what build_model makes
    other = lambda rngs: Adapted(nnx.Rngs(7))
    again = trainer(steps=4, workdir=tmp_path, **(options | {"model": other}))
    result = again.fit()
    assert result.step == 4 and result.metrics["eval/loss"] == scores["eval/loss"]
    assert_trees_equal(again.state.frozen, whole.state.frozen)
    x = examples()["x"]
    np.testing.assert_array_equal(again.model(x), whole.model(x))
    np.testing.assert_array_equal(trainer(steps=4, **options).load_model(tmp_path)(x), whole.model(x))
    assert whole.evaluate()["loss"] == scores["eval/loss"]
    objective, params = whole.objective, whole.state.params
    loss = objective.evaluation().loss(params, jax.tree.map(jnp.asarray, examples(20, seed=1)))
    np.testing.assert_allclose(loss, scores["eval/loss"], rtol=1e-5)


def test_without_frozen_parameters_the_state_has_no_such_part():
    """So checkpoints are as they were before there were any."""
    assert "frozen" not in names(trainer().state)
    everything = trainer(trainable=...).state
    assert everything.frozen is None and set(by_path(everything.params)) == set(by_path(trainer().state.params))


def test_frozen_parameters_are_announced(capsys):
    trainer(steps=1, trainable=OUTER, progress=True).fit()
    lines = capsys.readouterr().out.splitlines()
    assert "and 56 frozen parameters in 2 arrays, 224 B" in lines
