"""Optimizers that sample, in a Trainer: gradients in expectation over draws, and averaged predictions."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from curvtrain import _checks
from curvtrain._keys import Purpose, fold
from curvtrain.curvature.draws import Draws, over_draws, statistics
from curvtrain.curvature.posterior import Sampler, sampler_of, wanted
from curvtrain.losses import Loss
from curvtrain.objective import Objective, batch_size
from curvtrain.trainer.mesh.sharding import DRAWS_AXIS
from curvtrain.trainer.state import TrainState

PyTree = Any
Look = Callable[[PyTree, jax.Array], tuple[tuple[Any, ...], PyTree]]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a run draws parameters.

    Attributes:
      sampler: draws from the optimizer's state; None for an optimizer that does not sample.
      mc_samples: draws over which a step's gradient is a mean.
      predictive_samples: draws over which an evaluation averages predictions; 0: none, at the parameters themselves.
      shards: the size of the mesh axis over which a step's draws are split.
    """

    sampler: Sampler | None = None
    mc_samples: int = 1
    predictive_samples: int = 0
    shards: int = 1

    @classmethod
    def of(
        cls, name: str, tx: Any, opt_state: PyTree, mc_samples: int, predictive_samples: int, mesh: Mesh, loss: Loss
    ) -> "Sampling":
        """Raises TypeError or ValueError for numbers that are none, or that optimizer, mesh or loss do not go with."""
        _checks.positive_int(f"{name}(mc_samples)", mc_samples)
        _checks.positive_int(f"{name}(predictive_samples)", predictive_samples, minimum=0)
        sampler, shards = sampler_of(tx, opt_state), mesh.shape.get(DRAWS_AXIS, 1)
        asked = {"mc_samples": mc_samples > 1, "predictive_samples": predictive_samples > 0}
        for argument in (argument for argument, on in asked.items() if on and sampler is None):
            raise ValueError(
                f"{name}({argument}={mc_samples if argument == 'mc_samples' else predictive_samples}) needs an "
                f"optimizer that samples, with a method sample(opt_state, params, key, curvature), and this one has "
                f"none. Leave it out, or take such an optimizer."
            )
        if mc_samples % shards:
            raise ValueError(
                f"{name}(mc_samples={mc_samples}) should be divisible over the mesh {dict(mesh.shape)}, which splits "
                f"the draws of a step into {shards}."
            )
        if predictive_samples and not type(loss).can_average:
            raise TypeError(
                f"{name}(predictive_samples={predictive_samples}) averages predictions, and {type(loss).__name__} does "
                f"not say how: define {type(loss).__name__}.average(stacked), from outputs with a leading axis of "
                f"draws to outputs."
            )
        return cls(sampler, mc_samples, predictive_samples, shards)

    def expect(self, look: Look, state: TrainState, key: jax.Array) -> tuple[tuple[Any, ...], PyTree, Draws | None]:
        """What a look at the parameters finds, in expectation over draws if the optimizer samples.

        Args:
          look: `(parameters, key) -> (found, seen)`; `found` is averaged, and its second entry is the gradient. `seen`
            has a leading axis of pieces, along which those of all draws are joined.
          state: before the step.
          key: of the step.

        Returns:
          (found, seen, what the update is told about the draws, None if there are none).
        """
        if self.sampler is None:
            return *look(state.params, fold(key, Purpose.NOISE)), None
        sampler, wants = self.sampler, wanted(state.opt_state)
        draw = lambda key: sampler(state.opt_state, state.params, key, state.curvature)

        def at(drawn, key):
            theta, noise = drawn
            found, seen = look(theta, key)
            return (found, statistics(wants, noise, found[1])), seen

        axis = DRAWS_AXIS if self.shards > 1 else None
        means, seen = over_draws(draw, at, fold(key, Purpose.DRAWS), self.mc_samples, axis, self.shards)
        return means[0], jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), seen), means[1]

    def predict(
        self,
        here: Objective,
        params: PyTree,
        opt_state: PyTree,
        curvature: Any,
        batch: Any,
        run_key: jax.Array,
        key: jax.Array,
    ) -> Any:
        """The outputs for a batch, averaged over the draws of an evaluation, which are the same for all batches.

        `run_key` decides what is drawn, and `key` the model's own randomness.
        """
        if not self.predictive_samples:
            return here.predict(params, batch, key)
        assert self.sampler is not None
        sampler, draws_key = self.sampler, fold(run_key, Purpose.PREDICTIVE)

        def at(index):
            theta, _ = sampler(opt_state, params, jax.random.fold_in(draws_key, index), curvature)
            return here.predict(theta, batch, jax.random.fold_in(key, index))

        return here.loss_of_outputs.average(jax.lax.map(at, jnp.arange(self.predictive_samples)))


def number_of_examples(arrays: Any, loss: Loss, objective: Objective, params: PyTree, batch: Any) -> int:
    """How many values the loss has over all data: rows, or positions of sequences, that do not weigh zero.

    Args:
      arrays: all data, on the host.
      loss: the run's.
      objective, params, batch: of a training step; only shapes are used.
    """
    predict = lambda objective, params, batch: objective.with_microbatch(None).predict(params, batch)
    outputs = jax.eval_shape(predict, objective, params, batch)
    shape = jax.eval_shape(loss.weights, outputs, batch).shape
    with jax.ensure_compile_time_eval():
        known = loss.known_weights(arrays).product
        rows = (batch_size(arrays), 1) if known is None else (int(np.count_nonzero(known)), np.ndim(known))
    return rows[0] * math.prod(shape[rows[1] :])
