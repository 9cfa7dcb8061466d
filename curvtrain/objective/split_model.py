"""A module in two halves: static structure, and arrays of four kinds.

| kind | what it is |
|---|---|
| parameters | variables that the filter `wrt` of the objective names: derivatives are taken of them |
| frozen | other `nnx.Param`s, and parameters that `Objective.select` left out: the loss reads them as they are |
| model state | the rest, such as batch statistics: a forward pass may change it |
| random streams | not kept: they are folded out of the key of each call |
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from curvtrain._keys import Purpose, fold
from curvtrain.losses import Batch, Loss
from curvtrain.objective import modes
from curvtrain.objective.paths import Path, by_path, path_name

PyTree = Any


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """The static half of a split module.

    Attributes:
      train, deterministic, evaluation: its graph as the module was configured; with dropout off; and with dropout off
        and running averages on.
      paths: of its parameters, trained and frozen.
      trained: the paths of those that were trained when it was split.
      streams: (path, variable type, shape) of each of its RNG variables.
      wrt: filter of the trainable variables.
      predict: `(module, batch) -> outputs`.
      loss: of the outputs.
    """

    train: nnx.GraphDef
    deterministic: nnx.GraphDef
    evaluation: nnx.GraphDef
    paths: tuple[Path, ...]
    trained: tuple[Path, ...]
    streams: tuple[tuple[tuple[Any, ...], type, tuple[int, ...]], ...]
    wrt: Any
    predict: Callable[[nnx.Module, Batch], Any]
    loss: Loss

    @classmethod
    def of(cls, model: nnx.Module, predict: Any, loss: Loss, wrt: Any) -> tuple["SplitModel", PyTree, PyTree, PyTree]:
        """Returns (the static half, parameters, frozen parameters, model state) of a module, as nested dicts."""
        model = modes.trained(model)
        graph, params, random, _, frozen, rest = _split(model, wrt)
        deterministic = _split(nnx.view(model, raise_if_not_found=False, **modes.DETERMINISTIC), wrt)[0]
        evaluation = _split(modes.evaluated(model), wrt)[0]
        streams = tuple((path, type(v), v.get_value().shape) for path, v in nnx.to_flat_state(random))
        params, frozen, rest = map(nnx.to_pure_dict, (params, frozen, rest))
        trained, paths = tuple(by_path(params)), (*by_path(params), *by_path(frozen))
        return cls(graph, deterministic, evaluation, paths, trained, streams, wrt, predict, loss), params, frozen, rest

    def random_state(self, key: jax.Array | None) -> PyTree:
        """The module's random streams, folded out of `key` in path order; counts start at zero."""
        key = fold(jax.random.key(0) if key is None else key, Purpose.STREAMS)
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
        """The module with these parameters, frozen ones included."""
        self._check_paths(params)
        # copy=True: without it, BatchNorm inside an HVP raises TraceContextError when it assigns its statistics
        return nnx.merge(graph, params, self.random_state(key), model_state, copy=True)

    def _check_paths(self, params: PyTree) -> None:
        """Raises ValueError unless these are the module's parameters, by their names."""
        given = by_path(params).keys()
        if given != set(self.paths):
            missing = [path_name(path) for path in self.paths if path not in given][:3]
            unknown = [path_name(path) for path in given if path not in set(self.paths)][:3]
            raise ValueError(
                f"These are not the parameters of the objective's model: {missing or 'none'} are missing and "
                f"{unknown or 'none'} are not the model's. Objective.from_model returns the right ones."
            )

    def apply(self, params, model_state, batch, key, evaluation: bool, prepare=None) -> tuple[Any, PyTree]:
        """(outputs, the model state after the forward pass); `prepare` may change the module before."""
        graph = self.evaluation if evaluation else self.deterministic if key is None else self.train
        module = self.merge(graph, params, model_state, key)
        if prepare is not None:
            prepare(module)
        try:
            outputs = self.predict(module, batch)
        except Exception as error:
            error.add_note(f"(In predict(model, batch), for a batch of {_described(batch)}.)")
            raise
        rest = nnx.to_pure_dict(_split(module, self.wrt)[-1])
        # keep what the split module had; variables that a forward pass adds (sown values) are not part of the state
        return outputs, _same_structure(rest, model_state)


def _described(batch: Any) -> str:
    """The arrays of a batch, for messages."""
    shown = [f"{path_name(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in by_path(batch).items()]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") or "no arrays"


def check_parts(model: Any, predict: Any, loss: Any) -> None:
    """Raises TypeError unless these are a module, a function and a loss."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"Objective.from_model(model) should be an nnx.Module, not {type(model).__name__}.")
    if not callable(predict):
        raise TypeError(
            f"Objective.from_model(predict) should be a function (model, batch) -> outputs, not "
            f"{type(predict).__name__}."
        )
    if not isinstance(loss, Loss):
        raise TypeError(
            f"Objective.from_model(loss) should be a curvtrain.losses.Loss, not {type(loss).__name__}. For a "
            f"function (outputs, batch) -> values of shape (batch,), pass losses.PerExample(function)."
        )


def check_params(params: PyTree, frozen: PyTree) -> None:
    """Raises ValueError if there are no parameters, TypeError if one is not of real floating-point numbers."""
    leaves = by_path(params)
    if not leaves:
        others = [path_name(path) for path in by_path(frozen)][:3]
        raise ValueError(
            "Objective.from_model(model, wrt) has no trainable variables: the filter matches none of the model's"
            + (f", of which {others} are of type nnx.Param." if others else ", and none of them is an nnx.Param.")
        )
    for path, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"Parameter {path_name(path)} is {leaf.dtype}; curvature needs real floating parameters. Leave it out "
                f"with Objective.from_model(wrt=...)."
            )


def annotated_specs(model: nnx.Module, wrt: Any = nnx.Param) -> PyTree:
    """The PartitionSpec that NNX sharding annotations give every trainable variable; empty where there is none."""
    return nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model, wrt)))


def _split(module: nnx.Module, wrt: Any) -> tuple[Any, ...]:
    """(graph, trainable, random streams, sown values, frozen, the rest)."""
    return nnx.split(module, wrt, nnx.RngState, nnx.Intermediate, nnx.Param, ...)


def _same_structure(found: Any, wanted: Any) -> Any:
    if isinstance(wanted, dict):
        return {name: _same_structure(found[name], value) for name, value in wanted.items()}
    return found
