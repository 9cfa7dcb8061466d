"""Wrong inputs, each with the message that it gets: the argument as it was written, what came, and what to do."""

import re

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import curvtrain
from curvtrain import CurvatureSchedule, Objective, Trainer, TrainerConfig, curvature, losses, optim, trainer
from curvtrain.curvature import products

INTERNALS = re.compile(r"Tracer|traced|jax\._src|optax\._src|ShapedArray|jit\(|pjit|jaxpr|vmap|[Cc]oncretiz|\baval")


class Net(nnx.Module):
    """Two layers."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


class T(Trainer):
    """Of that model."""

    loss = losses.SoftmaxCrossEntropy()

    def build_model(self, rngs):
        return Net(rngs)

    def predict(self, model, batch):
        return model(batch["x"])


rng = np.random.default_rng(0)
data = {"x": rng.standard_normal((32, 4)).astype(np.float32), "label": rng.integers(0, 3, 32)}
batch = jax.tree.map(jnp.asarray, data)
model = Net(nnx.Rngs(0))
objective, params = Objective.from_model(model, lambda m, b: m(b["x"]), losses.SoftmaxCrossEntropy())
unknown = Objective.from_model(model, lambda m, b: m(b["x"]), losses.PerExample(lambda o, b: jnp.sum(o, -1)))
scalar = Objective.from_loss(lambda p, b: jnp.sum(p**2))


def fit(optimizer=None, estimator=None, cls=T, train=data, schedule=None, **options):
    """A Trainer's `fit`, with options of its config and its own."""
    fields = TrainerConfig.__dataclass_fields__
    config = dict(steps=2, batch_size=16, progress=False) | {k: v for k, v in options.items() if k in fields}
    own = {k: v for k, v in options.items() if k not in fields}
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    run = cls(
        TrainerConfig(**config), train_data=train, optimizer=optimizer, curvature=estimator, schedule=schedule, **own
    )
    return run.fit()


def row(arrays, index):
    """One example."""
    return {name: a[index] for name, a in arrays.items()}


def with_(**changes):
    """The data with other entries; None leaves one out."""
    return {k: v for k, v in {**data, **changes}.items() if v is not None}


def loss_of(loss, **entries):
    """The loss of a linear model with three outputs on six examples."""
    own, p = Objective.from_model(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), lambda m, b: m(b["x"]), loss)
    return own.loss(p, {"x": jnp.ones((6, 4)), **{k: jnp.asarray(v) for k, v in entries.items()}})


def estimate(estimator, objective=objective, params=params):
    """An update."""
    return estimator.update(estimator.init(objective, params), objective, params, batch, jax.random.key(0))


def bad(**methods):
    """A Trainer with another method."""
    return type("Bad", (T,), methods)


