"""An NNX model, a prediction and a loss, seen as pure functions of the parameters.

This is the only place where a module is split or merged. Everything else in the project sees `params`, a nested dict
of arrays in the module's own structure, and an `Objective`, which is a pytree: its leaves are the model's other state
(batch statistics and the like), while graph and functions are static, so it passes through `jax.jit`.

    loss(params) = sum_i w_i l(f(params, x_i), t_i) / sum_i w_i

Randomness comes in through `key` alone: the module's own random streams are replaced by streams folded out of it.
Without a key, dropout is off.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from curvtrain import _checks
from curvtrain.losses import RESERVED, Batch, Loss, example_weights, unmasked

PyTree = Any
Sums = TypeVar("Sums")

_DETERMINISTIC = dict(deterministic=True)
_EVALUATION = dict(deterministic=True, use_running_average=True)


@dataclasses.dataclass(frozen=True)
class _Model:
    """The static half of a split module: its graph in three modes, and what its random streams look like."""

    train: nnx.GraphDef  # as the module was configured
    deterministic: nnx.GraphDef  # dropout off
    evaluation: nnx.GraphDef  # dropout off, running averages on
    streams: tuple[tuple[tuple[Any, ...], type, tuple[int, ...]], ...]  # (path, variable type, shape) per RNG variable
    wrt: Any  # filter of the trainable variables
    predict: Callable[[nnx.Module, Batch], Any]
    loss: Loss

    def random_state(self, key: jax.Array | None) -> PyTree:
        """The module's random streams, folded out of `key` in path order; counts start at zero."""
        key = jax.random.key(0) if key is None else key
        state: dict[Any, Any] = {}
        for i, (path, kind, shape) in enumerate(self.streams):
            node = state
            for part in path[:-1]:
                node = node.setdefault(part, {})
            is_key = issubclass(kind, nnx.RngKey)
            node[path[-1]] = (
                jax.random.split(jax.random.fold_in(key, i), shape) if is_key else jnp.zeros(shape, "uint32")
            )
        return state

    def merge(self, graph: nnx.GraphDef, params: PyTree, model_state: PyTree, key: jax.Array | None) -> nnx.Module:
        # copy=True: without it, BatchNorm inside an HVP raises TraceContextError when it assigns its statistics
        return nnx.merge(graph, params, self.random_state(key), model_state, copy=True)

    def apply(self, params, model_state, batch, key, evaluation: bool, prepare=None) -> tuple[Any, PyTree]:
        graph = self.evaluation if evaluation else self.deterministic if key is None else self.train
        module = self.merge(graph, params, model_state, key)
        if prepare is not None:
            prepare(module)
        outputs = self.predict(module, batch)
        rest = nnx.to_pure_dict(_split(module, self.wrt)[-1])
        # keep what the split module had; variables that a forward pass adds (sown values) are not part of the state
        return outputs, _same_structure(rest, model_state)


def _split(module: nnx.Module, wrt: Any) -> tuple[Any, ...]:
    """(graph, trainable, random streams, sown values, the rest)."""
    return nnx.split(module, wrt, nnx.RngState, nnx.Intermediate, ...)


