"""Mistakes are reported at once, before any cost: with the argument's name, the value, and what to do."""

import functools

import grain
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny import CLASSES, FEATURES, Classifier, Counting, Mlp, examples, trainer

from curvtrain import CurvatureSchedule, Objective, losses, optim
from curvtrain.curvature import KFAC, PSGD, DiagonalFisher, Lanczos
from curvtrain.trainer import EarlyStopping
from curvtrain.trainer.run.layout import Layout
from curvtrain.trainer.run.programs import Programs


@pytest.fixture
def untouched(tmp_path, monkeypatch):
    """A workdir that nothing is written into; compiling anything is an error."""

    def refuse(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(Programs, "step", refuse)
    monkeypatch.setattr(Layout, "initial_state", refuse)
    workdir = tmp_path / "run"
    arrays = len(jax.live_arrays())
    yield workdir
    assert not workdir.exists()
    assert len(jax.live_arrays()) <= arrays


def arrays(**changes):
    return {name: a for name, a in {**examples(), **changes}.items() if a is not None}


CONFIG = {
    "steps": (dict(steps=0), ValueError, r"TrainerConfig\(steps\) should be at least 1, not 0"),
    "steps, float": (
        dict(steps=1e3),
        TypeError,
        r"TrainerConfig\(steps\) should be an integer, not 1000.0 of type float",
    ),
    "batch_size": (dict(batch_size=-8), ValueError, r"TrainerConfig\(batch_size\) should be at least 1, not -8"),
    "seed": (dict(seed=-1), ValueError, r"TrainerConfig\(seed\) should be at least 0, not -1"),
    "save_every": (dict(save_every=0), ValueError, r"TrainerConfig\(save_every\) should be at least 1, not 0"),
    "eval_every": (dict(eval_every=0), ValueError, r"TrainerConfig\(eval_every\) should be at least 1, not 0"),
    "log_every": (dict(log_every=True), TypeError, r"TrainerConfig\(log_every\) should be an integer, not True"),
    "keep_latest": (dict(keep_latest=0), ValueError, r"TrainerConfig\(keep_latest\) should be at least 1, not 0"),
    "accumulate": (
        dict(accumulate=3),
        ValueError,
        r"TrainerConfig\(accumulate\) should divide batch_size=16, and 3 does",
    ),
    "ema": (dict(ema=1.0), ValueError, r"TrainerConfig\(ema\) should be at least 0.0 and below 1.0, not 1.0"),
    "best_mode": (dict(best_mode="mx"), ValueError, r"TrainerConfig\(best_mode\) .* not 'mx'. Did you mean 'max'\?"),
    "writers": (dict(writers=["json"]), ValueError, r"TrainerConfig\(writers\) .* not 'json'. Did you mean 'jsonl'\?"),
    "writers, one": (
        dict(writers="jsonl"),
        TypeError,
        r"TrainerConfig\(writers\) should be a list of names, such as \['js",
    ),
    "compilation_cache": (
        dict(compilation_cache=3),
        TypeError,
        r"TrainerConfig\(compilation_cache\) should be True, False, a path or None, not int",
    ),
    "sharding": (dict(sharding="fdsp"), ValueError, r"TrainerConfig\(sharding\) .* not 'fdsp'. Did you mean 'fsdp'\?"),
    "sharding, none": (
        dict(sharding=None),
        TypeError,
        r"TrainerConfig\(sharding\) should be .*; None is not such a pair",
    ),
    "sharding, rules": (
        dict(sharding=[("kernel", ("data",))]),
        TypeError,
        r"TrainerConfig\(sharding\) should be .* PartitionSpec\) pairs; \('kernel', \('data',\)\) is not such a pair",
    ),
    "sharding, word": (
        dict(sharding=[("kernel", "fdsp")]),
        ValueError,
        r"TrainerConfig\(sharding\) of 'kernel' should be .* not 'fdsp'. Did you mean 'fsdp'\?",
    ),
    "sharding, regex": (
        dict(sharding=[("(kernel", P("data"))]),
        ValueError,
        r"TrainerConfig\(sharding\): '\(kernel' is not a regular expression",
    ),
    "mesh": (dict(mesh=("data", 8)), TypeError, r"TrainerConfig\(mesh\) should be a dict of axes and sizes"),
    "mesh, axis": (
        dict(mesh={"fspd": 8}),
        ValueError,
        r"TrainerConfig\(mesh\) axis .* not 'fspd'. Did you mean 'fsdp'\?",
    ),
    "mesh, size": (
        dict(mesh={"data": 5}),
        ValueError,
        r"TrainerConfig\(mesh=\{'data': 5\}\) should multiply to the 8 dev",
    ),
    "batch over mesh": (
        dict(batch_size=12),
        ValueError,
        r"TrainerConfig\(batch_size=12\) should be divisible over the mesh",
    ),
    "micro-batch over mesh": (
        dict(accumulate=4),
        ValueError,
        r"TrainerConfig\(accumulate=4\) leaves micro-batches of 4 examples, which are not divisible over the mesh",
    ),
    "eval_batch_size": (
        dict(eval_batch_size=9),
        ValueError,
        r"TrainerConfig\(eval_batch_size=9\) should be divisible over",
    ),
}

DATA = {
    "unequal": (
        dict(train_data=arrays(label=np.zeros(5, np.int32))),
        ValueError,
        r"The arrays of train_data should have one length, the number of examples, not \{'x': 64, 'label': 5\}",
    ),
    "empty": (dict(train_data={}), ValueError, "train_data is an empty dict"),
    "no examples": (dict(train_data={k: v[:0] for k, v in arrays().items()}), ValueError, "train_data has no examples"),
    "too few": (
        dict(batch_size=128),
        ValueError,
        r"train_data has 64 examples, fewer than TrainerConfig\(batch_size=128\)",
    ),
    "a list": (
        dict(train_data=[1]),
        TypeError,
        r"train_data should be a dict of numpy arrays or a grain dataset.* not list",
    ),
    "no labels": (
        dict(train_data=arrays(label=None)),
        KeyError,
        r"SoftmaxCrossEntropy\(labels\)='label' is not in the batch",
    ),
    "labels too large": (
        dict(train_data=arrays(label=np.arange(64) % 4)),
        ValueError,
        r"SoftmaxCrossEntropy\(labels='label'\): labels run from 0 to 3, but the model has 3 outputs, so .* \[0, 2\]",
    ),
    "labels negative": (dict(train_data=arrays(label=np.full(64, -1))), ValueError, r"labels run from -1 to -1"),
    "labels of floats": (
        dict(train_data=arrays(label=np.zeros(64))),
        TypeError,
        r"SoftmaxCrossEntropy\(labels='label'\) needs integer class labels, not float64",
    ),
    "grain": (
        dict(train_data=grain.MapDataset.source([arrays()])),
        ValueError,
        r"train_data yields batches of 64 examples, but TrainerConfig\(batch_size=16\).*\.batch\(16, drop_rem",
    ),
    "eval labels too large": (
        dict(eval_data=arrays(label=np.full(64, 9))),
        ValueError,
        r"labels run from 9 to 9, but the model has 3 outputs",
    ),
    "eval labels of floats": (
        dict(eval_data=arrays(label=np.zeros(64))),
        TypeError,
        r"integer class labels, not float64",
    ),
    "eval unequal": (
        dict(eval_data=arrays(x=np.zeros((3, 6)))),
        ValueError,
        r"The arrays of eval_data should have one length",
    ),
    "eval of another shape": (dict(eval_data=arrays(x=np.zeros((64, 7)))), TypeError, r"dot_general"),
    "eval a list": (
        dict(eval_data=[1]),
        TypeError,
        r"eval_data should be a dict of numpy arrays or a finite grain.* not list",
    ),
    "eval grain": (
        dict(eval_data=grain.MapDataset.source([arrays(label=np.full(64, 9))])),
        ValueError,
        r"labels run from 9 to 9, but the model has 3 outputs",
    ),
    "eval grain, endless": (
        dict(eval_data=grain.MapDataset.range(8).repeat().batch(4)),
        ValueError,
        r"eval_data repeats without end.*leave out \.repeat\(\)",
    ),
    "eval grain, empty": (
        dict(eval_data=grain.MapDataset.range(0).batch(4)),
        ValueError,
        r"eval_data is an empty grain dataset",
    ),
}

PARTS = {
    "optimizer": (
        dict(optimizer=optax.adam),
        TypeError,
        r"Classifier\(optimizer\) should be an optax transformation, not f",
    ),
    "curvature": (
        dict(curvature="lanczos"),
        TypeError,
        r"Classifier\(curvature\) should be a CurvatureEstimator, not str",
    ),
    "curvature, class": (dict(curvature=Lanczos), TypeError, r"Classifier\(curvature\) should be a CurvatureEstimator"),
    "schedule": (
        dict(curvature=Counting(), schedule=100),
        TypeError,
        r"Classifier\(schedule\) should be a CurvatureSch.* int",
    ),
    "schedule alone": (
        dict(schedule=CurvatureSchedule()),
        ValueError,
        r"Classifier\(schedule\) was given without curvature: there is nothing to schedule",
    ),
    "refresh batch": (
        dict(curvature=Counting(), schedule=CurvatureSchedule(batch_size=40)),
        ValueError,
        r"CurvatureSchedule\(batch_size=40\) should be a multiple of TrainerConfig\(batch_size=16\)",
    ),
    "refresh batch too large": (
        dict(curvature=Counting(), schedule=CurvatureSchedule(batch_size=160)),
        ValueError,
        r"CurvatureSchedule\(batch_size=160\) is more than the 64 examples of train_data",
    ),
    "hooks": (dict(hooks=[print]), TypeError, r"Classifier\(hooks\) should be Hooks, not builtin.*; see hooks\.Call"),
    "model": (
        dict(model=lambda rngs: {"w": 1}),
        TypeError,
        r"Classifier\.build_model should return an nnx\.Module, not dict",
    ),
    "model without parameters": (
        dict(model=lambda rngs: nnx.Dropout(0.1, rngs=rngs)),
        ValueError,
        r"no trainable variables",
    ),
    "too many eigenpairs": (
        dict(curvature=Lanczos(k=80, l=4)),
        ValueError,
        r"Lanczos\(k=80, l=4\) asks for 84 eigenpairs of a model with 83 parameters",
    ),
    "rules that match nothing": (
        dict(sharding=[("krenel", P("data"))]),
        ValueError,
        r"the rules \['krenel'\] match no parameter.*'inner/kernel'",
    ),
    "nothing is trainable": (
        dict(trainable=nnx.LoRAParam),
        ValueError,
        r"Classifier\(trainable=<class '.*LoRAParam'>\) matches no parameter.*'inner/bias', 'inner/kernel'.*nnx\.PathC",
    ),
    "no filter": (
        dict(trainable=3),
        TypeError,
        r"Classifier\(trainable\) should be an NNX filter, such as nnx\.LoRAParam .* not 3",
    ),
    "uneven rule": (
        dict(sharding=[("inner/kernel", P("data"))]),
        ValueError,
        r"Sharding of inner/kernel: .* splits an axis of length 6 into 8 pieces",
    ),
}
CASES = CONFIG | DATA | PARTS


@pytest.mark.parametrize(("options", "error", "message"), CASES.values(), ids=CASES.keys())
def test_bad_input_is_told_when_the_trainer_is_built(options, error, message, untouched):
    with pytest.raises(error, match=message):
        trainer(workdir=untouched, **options)


def test_the_workdir_is_a_path(untouched):
    with pytest.raises(TypeError, match=r"TrainerConfig\(workdir\) should be a path or None, not int"):
        trainer(workdir=5)


def test_the_config_is_a_config(untouched):
    with pytest.raises(TypeError, match=r"Classifier\(config\) should be a TrainerConfig, not dict"):
        Classifier({"steps": 3}, train_data=examples(), optimizer=optax.sgd(0.1))


def test_one_hook_is_not_a_list_of_hooks(untouched):
    with pytest.raises(TypeError, match=r"Classifier\(hooks\) should be a list of hooks, not EarlyStopping"):
        trainer(workdir=untouched, hooks=EarlyStopping())
    never = EarlyStopping()
    never.every = 0
    with pytest.raises(ValueError, match=r"Classifier\(hooks\): EarlyStopping\.every should be at least 1, not 0"):
        trainer(workdir=untouched, hooks=[never])


@pytest.mark.parametrize("loss", [losses.SoftmaxCrossEntropy, lambda outputs, batch: 0.0, None])
def test_the_loss_is_a_loss(loss, untouched, monkeypatch):
    monkeypatch.setattr(Classifier, "loss", loss)
    with pytest.raises(TypeError, match=r"Classifier\.loss should be a curvtrain\.losses\.Loss, such as .*, and is "):
        trainer(workdir=untouched)


# -- optimizers and estimators that do not go together -----------------------------------------------------------------


def by_label(tx, wanted):
    """`tx` for the leaves whose path ends in `wanted`, gradient descent for the others."""
    label = lambda path, _: "second" if path[-1].key == wanted else "sgd"
    labels = functools.partial(jax.tree_util.tree_map_with_path, label)
    return optax.multi_transform({"second": tx, "sgd": optax.sgd(0.1)}, labels)


TAKES = r"takes {}.*, and Classifier\(curvature\) "
FOSI, KFAC_TX, PSGD_TX = lambda: optim.fosi(optax.sgd(0.1)), optim.kfac, lambda: optim.psgd(1e-2)
PAIRS = {
    "fosi alone": (FOSI, None, rf"optim\.fosi {TAKES.format('Eigenpairs')}is None\. Give it an estimator"),
    "fosi, KFAC": (FOSI, KFAC(), rf"optim\.fosi {TAKES.format('Eigenpairs')}estimates KroneckerFactors"),
    "fosi, PSGD": (FOSI, PSGD(), rf"optim\.fosi {TAKES.format('Eigenpairs')}estimates FittedPreconditioner"),
    "kfac, PSGD": (KFAC_TX, PSGD(), rf"optim\.kfac {TAKES.format('a Curvature')}estimates FittedPreconditioner"),
    "psgd, KFAC": (PSGD_TX, KFAC(), rf"optim\.psgd {TAKES.format('a FittedPreconditioner')}estimates Kron"),
    "psgd, Lanczos": (PSGD_TX, Lanczos(k=2), rf"optim\.psgd {TAKES.format('a FittedPrec')}estimates Eigenpairs"),
    "inside a chain": (
        lambda: optax.chain(optax.clip(1.0), FOSI()),
        Counting(),
        rf"optim\.fosi {TAKES.format('Eigenpairs')}estimates Counts",
    ),
    "inside multi_transform": (
        lambda: by_label(FOSI(), "kernel"),
        DiagonalFisher(),
        rf"optim\.fosi {TAKES.format('Eigenpairs')}estimates Diagonal",
    ),
    "no parameters left": (
        lambda: by_label(FOSI(), "none"),
        Lanczos(k=2),
        r"optim\.fosi is given no parameters: a mask",
    ),
}


@pytest.mark.parametrize(("optimizer", "estimator", "message"), PAIRS.values(), ids=PAIRS.keys())
def test_a_pair_that_does_not_go_together_is_refused_when_the_trainer_is_built(
    optimizer, estimator, message, untouched
):
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(workdir=untouched, optimizer=optimizer(), curvature=estimator)


# -- errors of the lowered step: still before anything is compiled or written ------------------------------------------


def test_labels_of_another_shape(untouched):
    columns = arrays(label=examples()["label"][:, None])
    message = r"SoftmaxCrossEntropy\(labels='label'\) needs labels of shape \(16,\) for outputs of shape \(16, 3\), not"
    with pytest.raises(ValueError, match=message):
        trainer(workdir=untouched, train_data=columns).fit()


# -- beside the Trainer ------------------------------------------------------------------------------------------------


def test_evaluate_checks_what_it_is_given():
    run = trainer()
    with pytest.raises(ValueError, match="labels run from 9 to 9, but the model has 3 outputs"):
        run.evaluate(arrays(label=np.full(64, 9)))
    with pytest.raises(TypeError, match=r"Classifier\.evaluate\(data\) should be a dict of numpy arrays or .*not int"):
        run.evaluate(3)
    with pytest.raises(ValueError, match=r"The arrays of Classifier\.evaluate\(data\) should have one length"):
        run.evaluate(arrays(label=np.zeros(3, np.int32)))


def test_an_estimator_that_needs_outputs():
    objective = Objective.from_loss(lambda params, batch: (params["w"] ** 2).sum())
    message = (
        r"Lanczos\(product='ggn'\) needs the model's outputs.*Objective\.from_loss.*Use Lanczos\(product='hessian'\)"
    )
    with pytest.raises(TypeError, match=message):
        Lanczos(k=1, product="ggn").init(objective, {"w": np.ones(3, np.float32)})


def test_the_model_of_these_tests_has_as_many_parameters_as_they_say():
    params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(Mlp(nnx.Rngs(0)))))
    assert sum(p.size for p in jax.tree.leaves(params)) == 8 * (FEATURES + 1) + CLASSES * 9 == 83