MISTAKES = [
    (
        lambda: fit(train=with_(mask=np.zeros(32, bool))),
        ValueError,
        "All examples of train_data weigh zero, by its mask or weights or by the loss's ignore_index: there is nothing "
        "to learn from. A mask is true, or 1, where an example counts.",
    ),
    (lambda: TrainerConfig(steps=0, batch_size=8), ValueError, "TrainerConfig(steps) should be at least 1, not 0."),
    (
        lambda: TrainerConfig(steps=10, batch_size=8, sharding="fdsp"),
        ValueError,
        "TrainerConfig(sharding) should be one of 'replicated', 'fsdp', not 'fdsp'. Did you mean 'fsdp'?",
    ),
    (
        lambda: fit(mesh={"data": 3}),
        ValueError,
        "TrainerConfig(mesh={'data': 3}) should multiply to the 8 devices of this run, and 3 does not. "
        "Use -1 for the rest, as in {'data': -1}.",
    ),
    (
        lambda: fit(train=with_(label=None)),
        KeyError,
        "SoftmaxCrossEntropy(labels)='label' is not in the batch, which has ['x'].",
    ),
    (
        lambda: fit(train=with_(label=data["label"].astype(np.float32))),
        TypeError,
        "SoftmaxCrossEntropy(labels='label') needs integer class labels, not float32: for one-hot labels "
        "pass labels.argmax(-1); probabilities have the shape of the outputs, (..., 3), and those of "
        "independent classes are for SigmoidCrossEntropy.",
    ),
    (
        lambda: fit(train=with_(label=data["label"] + 1)),
        ValueError,
        "SoftmaxCrossEntropy(labels='label'): labels run from 1 to 3, but the model has 3 outputs, so "
        "they should lie in [0, 2]. If 3 stands for padding, pass ignore_index=3, or mask it with "
        "batch['mask']: labels of masked examples may be anything.",
    ),
    (
        lambda: fit(train=with_(label=data["label"] - 2)),
        ValueError,
        "SoftmaxCrossEntropy(labels='label'): labels run from -2 to 0, but the model has 3 outputs, so "
        "they should lie in [0, 2]. If -2 stands for padding, pass ignore_index=-2, or mask it with "
        "batch['mask']: labels of masked examples may be anything.",
    ),
    (
        lambda: fit(train=with_(label=data["label"][:20])),
        ValueError,
        "The arrays of train_data should have one length, the number of examples, not {'x': 32, 'label': "
        "20}. Groups of unequal length, such as interior and boundary points, can be rows of the same "
        "arrays, with an entry that says which group a row belongs to.",
    ),
    (
        lambda: fit(train=with_(weights=-np.ones(32, np.float32))),
        ValueError,
        "batch['weights'] weights the examples and holds -1.0; weights should be finite numbers of zero "
        "or more. If it is something else, pass the loss weighted_by=().",
    ),
    (
        lambda: fit(train=with_(mask=np.zeros(32, np.float32))),
        ValueError,
        "All examples of train_data weigh zero, by its mask or weights or by the loss's ignore_index: "
        "there is nothing to learn from. A mask is true, or 1, where an example counts.",
    ),
    (
        lambda: fit(train=with_(mask=np.where(np.arange(32) < 16, 0, -1e9).astype(np.float32))),
        ValueError,
        "batch['mask'] weights the examples and holds -1000000000.0; a mask should be bool, or 0 and 1: "
        "of an additive mask pass mask == 0, and weights in an entry 'weights'. If it is something else, "
        "pass the loss weighted_by=().",
    ),
    (
        lambda: fit(train=with_(weights=np.full(32, np.nan, np.float32))),
        ValueError,
        "batch['weights'] weights the examples and holds nan; weights should be finite numbers of zero or"
        " more. If it is something else, pass the loss weighted_by=().",
    ),
    (
        lambda: fit(train={k: v[:8] for k, v in data.items()}),
        ValueError,
        "train_data has 8 examples, fewer than TrainerConfig(batch_size=16).",
    ),
    (
        lambda: fit(train=[1, 2, 3]),
        TypeError,
        "train_data should be a dict of numpy arrays or a grain dataset of batches, not list.",
    ),
    (
        lambda: fit(train={}),
        ValueError,
        "train_data is an empty dict; it should hold arrays such as 'image' and 'label'.",
    ),
    (
        lambda: fit(eval_data=with_(label=data["label"] + 5)),
        ValueError,
        "SoftmaxCrossEntropy(labels='label'): labels run from 5 to 7, but the model has 3 outputs, so "
        "they should lie in [0, 2]. If 7 stands for padding, pass ignore_index=7, or mask it with "
        "batch['mask']: labels of masked examples may be anything.",
    ),
    (lambda: fit(optimizer=0.1), TypeError, "T(optimizer) should be an optax transformation, not float."),
    (
        lambda: fit(optim.kfac(), None),
        TypeError,
        "optim.kfac takes a Curvature, such as that of curvature.KFAC(), and T(curvature) is None. Give "
        "it an estimator.",
    ),
    (
        lambda: fit(optim.fosi(optax.adam(1e-3)), curvature.KFAC()),
        TypeError,
        "optim.fosi takes Eigenpairs, those of curvature.Lanczos(k), and T(curvature) estimates "
        "KroneckerFactors. See the README's table.",
    ),
    (
        lambda: fit(optim.psgd(1e-3), curvature.Lanczos(3)),
        TypeError,
        "optim.psgd takes a FittedPreconditioner, such as that of curvature.PSGD(), and T(curvature) "
        "estimates Eigenpairs. See the README's table.",
    ),
    (
        lambda: fit(optim.kfac(), curvature.KFAC),
        TypeError,
        "T(curvature) should be a CurvatureEstimator, not the class KFAC: call it, KFAC().",
    ),
    (
        lambda: fit(optim.scale_by_curvature(0.1), curvature.PSGD()),
        TypeError,
        "optim.scale_by_curvature takes a Curvature, such as that of curvature.KFAC(), and T(curvature) "
        "estimates FittedPreconditioner. See the README's table.",
    ),
    (
        lambda: fit(optim.scale_by_curvature(0.1, exponent=-0.5), curvature.KFAC()),
        TypeError,
        "KroneckerFactors of KFAC(inverse='cholesky') have no power -0.5: build KFAC(inverse='eigh') or 'ekfac'.",
    ),
    (
        lambda: fit(schedule=CurvatureSchedule()),
        ValueError,
        "T(schedule) was given without curvature: there is nothing to schedule.",
    ),
    (
        lambda: CurvatureSchedule(update_every=0),
        ValueError,
        "CurvatureSchedule(update_every) should be at least 1, not 0.",
    ),
    (
        lambda: CurvatureSchedule(refresh_every=2.5),
        TypeError,
        "CurvatureSchedule(refresh_every) should be an integer, not 2.5 of type float.",
    ),
    (lambda: CurvatureSchedule(batch_size=0), ValueError, "CurvatureSchedule(batch_size) should be at least 1, not 0."),
    (
        lambda: fit(optim.fosi(optax.sgd(0.1)), curvature.Lanczos(3), schedule=CurvatureSchedule(batch_size=10)),
        ValueError,
        "CurvatureSchedule(batch_size=10) should be a multiple of TrainerConfig(batch_size=16): a refresh"
        " walks it in training batches.",
    ),
    (
        lambda: fit(trainable=nnx.LoRAParam),
        ValueError,
        "T(trainable=<class 'flax.nnx.nn.lora.LoRAParam'>) matches no parameter of the model. Their names"
        " are, for example, ['a/bias', 'a/kernel', 'b/bias', 'b/kernel']; a filter is a class of "
        "nnx.Param, nnx.PathContains('head'), or a function (path, variable) -> bool, whose path is a "
        "tuple.",
    ),
    (
        lambda: fit(trainable="head"),
        ValueError,
        "T(trainable='head') matches no parameter of the model. Their names are, for example, ['a/bias', "
        "'a/kernel', 'b/bias', 'b/kernel']; a filter is a class of nnx.Param, nnx.PathContains('head'), "
        "or a function (path, variable) -> bool, whose path is a tuple.",
    ),
    (
        lambda: fit(hooks=[print]),
        TypeError,
        "T(hooks) should be Hooks, not builtin_function_or_method; see hooks.Call.",
    ),
    (lambda: fit(ema=1.0), ValueError, "TrainerConfig(ema) should be at least 0.0 and below 1.0, not 1.0."),
    (lambda: fit(accumulate=3), ValueError, "TrainerConfig(accumulate) should divide batch_size=16, and 3 does not."),
    (
        lambda: curvature.Lanczos(0),
        ValueError,
        "Lanczos(k, l): at least one eigenpair should be asked for; both are 0.",
    ),
    (
        lambda: curvature.Lanczos(3, m=2),
        ValueError,
        "Lanczos(m) should be at least k + l = 3, not 2: the Krylov space has to hold the eigenvectors. "
        "The default is 4 (k + l) = 12.",
    ),
    (
        lambda: curvature.Lanczos(3, product="hesian"),
        ValueError,
        "Lanczos(product) should be one of 'hessian', 'ggn', not 'hesian'. Did you mean 'hessian'?",
    ),
    (
        lambda: estimate(curvature.Lanczos(1000)),
        ValueError,
        "Lanczos(k=1000, l=0) asks for 1000 eigenpairs of a model with 43 parameters.",
    ),
    (
        lambda: curvature.KFAC(fisher="emprical"),
        ValueError,
        "KFAC(fisher) should be one of 'exact', 'ggn', 'sampled', 'empirical', not 'emprical'. Did you "
        "mean 'empirical'?",
    ),
    (
        lambda: curvature.KFAC("exact", inverse="lu"),
        ValueError,
        "KFAC(inverse) should be one of 'cholesky', 'eigh', 'ekfac', not 'lu'.",
    ),
    (lambda: curvature.KFAC(ema=1.5), ValueError, "KFAC(ema) should be at least 0.0 and at most 1.0, not 1.5."),
    (lambda: curvature.KFAC(damping=-1.0), ValueError, "KFAC(damping) should be at least 0.0, not -1.0."),
    (
        lambda: estimate(curvature.KFAC(), scalar, jnp.ones(3)),
        TypeError,
        "KFAC needs the model's outputs, but this objective was made with Objective.from_loss and has "
        "only a scalar loss. Use Lanczos(product='hessian').",
    ),
    (
        lambda: estimate(curvature.DiagonalFisher(), scalar, jnp.ones(3)),
        TypeError,
        "DiagonalFisher needs the model's outputs, but this objective was made with Objective.from_loss "
        "and has only a scalar loss. Use Lanczos(product='hessian').",
    ),
    (
        lambda: estimate(
            curvature.KFAC("sampled"),
            *Objective.from_model(model, lambda m, b: m(b["x"]), losses.PerExample(lambda o, b: jnp.sum(o, -1))),
        ),
        TypeError,
        "KFAC(fisher='sampled') cannot draw targets: PerExample.sample_targets did not take outputs (32, "
        "3) (PerExample cannot be sampled: it defines no distribution over targets.) Use "
        "fisher='empirical', which takes any outputs.",
    ),
    (
        lambda: curvature.InverseFree("dens"),
        ValueError,
        "InverseFree(structure) should be one of 'dense', 'diagonal', 'block30diagonal', 'hierarchical15_15', "
        "'lower_toeplitz', 'upper_toeplitz', or with other numbers, not 'dens'. Did you mean 'dense'?",
    ),
    (
        lambda: fit(optim.sirfshampoo(), curvature.InverseFree("hierarchical4_4")),
        ValueError,
        "InverseFree(structure): 'hierarchical4_4' needs a side of at least 8, and 'a/bias' has one of 5. "
        "Choose by name, such as [('a/bias', 'dense'), ('.*', 'hierarchical4_4')].",
    ),
    (
        lambda: fit(optim.singd(), curvature.InverseFreeKFAC(structure="hierarchical4_4")),
        ValueError,
        "InverseFreeKFAC(structure): 'hierarchical4_4' needs a side of at least 8, and 'a' has one of 5. "
        "Choose by name, such as [('a', 'dense'), ('.*', 'hierarchical4_4')].",
    ),
    (
        lambda: fit(optim.sirfshampoo(), curvature.InverseFree([("kernel", ("dense", "diagonal", "dense"))])),
        ValueError,
        "InverseFree(structure) has 3 structures for 'a/kernel', dense, diagonal, dense, and its sides are (4, 5) "
        "(those of length 1 do not count). Give one name, or one for each side.",
    ),
    (
        lambda: curvature.InverseFree(3),
        TypeError,
        "InverseFree(structure) should be a name, such as 'dense', or a list of (regular expression, name or names) "
        "pairs, not 3.",
    ),
    (
        lambda: curvature.InverseFree(rate=0.0),
        ValueError,
        "InverseFree(rate) should be above 0.0 and below 1.0, not 0.0.",
    ),
    (
        lambda: curvature.InverseFree(rates=[("bias", -1.0)]),
        ValueError,
        "InverseFree(rates) of 'bias' should be above 0.0 and at most 1.0, not -1.0.",
    ),
    (
        lambda: curvature.InverseFree(batch_size=0),
        ValueError,
        "InverseFree(batch_size) should be above 0.0, not 0.",
    ),
    (
        lambda: curvature.InverseFreeKFAC(ema=0.9),
        ValueError,
        "InverseFreeKFAC(ema=0.9) would average statistics, and factors follow those of the last batch: what "
        "averages is InverseFreeKFAC(momentum=...). Leave it out.",
    ),
    (
        lambda: optim.sirfshampoo(beta2=0.0),
        ValueError,
        "sirfshampoo(beta2) should be above 0.0 and below 1.0, not 0.0.",
    ),
    (
        lambda: optim.sirfshampoo(-0.1),
        ValueError,
        "sirfshampoo(learning_rate) should be at least 0.0, not -0.1.",
    ),
    (
        lambda: optim.singd(damping=0.0),
        ValueError,
        "singd(damping) should be above 0.0, not 0.0.",
    ),
    (
        lambda: fit(optim.singd(), curvature.InverseFree()),
        TypeError,
        "optim.singd takes the factors of curvature.InverseFreeKFAC(), and these are those of curvature.InverseFree().",
    ),
    (
        lambda: fit(optim.sirfshampoo(), curvature.PSGD()),
        TypeError,
        "optim.sirfshampoo takes InverseFreeFactors, those of curvature.InverseFree() or curvature.InverseFreeKFAC(), "
        "and T(curvature) estimates FittedPreconditioner. See the README's table.",
    ),
    (
        lambda: fit(optim.sirfshampoo(beta2=0.02), curvature.InverseFree(rate=0.01)),
        ValueError,
        "optim.sirfshampoo(beta2=0.02) is the rate of the factors, and these have 0.01. Give "
        "curvature.InverseFree(rate=0.02), or the optimizer beta2=0.01.",
    ),
    (
        lambda: curvature.GradientKronecker(block_size=0),
        ValueError,
        "GradientKronecker(block_size) should be at least 1, not 0.",
    ),
    (
        lambda: optim.scale_by_width(64, "adam"),
        ValueError,
        "scale_by_width(rule) should be one of 'entries', 'spectral', 'rms', 'gradient', 'natural', not 'adam'.",
    ),
    (
        lambda: optim.scale_by_width("narrow"),
        TypeError,
        "scale_by_width(base) should be a width or the narrow model's parameters, not 'narrow'.",
    ),
    (
        lambda: curvature.PSGD("kron"),
        TypeError,
        "PSGD(preconditioner) should be Kron(), LowRank(), XMat(), Affine(), Dense() or Diagonal(), not 'kron'.",
    ),
    (
        lambda: curvature.PSGD(fit="hess"),
        ValueError,
        "PSGD(fit) should be one of 'hessian', 'ggn', 'gradient', not 'hess'. Did you mean 'hessian'?",
    ),
    (
        lambda: optim.kfac(learning_rate="auto"),
        ValueError,
        "kfac(learning_rate) should be one of 'adaptive', not 'auto'.",
    ),
    (lambda: optim.kfac(damping=-1.0), ValueError, "kfac(damping) should be at least 0.0, not -1.0."),
    (
        lambda: optim.kfac(norm_constraint=1e-3),
        ValueError,
        "kfac(norm_constraint) bounds a given learning rate; an adaptive one is bounded by its quadratic "
        "model. Give a learning_rate, or no norm_constraint.",
    ),
    (lambda: optim.psgd(-1e-3), ValueError, "psgd(learning_rate) should be at least 0.0, not -0.001."),
    (lambda: optim.psgd(1e-3, b1=1.0), ValueError, "psgd(b1) should be at least 0.0 and below 1.0, not 1.0."),
    (
        lambda: optim.psgd(1e-3, style="adamw"),
        ValueError,
        "psgd(style) should be one of 'unit', 'adam', not 'adamw'. Did you mean 'adam'?",
    ),
    (
        lambda: optim.adafisher(faithful=1),
        TypeError,
        "adafisher(faithful) should be True or False, not 1.",
    ),
    (
        lambda: optim.adafisherw(damping=0.0),
        ValueError,
        "adafisherw(damping) should be above 0.0, not 0.0.",
    ),
    (
        lambda: optim.adafisher(trust_cap="automatic"),
        ValueError,
        "adafisher(trust_cap) should be one of 'auto', not 'automatic'. Did you mean 'auto'?",
    ),
    (
        lambda: optim.adafisher(faithful=True, exponent=0.5),
        ValueError,
        "adafisher(exponent=0.5): the released code divides by F itself. Leave it out.",
    ),
    (
        lambda: optim.scale_by_adafisher(faithful=True, trust_cap=1.0),
        ValueError,
        "scale_by_adafisher(trust_cap=1.0): the released code has no such limit. Leave it out.",
    ),
    (
        lambda: curvature.KroneckerDiagonal("exact", faithful=True),
        ValueError,
        "KroneckerDiagonal(faithful=True) has the cotangents of the batch's own targets, fisher='empirical', not "
        "'exact'. Leave one of the two out.",
    ),
    (
        lambda: curvature.KroneckerDiagonal(faithful=True, uncovered="diagonal"),
        ValueError,
        "KroneckerDiagonal(uncovered) should be one of 'error', 'one', not 'diagonal'.",
    ),
    (
        lambda: fit(optim.adafisher(0.1), curvature.KroneckerDiagonal(faithful=True)),
        TypeError,
        "optim.adafisher takes DiagonalFactors, those of curvature.KroneckerDiagonal(), and T(curvature) estimates "
        "ReleasedFactors. See the README's table.",
    ),
    (lambda: optim.fosi(optax.adam), TypeError, "fosi(base) should be an optax transformation, not function."),
    (
        lambda: optim.scale_by_curvature(-1.0),
        ValueError,
        "scale_by_curvature(damping) should be at least 0.0, not -1.0.",
    ),
    (
        lambda: optim.scale_by_curvature(0.1).update(params, optim.scale_by_curvature(0.1).init(params), params),
        TypeError,
        "scale_by_curvature.update() needs a curvature among its extra arguments, and there is none. Pass"
        " curvature=Curvature to update(), give the Trainer curvature=curvature.KFAC(), or another "
        "estimator, or wrap the optimizer in optim.self_contained(scale_by_curvature, curvature.KFAC(), "
        "or another estimator, schedule, objective).",
    ),
    (
        lambda: optim.natural_gradient(0.1, -0.1),
        ValueError,
        "natural_gradient(damping) should be at least 0.0, not -0.1.",
    ),
    (
        lambda: optim.route([("a", optax.sgd(0.1))]).init({"b": jnp.ones(2)}),
        ValueError,
        "optim.route: no pattern matches b. End the list with ('.*', transformation), or ('.*', None) to "
        "leave the rest unchanged.",
    ),
    (
        lambda: optim.route([("(", optax.sgd(0.1))]),
        ValueError,
        "optim.route: '(' is not a regular expression: missing ), unterminated subpattern at position 0.",
    ),
    (
        lambda: optim.route([]),
        TypeError,
        "optim.route(routes) should be a list of (pattern, transformation) pairs, not [].",
    ),
    (
        lambda: Objective.from_model(model, None, losses.SquaredError()),
        TypeError,
        "Objective.from_model(predict) should be a function (model, batch) -> outputs, not NoneType.",
    ),
    (
        lambda: Objective.from_model(nnx.Dropout(0.1), lambda m, b: m(b["x"]), losses.SquaredError()),
        ValueError,
        "Objective.from_model(model, wrt) has no trainable variables: the filter matches none of the "
        "model's, and none of them is an nnx.Param.",
    ),
    (
        lambda: Objective.from_model(model, lambda m, b: m(b["x"]), optax.l2_loss),
        TypeError,
        "Objective.from_model(loss) should be a curvtrain.losses.Loss, not function. For a function "
        "(outputs, batch) -> values of shape (batch,), pass losses.PerExample(function).",
    ),
    (
        lambda: Objective.from_model(model, lambda m, b: m(b["x"]), losses.SquaredError(), microbatch=0),
        ValueError,
        "Objective.from_model(microbatch) should be at least 1, not 0.",
    ),
    (
        lambda: Objective.from_loss(lambda p, b: p).loss(jnp.ones(3), {}),
        ValueError,
        "The function given to Objective.from_loss should return a scalar, not shape (3,).",
    ),
    (
        lambda: scalar.predict(jnp.ones(3), {}),
        TypeError,
        "predict needs the model's outputs, but this objective was made with Objective.from_loss and has "
        "only a scalar loss. Use Objective.from_model(model, predict, loss).",
    ),
    (
        lambda: objective.loss(params, {"x": jnp.ones((4, 4))}),
        KeyError,
        "SoftmaxCrossEntropy(labels)='label' is not in the batch, which has ['x'].",
    ),
    (
        lambda: objective.loss({"a": params["a"]}, {"x": jnp.ones((4, 4)), "label": jnp.ones(4, int)}),
        ValueError,
        "These are not the parameters of the objective's model: ['b/bias', 'b/kernel'] are missing and "
        "none are not the model's. Objective.from_model returns the right ones.",
    ),
    (
        lambda: loss_of(losses.SquaredError(), target=np.ones(6, np.float32)),
        ValueError,
        "SquaredError(targets)='target' has shape (6,), but the outputs have (6, 3).",
    ),
    (
        lambda: loss_of(losses.SquaredError(), target=np.ones((6, 2), np.float32)),
        ValueError,
        "SquaredError(targets)='target' has shape (6, 2), but the outputs have (6, 3).",
    ),
    (
        lambda: loss_of(losses.PerExample(lambda o, b: jnp.mean(o))),
        ValueError,
        "PerExample(function) should return one value per example, shape (batch,) or (batch, time), not "
        "one for all of them, shape (): leave out the mean over examples, which the objective takes, with"
        " their weights. A scalar loss, without outputs, is for Objective.from_loss.",
    ),
    (
        lambda: products.hvp(objective, params, {"a": 1}, data),
        ValueError,
        "The vector of a curvature-vector product should be like the parameters: a/bias has the shape "
        "(5,) among the parameters, and is absent in the vector.",
    ),
    (
        lambda: products.ggnvp(scalar, jnp.ones(3), jnp.ones(3), {}),
        TypeError,
        "ggnvp needs the model's outputs, but this objective was made with Objective.from_loss and has "
        "only a scalar loss. Use hvp, or Objective.from_model(model, predict, loss).",
    ),
    (
        lambda: products.fvp(objective, params, params, data, fisher="emp"),
        ValueError,
        "fvp(fisher) should be one of 'exact', 'sampled', 'empirical', not 'emp'.",
    ),
    (
        lambda: curvature.register_layer(nnx.Linear, object),
        TypeError,
        "register_layer(layer) should be a subclass of curvature.Layer, not <class 'object'>.",
    ),
    (lambda: optim.fosi_adam(1, 2, 3), TypeError, "Objective.from_loss(loss_fn) should be a function, not int."),
    (
        lambda: curvtrain.TrainerConfig(steps=1, batch_size=4, writers=["wandb"]),
        ValueError,
        "TrainerConfig(writers) should be one of 'jsonl', 'csv', 'tensorboard', not 'wandb'.",
    ),
    (
        lambda: fit(sharding=[("nothing", P("data"))]),
        ValueError,
        "TrainerConfig(sharding): the rules ['nothing'] match no parameter. Their names are, for example,"
        " ['a/bias', 'a/kernel', 'b/bias', 'b/kernel']; a rule is a regular expression that is searched "
        "in them.",
    ),
    (
        lambda: fit(sharding=[("kernel", P("model"))]),
        ValueError,
        "Sharding of a/kernel: P('model',) names the mesh axis 'model', but the mesh has {'data': 8}. Add"
        " it to TrainerConfig(mesh), with size 1 where it should not split anything.",
    ),
    (
        lambda: fit(cls=type("NoLoss", (Trainer,), {"build_model": T.build_model, "predict": T.predict})),
        TypeError,
        "NoLoss.loss should be a curvtrain.losses.Loss, such as losses.SoftmaxCrossEntropy(), and is absent.",
    ),
    (
        lambda: fit(cls=bad(predict=lambda self, model, batch: model(batch["x"]).sum())),
        ValueError,
        "SoftmaxCrossEntropy takes one output or more for each example, and the model's are one number.",
    ),
    (
        lambda: fit(cls=bad(build_model=lambda self, rngs: 3)),
        TypeError,
        "Bad.build_model should return an nnx.Module, not int.",
    ),
    (
        lambda: fit(cls=bad(metrics=lambda self, outputs, batch: {"a": jnp.mean(outputs)})),
        ValueError,
        "Trainer.metrics['a'] is a scalar; return one value per example, shape (batch,), so that the mean"
        " is exact under padding and accumulation, or a clu.metrics.Metric.",
    ),
    (
        lambda: fit(cls=bad(metrics=lambda self, outputs, batch: jnp.ones(3))),
        TypeError,
        "Bad.metrics should return a dict, not an array of shape (3,).",
    ),
    (lambda: optim.ivon(0.0, 10), ValueError, "ivon(learning_rate) should be above 0.0, not 0.0."),
    (lambda: optim.ivon(0.1, -5), ValueError, "ivon(ess) should be above 0.0, not -5."),
    (lambda: optim.ivon(0.1, 10, 0), ValueError, "ivon(hess_init) should be above 0.0, not 0."),
    (
        lambda: optim.ivon(0.1, 10, hess_approx="prize"),
        ValueError,
        "ivon(hess_approx) should be one of 'price', 'gradsq', not 'prize'. Did you mean 'price'?",
    ),
    (
        lambda: (tx := optim.ivon(0.1)).sample(tx.init(params), params, jax.random.key(0)),
        ValueError,
        "ivon(ess) is None, which is the number of training examples in a Trainer. In a loop of your own pass this "
        "number, ivon(learning_rate, ess).",
    ),
    (
        lambda: (tx := optim.ivon(0.1, 10)).update(params, tx.init(params), params),
        TypeError,
        "ivon.update() needs draws= among its extra arguments, and there is none. A Trainer passes it. In a loop of "
        "your own take the gradient at draws: value, grads, draws = optim.at_draws(value_and_grad, opt_state, params, "
        "key), then update(grads, opt_state, params, draws=draws).",
    ),
    (
        lambda: optim.sample_params(optax.sgd(0.1).init(params), params, jax.random.key(0)),
        TypeError,
        "sample_params(opt_state): there is no posterior in this state, so there is nothing to draw from. Pass the "
        "state of an optimizer that samples, as its init and update return it.",
    ),
    (
        lambda: optim.log_vogn(1.5, 10),
        ValueError,
        "log_vogn(learning_rate) should be above 0.0 and below 1.0, not 1.5.",
    ),
    (lambda: optim.log_vogn(0.1, -1), ValueError, "log_vogn(data_size) should be above 0.0, not -1."),
    (
        lambda: optim.vogn_preset("lenet5", 60_000, 100),
        ValueError,
        "vogn_preset(name) should be one of 'lenet', 'lenet_kfac', 'resnet18_cifar10', 'resnet18_imagenet', not "
        "'lenet5'. Did you mean 'lenet'?",
    ),
    (lambda: optim.vogn(-0.1, 10), ValueError, "vogn(learning_rate) should be above 0.0, not -0.1."),
    (lambda: optim.vogn(0.1, 0), ValueError, "vogn(data_size) should be above 0.0, not 0."),
    (lambda: optim.vogn(0.1, 10, 0.0), ValueError, "vogn(prior_precision) should be above 0.0, not 0.0."),
    (lambda: optim.vogn(0.1, 10, damping=-1.0), ValueError, "vogn(damping) should be at least 0.0, not -1.0."),
    (lambda: optim.vogn(0.1, 10, kl_weight=0.0), ValueError, "vogn(kl_weight) should be above 0.0, not 0.0."),
    (
        lambda: (tx := optim.vogn(0.1, 10)).sample(tx.init(params), params, jax.random.key(0)),
        TypeError,
        "vogn draws from the posterior that its curvature makes, so sample(opt_state, params, key, curvature=) needs "
        "one. A Trainer passes it; in a loop of your own, pass what the estimator maintains.",
    ),
    (
        lambda: fit(optim.vogn(0.1), curvature.KFAC()),
        TypeError,
        "vogn draws with the root (C + damping I)^-0.5, which KroneckerFactors does not have here. Take "
        "curvature.DiagonalFisher() or curvature.KFAC(inverse='eigh').",
    ),
    (
        lambda: fit(optim.vogn(0.1)),
        TypeError,
        "optim.vogn takes a Curvature, such as that of curvature.KFAC(), and T(curvature) is None. Give it an "
        "estimator.",
    ),
    (
        lambda: (tx := optim.vogn(0.1, 10)).sample(
            tx.init(params),
            params,
            jax.random.key(0),
            curvature.DiagonalFisher().init(*objective.select(params, [("a", "kernel"), ("a", "bias")])),
        ),
        ValueError,
        "vogn: b/bias (3,), b/kernel (5, 3) of the gradients is not among the parameters of the curvature, a/bias "
        "(5,), a/kernel (4, 5), ...: this Diagonal is of another model.",
    ),
    (
        lambda: fit(mc_samples=2),
        ValueError,
        "T(mc_samples=2) needs an optimizer that samples, with a method sample(opt_state, params, key, curvature), and "
        "this one has none. Leave it out, or take such an optimizer.",
    ),
    (
        lambda: fit(predictive_samples=3),
        ValueError,
        "T(predictive_samples=3) needs an optimizer that samples, with a method sample(opt_state, params, key, "
        "curvature), and this one has none. Leave it out, or take such an optimizer.",
    ),
    (lambda: fit(optim.ivon(0.1), mc_samples=0), ValueError, "T(mc_samples) should be at least 1, not 0."),
    (
        lambda: fit(optim.ivon(0.1), mc_samples=3, mesh={"data": 4, "mc": 2}),
        ValueError,
        "T(mc_samples=3) should be divisible over the mesh {'data': 4, 'mc': 2}, which splits the draws of a step into "
        "2.",
    ),
    (
        lambda: fit(
            optim.ivon(0.1), predictive_samples=3, cls=bad(loss=losses.PerExample(lambda o, b: jnp.sum(o, -1)))
        ),
        TypeError,
        "Bad(predictive_samples=3) averages predictions, and PerExample does not say how: define "
        "PerExample.average(stacked), from outputs with a leading axis of draws to outputs.",
    ),
    (
        lambda: fit(
            optim.ivon(0.1), train=grain.MapDataset.source(np.arange(32)).map(lambda i: row(data, i)).batch(16).repeat()
        ),
        ValueError,
        "ivon(ess) is None, and train_data does not say how many examples it has. Pass their number, "
        "ivon(learning_rate, ess).",
    ),
    (
        lambda: trainer.calibration.brier_score(jnp.ones((4, 3)), jnp.ones((4, 3))),
        ValueError,
        "calibration.brier_score takes logits (..., classes) and integer labels (...), not outputs of shape (4, 3) and "
        "labels of shape (4, 3).",
    ),
]


@pytest.mark.parametrize(("mistake", "kind", "message"), MISTAKES)
def test_the_message(mistake, kind, message):
    with pytest.raises(kind) as caught:
        mistake()
    assert caught.type is kind
    assert caught.value.args[0] == message
    assert not INTERNALS.search(message)


def test_there_are_sixty():
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize("missing", ["x", "label"])
def test_an_error_of_predict_says_what_the_batch_was(missing):
    """It is the user's own code that fails, so its error stays as it is, with a note."""
    wrong = {"x": jnp.ones((4, 3)), "label": jnp.zeros(4, int)}
    if missing == "x":
        del wrong["x"]
    with pytest.raises((KeyError, TypeError)) as caught:
        objective.loss(params, wrong)
    note = next(n for n in caught.value.__notes__ if n.startswith("(In predict(model, batch), for a batch of "))
    assert "label int32[4]" in note
