"""An NNX model, a prediction and a loss, seen as pure functions of the parameters.

Everything outside of this package sees `params`, a nested dict of arrays in the module's own structure, and an
`Objective`, which is a pytree: its leaves are the model's other state (batch statistics and the like) and parameters
that are not trained, while graph and functions are static, so it passes through `jax.jit`.

    loss(params) = sum_i w_i l(f(params, x_i), t_i) / sum_i w_i + R(params)

with R the regulariser, if there is one: a part of every value, gradient and product, added once to a batch, however
many pieces it is walked in.

Randomness comes in through `key` alone: the module's own random streams are replaced by streams folded out of it.
Without a key, dropout is off.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from curvtrain import _checks
from curvtrain._dtypes import SPLIT, check_real, wide, width
from curvtrain._outputs import floats, with_floats
from curvtrain.losses import Loss
from curvtrain.objective.coupling import coupling, refused
from curvtrain.objective.paths import Path, by_path, chosen_of, nested, over
from curvtrain.objective.pieces import Measure, batch_size, safe, walk
from curvtrain.objective.split_model import SplitModel, check_params, check_parts
from curvtrain.objective.totals import check_regulariser, mean_of_loss_fn, penalty_of, total_of_outputs

PyTree = Any
Sums = TypeVar("Sums")
Regulariser = Callable[[PyTree], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a model as a pure function of its parameters. Build it with `from_model` or `from_loss`.

    Attributes:
      model_state: the model's state that is neither parameter nor random stream, a nested dict of arrays.
      microbatch: number of examples that are walked at a time, or None for the whole batch in one piece.
      evaluating: running averages and no dropout, whatever the key.
      frozen: parameters that the loss reads and no derivative is taken of, a nested dict of arrays.
      regulariser: R, a function of the parameters, or None.
    """

    model_state: PyTree
    _model: SplitModel | None = dataclasses.field(metadata=dict(static=True))
    _loss_fn: Callable[[PyTree, Any], jax.Array] | None = dataclasses.field(metadata=dict(static=True))
    microbatch: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    evaluating: bool = dataclasses.field(default=False, metadata=dict(static=True))
    frozen: PyTree = dataclasses.field(default_factory=dict)
    regulariser: Regulariser | None = dataclasses.field(default=None, metadata=dict(static=True))
    # of all parameters of a loss-only objective from which some were selected: (their treedef, their paths)
    _whole: tuple[Any, tuple[Path, ...]] | None = dataclasses.field(default=None, metadata=dict(static=True))

    @staticmethod
    def from_model(
        model: nnx.Module,
        predict: Callable[[Any, Any], Any],
        loss: Loss,
        *,
        microbatch: int | None = None,
        wrt: Any = nnx.Param,
        regulariser: Regulariser | None = None,
    ) -> tuple["Objective", PyTree]:
        """Splits `model` into an objective and its parameters.

        Args:
          model: any module: BatchNorm, Dropout, remat and scan included. It is read, not changed.
          predict: `(model, batch) -> outputs`, an array or a pytree of arrays.
          loss: a `curvtrain.losses.Loss`.
          microbatch: walk batches in pieces of this many examples; same result, less memory. A loss in which examples
            depend on each other (contrastive ones) is refused. A layer that mixes examples (BatchNorm with batch
            statistics) sees a piece at a time, exactly as it does when gradients are accumulated.
          wrt: any NNX filter of the variables that are trained; other `nnx.Param`s are frozen.
          regulariser: `params -> scalar`, a penalty that is added to the mean loss. It is given the parameters that are
            trained, in their structure, those that `select` froze later included.

        Returns:
          The objective and its parameters, a nested dict of arrays in the module's own structure.

        Raises:
          TypeError, ValueError: an argument of the wrong type; a filter that matches nothing, or parameters that are
            not real floating-point numbers.
        """
        check_parts(model, predict, loss)
        if microbatch is not None:
            _checks.positive_int("Objective.from_model(microbatch)", microbatch)
        static, params, frozen, rest = SplitModel.of(model, predict, loss, wrt)
        check_params(params, frozen)
        check_regulariser("Objective.from_model(regulariser)", regulariser)
        objective = Objective(rest, static, None, microbatch, frozen=frozen, regulariser=regulariser)
        jax.eval_shape(objective.penalty, params)
        return objective, params

    @staticmethod
    def from_loss(
        loss_fn: Callable[[PyTree, Any], jax.Array],
        *,
        microbatch: int | None = None,
        regulariser: Regulariser | None = None,
    ) -> "Objective":
        """An objective over any pytree of parameters from a scalar function `(params, batch) -> mean loss`.

        It has no outputs, so the GGN, the Fisher and K-FAC are out of its reach. Pieces of a micro-batched batch are
        weighted by their number of examples (or their `mask`/`weights`): that is the loss of the whole only where it is
        a mean over examples, which cannot be found out from here.

        Args:
          loss_fn: the function.
          microbatch: walk batches in pieces of this many examples.
          regulariser: `params -> scalar`, a penalty that is added to the mean loss.
        """
        if not callable(loss_fn):
            raise TypeError(f"Objective.from_loss(loss_fn) should be a function, not {type(loss_fn).__name__}.")
        if microbatch is not None:
            _checks.positive_int("Objective.from_loss(microbatch)", microbatch)
        check_regulariser("Objective.from_loss(regulariser)", regulariser)
        return Objective({}, None, loss_fn, microbatch, regulariser=regulariser)

    # -- views -----------------------------------------------------------------------------------------------------

    @property
    def has_outputs(self) -> bool:
        """Whether the objective knows a model and a `Loss`, not just a scalar function."""
        return self._model is not None

    @property
    def loss_of_outputs(self) -> Loss:
        """The `Loss` of an objective that has outputs."""
        return self._require_outputs("This").loss

    def require_outputs(self, who: str, instead: str) -> None:
        """Raises TypeError naming `who` needs model outputs and what to use `instead`, on a loss-only objective."""
        self._require_outputs(who, instead)

    def _require_outputs(self, who: str, instead: str = "Objective.from_model(model, predict, loss)") -> SplitModel:
        if self._model is None:
            raise TypeError(
                f"{who} needs the model's outputs, but this objective was made with Objective.from_loss and has only "
                f"a scalar loss. Use {instead}."
            )
        return self._model

    def with_state(self, model_state: PyTree) -> "Objective":
        """The same objective with other model state (of the same structure)."""
        return dataclasses.replace(self, model_state=model_state)

    def with_frozen(self, frozen: PyTree) -> "Objective":
        """The same objective with other values of the frozen parameters (of the same structure)."""
        return dataclasses.replace(self, frozen=frozen)

    def with_microbatch(self, microbatch: int | None) -> "Objective":
        """The same objective, walked in pieces of `microbatch` examples (None: in one piece)."""
        return dataclasses.replace(self, microbatch=microbatch)

    def evaluation(self) -> "Objective":
        """The same objective as it is evaluated: running averages, no dropout."""
        return dataclasses.replace(self, evaluating=True)

    def select(self, params: PyTree, paths: Collection[Path]) -> tuple["Objective", PyTree]:
        """The same loss as a function of some of its parameters; the others are frozen at their values in `params`.

        Args:
          params: all parameters, like those that the objective has now.
          paths: of the leaves that stay parameters, tuples of keys as `by_path` gives them.

        Returns:
          The objective, and the chosen parameters as a nested dict; both as they came where all are chosen.

        Raises:
          ValueError: a path that is no parameter's, or none at all.
        """
        kept, rest = chosen_of(params, paths)
        if not rest:
            return self, params
        whole = self._whole
        if self._model is None and whole is None:
            whole = (jax.tree.structure(params), tuple(by_path(params)))
        frozen = nested(by_path(self.frozen) | rest)
        return dataclasses.replace(self, frozen=frozen, _whole=whole), nested(kept)

    def like_parameters(self, vector: PyTree) -> PyTree:
        """A vector over the parameters in the containers in which the objective takes them.

        Optimizers get parameters as they were wrapped: as an `nnx.State`, or with holes where `optax.masked` left some
        out. Raises ValueError if the vector is not over just the parameters that the objective has now.
        """
        if self._model is None and self._whole is None:
            return vector
        paths = self._whole[1] if self._whole else self._model.paths if self._model else ()
        return over(vector, set(paths) - by_path(self.frozen).keys())

    def module(self, params: PyTree) -> nnx.Module:
        """The module with these parameters, in the mode in which it was given (of `evaluation()`: to be evaluated)."""
        model = self._require_outputs("A module")
        graph = model.evaluation if self.evaluating else model.train
        return model.merge(graph, self._with_frozen_leaves(params), self.model_state, None)

    # -- values ----------------------------------------------------------------------------------------------------

    def predict(
        self,
        params: PyTree,
        batch: Any,
        key: jax.Array | None = None,
        *,
        prepare: Callable[[nnx.Module], None] | None = None,
    ) -> Any:
        """The model's outputs for the whole batch, in one piece; `prepare` may change the module that computes them."""
        self._require_outputs("predict")
        return self._apply(params, self.model_state, batch, key, prepare)[0]

    def loss(self, params: PyTree, batch: Any, key: jax.Array | None = None) -> jax.Array:
        """The mean loss over the (unmasked) examples, and the penalty: float32, or float64 where a parameter is; ()."""
        total, weight = self.accumulate(lambda piece, k: self.total(params, piece, k), batch, key)
        return total / safe(weight) + self.penalty(params)

    def penalty(self, params: PyTree) -> jax.Array:
        """R(params), (), in the dtype of the loss; zero without a regulariser."""
        if self.regulariser is None:
            return jnp.zeros((), width(params))
        whole = self._with_frozen_leaves(params)
        if self._model is not None:
            leaves = by_path(whole)
            whole = nested({path: leaves[path] for path in self._model.trained})
        return penalty_of(self.regulariser, whole, width(params))

    def total(self, params: PyTree, piece: Any, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """(sum_i w_i l_i, sum_i w_i) over one piece, without the penalty: what adds up over pieces and devices."""
        if self._model is None:
            mean, weight = self._mean_of_loss_fn(params, piece)
            return mean * weight, weight
        outputs = self._apply(params, self.model_state, piece, key)[0]
        return total_of_outputs(self._model.loss, outputs, piece, width(params))

    def coupling(self, params: PyTree, batch: Any, key: jax.Array | None = None, outputs: PyTree = None) -> str:
        """Says what the loss of one example has to do with the others of its batch; empty if nothing was found.

        Such a loss (a contrastive one, say) is another one in pieces of a batch. Normalisation over the batch inside of
        the model is not looked for. Of the arguments only shapes are used; `outputs` are theirs, where they are known.
        """
        predict = lambda params, batch: self.with_microbatch(None).predict(params, batch, key)
        return coupling(self._require_outputs("This").loss, predict, params, batch, outputs)

    def value_and_grad(
        self,
        params: PyTree,
        batch: Any,
        key: jax.Array | None = None,
        *,
        observe: Callable[[Any, Any], Any] | None = None,
    ) -> tuple[jax.Array, PyTree, PyTree, Any]:
        """The loss, its gradient, the model state after the forward pass, and what `observe` saw of it.

        Args:
          params: the parameters; batch, key: as for `loss`.
          observe: `(outputs, piece) -> pytree`, called on each piece (outputs is None for a loss-only objective).

        Returns:
          (loss, gradient like params, model state, observations stacked along a new leading axis of pieces).
          Gradient and loss are those of the whole batch, exactly: sums are divided by the total weight once.
          Model state threads through the pieces in order.
        """
        return self.value_grad_and_measure(params, batch, key, None, observe=observe)[:4]

    def value_grad_and_measure(
        self,
        params: PyTree,
        batch: Any,
        key: jax.Array | None,
        measure: Measure | None,
        *,
        observe: Callable[[Any, Any], Any] | None = None,
    ) -> tuple[jax.Array, PyTree, PyTree, Any, Any]:
        """What `value_and_grad` returns, and a measure's sums over the batch, from the same forward passes.

        Returns:
          (loss, gradient, model state, observations, (sums, total weight)); the last is None without a measure.

        Raises:
          TypeError: parameters that are not real floating-point numbers.
        """
        check_real(params, "The parameters of an objective", SPLIT)
        whole = self.in_one_piece(batch)

        def piece_sums(state, piece, key):
            total, weight, grads, state, outputs, measured = self._passes(params, state, piece, key, measure)
            grads = grads if whole else jax.tree.map(lambda g: weight * g, grads)
            # Behind a barrier, as a reduction over the outputs, such as an argmax, makes XLA compute them twice.
            seen = observe(jax.lax.optimization_barrier(outputs), piece) if observe is not None else None
            return state, (total, weight, grads, measured), seen

        sums = walk(piece_sums, self.model_state, batch, key, self.microbatch)
        state, (total, weight, grads, measured), seen = sums
        value = total / safe(weight)
        grads = grads if whole else jax.tree.map(lambda g: g / safe(weight), grads)
        if self.regulariser is not None:
            penalty, more = jax.value_and_grad(self.penalty)(params)
            value, grads = value + penalty, jax.tree.map(jnp.add, grads, wide(more))
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        return value, grads, state, seen, None if measure is None else (measured, weight)

    def measure(self, params: PyTree, batch: Any, key: jax.Array | None, measure: Measure) -> tuple[Any, jax.Array]:
        """A measure's sums over the batch, and its total weight; of the gradient nothing is computed."""
        self._require_outputs("measure")

        def sums(piece, key):
            _, weight, _, _, _, measured = self._passes(params, self.model_state, piece, key, measure, grads=False)
            return measured, weight

        return self.accumulate(sums, batch, key)

    def in_one_piece(self, batch: Any) -> bool:
        """Whether the batch is no larger than `microbatch`."""
        return self.microbatch is None or self.microbatch >= batch_size(batch)

    def accumulate(self, sums: Callable[[Any, jax.Array | None], Sums], batch: Any, key: jax.Array | None) -> Sums:
        """Adds `sums(piece, key)` over the pieces of the batch, in their dtypes; each piece has its own key."""
        step = lambda state, piece, k: (state, sums(piece, k), None)
        return walk(step, None, batch, key, self.microbatch)[1]

    # -- inside ----------------------------------------------------------------------------------------------------

    def _with_frozen_leaves(self, params: PyTree) -> PyTree:
        """All parameters, trained and frozen, in the structure that the model or the loss function takes."""
        if not jax.tree.leaves(self.frozen):
            return params
        leaves = by_path(params) | by_path(self.frozen)
        if self._whole is None:
            return nested(leaves)
        treedef, paths = self._whole
        return treedef.unflatten([leaves[path] for path in paths])

    def _apply(self, params, model_state, piece, key, prepare=None) -> tuple[Any, PyTree]:
        """(outputs, model state after the forward pass)."""
        assert self._model is not None
        whole = self._with_frozen_leaves(params)
        outputs, state = self._model.apply(whole, model_state, piece, key, self.evaluating, prepare)
        if self.microbatch is not None and (why := self.coupling(params, piece, key, outputs)):
            raise refused(self.microbatch, why)
        return outputs, state

    def _passes(self, params, model_state, piece, key, measure, grads=True):
        """(total loss, total weight, the mean's gradient or None, model state, outputs, measured) of one piece.

        Derivatives are those of the mean: the seeds of a sum add up to gradients that overflow in float16. Where a
        measure reads the slots' cotangents for the total, the gradient is divided afterwards instead.
        """
        if self._model is None:
            if measure is not None:
                self._require_outputs("measure")
            value = jax.value_and_grad(self._mean_of_loss_fn, has_aux=True)
            (mean, weight), gradient = value(params, piece)
            return mean * weight, weight, wide(gradient), model_state, None, None
        slots, put = ({}, None) if measure is None else measure.prepare(piece)

        def forward(params, slots):
            prepare = None if put is None else lambda module: put(module, slots)
            outputs, state = self._apply(params, model_state, piece, key, prepare)
            return floats(outputs), (outputs, state)

        z, pull, (outputs, state) = jax.vjp(forward, params, slots, has_aux=True)
        rides = measure is not None and measure.rides(outputs, piece)

        def of_outputs(z):
            total, weight = total_of_outputs(self.loss_of_outputs, with_floats(outputs, z), piece, width(params))
            return total if rides else total / safe(weight), (total, weight)

        (_, (total, weight)), seeds = jax.value_and_grad(of_outputs, has_aux=True)(z)
        gradient, own = pull(seeds)
        gradient = wide(gradient)
        if rides:
            gradient = jax.tree.map(lambda g: g / safe(weight), gradient)
        measured = None
        if measure is not None:
            measured = measure.sums(lambda seeds: pull(seeds)[1], own, outputs, piece, key)
        return total, weight, gradient if grads else None, state, outputs, measured

    def _mean_of_loss_fn(self, params, piece):
        """(the mean loss of a piece, its weight)."""
        assert self._loss_fn is not None
        whole = self._with_frozen_leaves(params)
        return mean_of_loss_fn(self._loss_fn, whole, piece, self.microbatch is not None, width(params))