def _same_structure(found: Any, wanted: Any) -> Any:
    if isinstance(wanted, dict):
        return {name: _same_structure(found[name], value) for name, value in wanted.items()}
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a model as a pure function of its parameters. Build it with `from_model` or `from_loss`.

    Attributes:
      model_state: the model's state that is neither parameter nor random stream, a nested dict of arrays.
      microbatch: number of examples that are walked at a time, or None for the whole batch in one piece.
      evaluating: running averages and no dropout, whatever the key.
    """

    model_state: PyTree
    _model: _Model | None = dataclasses.field(metadata=dict(static=True))
    _loss_fn: Callable[[PyTree, Any], jax.Array] | None = dataclasses.field(metadata=dict(static=True))
    microbatch: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    evaluating: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @staticmethod
    def from_model(
        model: nnx.Module,
        predict: Callable[[Any, Any], Any],
        loss: Loss,
        *,
        microbatch: int | None = None,
        wrt: Any = nnx.Param,
    ) -> tuple["Objective", PyTree]:
        """Splits `model` into an objective and its parameters.

        Args:
          model: any module: BatchNorm, Dropout, remat and scan included. It is read, not changed.
          predict: `(model, batch) -> outputs`.
          loss: a `curvtrain.losses.Loss`.
          microbatch: walk batches in pieces of this many examples; same result, less memory. A layer that mixes
            examples (BatchNorm with batch statistics) sees a piece at a time, exactly as it does when gradients are
            accumulated.
          wrt: filter of the trainable variables.

        Returns:
          The objective and its parameters, a nested dict of arrays in the module's own structure.
        """
        if not isinstance(model, nnx.Module):
            raise TypeError(f"Objective.from_model(model) should be an nnx.Module, not {type(model).__name__}.")
        if not isinstance(loss, Loss):
            raise TypeError(
                f"Objective.from_model(loss) should be a curvtrain.losses.Loss, not {type(loss).__name__}. For a "
                f"function (outputs, batch) -> values of shape (batch,), pass losses.PerExample(function)."
            )
        if microbatch is not None:
            _checks.positive_int("Objective.from_model(microbatch)", microbatch)
        graph, params, random, _, rest = _split(model, wrt)
        deterministic, evaluation = (
            _split(nnx.view(model, raise_if_not_found=False, **flags), wrt)[0]
            for flags in (_DETERMINISTIC, _EVALUATION)
        )
        params = nnx.to_pure_dict(params)
        _check_params(params)
        streams = tuple((path, type(v), v.get_value().shape) for path, v in nnx.to_flat_state(random))
        program = _Model(graph, deterministic, evaluation, streams, wrt, predict, loss)
        return Objective(nnx.to_pure_dict(rest), program, None, microbatch), params

    @staticmethod
    def from_loss(loss_fn: Callable[[PyTree, Any], jax.Array], *, microbatch: int | None = None) -> "Objective":
        """An objective over any pytree of parameters from a scalar function `(params, batch) -> mean loss`.

        It has no outputs, so the GGN, the Fisher and K-FAC are out of its reach. Pieces of a micro-batched batch are
        weighted by their number of examples (or their `mask`/`weights`).
        """
        if not callable(loss_fn):
            raise TypeError(f"Objective.from_loss(loss_fn) should be a function, not {type(loss_fn).__name__}.")
        if microbatch is not None:
            _checks.positive_int("Objective.from_loss(microbatch)", microbatch)
        return Objective({}, None, loss_fn, microbatch)

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

    def _require_outputs(self, who: str, instead: str = "Objective.from_model(model, predict, loss)") -> _Model:
        if self._model is None:
            raise TypeError(
                f"{who} needs the model's outputs, but this objective was made with Objective.from_loss and has only "
                f"a scalar loss. Use {instead}."
            )
        return self._model

    def with_state(self, model_state: PyTree) -> "Objective":
        """The same objective with other model state (of the same structure)."""
        return dataclasses.replace(self, model_state=model_state)

    def with_microbatch(self, microbatch: int | None) -> "Objective":
        """The same objective, walked in pieces of `microbatch` examples (None: in one piece)."""
        return dataclasses.replace(self, microbatch=microbatch)

    def evaluation(self) -> "Objective":
        """The same objective as it is evaluated: running averages, no dropout."""
        return dataclasses.replace(self, evaluating=True)

    def module(self, params: PyTree) -> nnx.Module:
        """The module with these parameters, in the mode in which it was given (of `evaluation()`: to be evaluated)."""
        model = self._require_outputs("A module")
        graph = model.evaluation if self.evaluating else model.train
        return model.merge(graph, params, self.model_state, None)

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
        model = self._require_outputs("predict")
        return model.apply(params, self.model_state, batch, key, self.evaluating, prepare)[0]

    def loss(self, params: PyTree, batch: Any, key: jax.Array | None = None) -> jax.Array:
        """The mean loss over the (unmasked) examples: a float32 scalar."""
        total, weight = self.accumulate(lambda piece, k: self.total(params, piece, k), batch, key)
        return total / safe(weight)

    def total(self, params: PyTree, piece: Any, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """(sum_i w_i l_i, sum_i w_i) over one piece: what adds up over pieces, devices and processes."""
        total, (weight, _, _) = self._total(params, self.model_state, piece, key)
        return total, weight

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

        def piece_sums(state, piece, key):
            grad_fn = jax.value_and_grad(lambda p: self._total(p, state, piece, key), has_aux=True)
            (total, (weight, outputs, state)), grads = grad_fn(params)
            seen = observe(outputs, piece) if observe is not None else None
            return state, (total, weight, _float32(grads)), seen

        state, (total, weight, grads), seen = self._walk(piece_sums, self.model_state, batch, key)
        grads = jax.tree.map(lambda g, p: (g / safe(weight)).astype(p.dtype), grads, params)
        return total / safe(weight), grads, state, seen

    def in_one_piece(self, batch: Any) -> bool:
        """Whether the batch is no larger than `microbatch`."""
        return self.microbatch is None or self.microbatch >= batch_size(batch)

    def accumulate(self, sums: Callable[[Any, jax.Array | None], Sums], batch: Any, key: jax.Array | None) -> Sums:
        """Adds `sums(piece, key)` over the pieces of the batch, in float32; each piece has its own key."""
        step = lambda state, piece, k: (state, sums(piece, k), None)
        return self._walk(step, None, batch, key)[1]

    # -- inside ----------------------------------------------------------------------------------------------------

    def _total(self, params, model_state, piece, key):
        """(sum_i w_i l_i, (sum_i w_i, outputs, new model state))."""
        if self._model is None:
            assert self._loss_fn is not None
            weight = _loss_only_weight(piece)
            value = self._loss_fn(params, piece)
            if jnp.shape(value) != ():
                raise ValueError(
                    f"The function given to Objective.from_loss should return a scalar, not shape {jnp.shape(value)}."
                )
            return jnp.asarray(value, jnp.float32) * weight, (weight, None, model_state)
        outputs, state = self._model.apply(params, model_state, piece, key, self.evaluating)
        weights = self._model.loss.weights(outputs, piece)
        values = self._model.loss.values(unmasked(outputs, weights), piece)
        # where, not a product: a masked example may hold anything, and 0 * inf is not 0
        total = jnp.sum(jnp.where(weights != 0, weights * values, 0.0))
        return total, (jnp.sum(weights), outputs, state)

    def _walk(self, step, state, batch, key):
        """Runs `step(state, piece, key) -> (state, sums, seen)` over the pieces: (state, added sums, stacked seen)."""
        m = self.microbatch
        if m is None or self.in_one_piece(batch):
            state, sums, seen = step(state, batch, key)
            return state, sums, jax.tree.map(lambda a: a[None], seen)
        size = batch_size(batch)
        pieces, rest = divmod(size, m)
        keys = [None] * (pieces + 1) if key is None else jax.random.split(key, pieces + 1)
        # Piece j takes rows j, j + pieces, ...: a batch that is sharded over devices in contiguous blocks then gives
        # every device its share of every piece, without communication.
        cut = lambda a: jnp.moveaxis(a[: pieces * m].reshape((m, pieces, *a.shape[1:])), 1, 0)
        stacked = jax.tree.map(cut, batch)

        def body(carry, xs):
            state, sums = carry
            piece, k = xs
            state, more, seen = step(state, piece, k)
            return (state, jax.tree.map(jnp.add, sums, more)), seen

        first = jax.tree.map(lambda a: a[0], stacked)
        shapes = jax.eval_shape(step, state, first, keys[0])[1]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (state, sums), seen = jax.lax.scan(body, (state, zeros), (stacked, None if key is None else keys[:pieces]))
        if rest:
            state, more, last = step(state, jax.tree.map(lambda a: a[pieces * m :], batch), keys[pieces])
            sums = jax.tree.map(jnp.add, sums, more)
            seen = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), seen, last)
        return state, sums, seen


def annotated_specs(model: nnx.Module, wrt: Any = nnx.Param) -> PyTree:
    """The PartitionSpec that NNX sharding annotations give every trainable variable; empty where there is none."""
    return nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model, wrt)))


def safe(weight: jax.Array) -> jax.Array:
    """A denominator: the total weight, or one where every example is masked (then the sums above it are zero)."""
    return jnp.where(weight > 0, weight, 1.0)


def _float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def batch_size(batch: Any) -> int:
    """The number of examples of a batch: the length that all of its arrays share. Raises ValueError if they do not."""
    lengths = {
        jax.tree_util.keystr(path, simple=True, separator="."): jnp.shape(leaf)[0] if jnp.ndim(leaf) else "a scalar"
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    if len(set(lengths.values())) != 1 or "a scalar" in lengths.values():
        raise ValueError(
            f"The arrays of a batch should have one common length, their number of examples, not {lengths}."
        )
    return int(next(iter(lengths.values())))


def _loss_only_weight(piece: Any) -> jax.Array:
    """What a piece counts for, where only its mean loss is known: its examples, or their mask and weights."""
    leading = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(piece) if jnp.ndim(leaf)}
    if len(leading) != 1:
        return jnp.float32(1.0)  # not examples along a common axis: the batch is one piece anyway
    entries = [jnp.shape(piece[name]) for name in RESERVED if isinstance(piece, Mapping) and name in piece]
    return jnp.sum(example_weights(piece, max([(leading.pop(),), *entries], key=len)))


def _check_params(params: PyTree) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("Objective.from_model(model) has no trainable variables: its nnx.Param state is empty.")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise TypeError(
                f"Parameter {name} is {leaf.dtype}; curvature needs real floating parameters. Leave it out with "
                f"Objective.from_model(wrt=...)."
            )
