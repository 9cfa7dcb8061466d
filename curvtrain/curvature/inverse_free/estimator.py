"""Inverse-free factors from gradients alone: what SIRF-Shampoo and IF-Shampoo take."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain import _checks
from curvtrain._keys import Purpose, fold
from curvtrain._text import table
from curvtrain.curvature import trees
from curvtrain.curvature.base import CurvatureEstimator
from curvtrain.curvature.inverse_free.factors import InverseFreeFactors
from curvtrain.curvature.inverse_free.step import Rule, of_gradient
from curvtrain.curvature.inverse_free.tensors import (
    Rates,
    Structures,
    Tensor,
    check_rates,
    check_structures,
    structures_for,
)
from curvtrain.curvature.inverse_free.views import EachParameter
from curvtrain.curvature.scanned import scan_axes
from curvtrain.objective import batch_size, loss_only_weight

PyTree = Any

NAME = "InverseFree"
DTYPES = ("float32", "bfloat16")
RATE, MOMENTUM, DAMPING = 1e-2, 0.5, 1e-3  # unless the user or an optimizer says otherwise
MAX_SIZE = 8192


@dataclasses.dataclass(frozen=True)
class InverseFree(CurvatureEstimator[InverseFreeFactors]):
    """P = (x)_n K_n K_n^T for every parameter, so that B g g^T in the coordinates of K is like I: products alone.

    All that it needs is the gradient g of the step, and how many examples B it is the mean of: it works for any loss.
    `update` moves the factors, one for every side of a tensor that is longer than 1; `refresh` has nothing to do. How
    often they move is the `update_every` of the `CurvatureSchedule` (T in the paper): from P = I they start slowly, so
    let them move in every step at first, as with `CurvatureSchedule(update_every=curvature.Warmed(10))`. What is left
    open (None) is what an optimizer asks for, `optim.sirfshampoo` or `optim.if_shampoo`. Lin et al. (2024),
    arXiv 2402.03496.

    Attributes:
      structure: of the factors: "dense", "diagonal", "block30diagonal", "hierarchical15_15", "lower_toeplitz",
        "upper_toeplitz", with any numbers in them; or (regular expression, name) pairs, searched in the parameters'
        names, the first that matches counting, with a name for each side if one is not enough. Those that take less
        memory take the work of dense ones, but for diagonals.
      rate: beta in (0, 1); None: 0.01.
      momentum: alpha, of the factors' directions; None: 0.5.
      damping: lambda; None: 1e-3.
      rates: (regular expression, factor) pairs, searched in the parameters' names: of those the rate times the factor,
        such as [("norm|bias", 0.25)].
      max_size: sides longer than this have diagonal factors.
      dtype: of factors and momenta, "float32" or "bfloat16"; None: float64 where a parameter is, otherwise float32. To
        bfloat16 factors are rounded up or down by chance: steps are smaller than its resolution.
      batch_size: B; None: the total weight of the batch's examples, however it is divided into pieces and over devices.
        Each position of a sequence counts as an example, if each has a loss.

    Raises:
      TypeError, ValueError: when built with a bad argument; in `init` for parameters that are no real numbers, and for
        a structure that does not fit a side; in `update` for a batch of which the number of examples is not known.
    """

    factorises = False

    structure: Structures = "dense"
    _: dataclasses.KW_ONLY
    rate: float | None = None
    momentum: float | None = None
    damping: float | None = None
    rates: Rates = ()
    max_size: int = MAX_SIZE
    dtype: str | None = None
    batch_size: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "structure", check_structures(f"{NAME}(structure)", self.structure))
        check_rule(NAME, self.rate, self.momentum, self.damping)
        in_unit = functools.partial(_checks.number_in, low=0.0, high=1.0, open_low=True)
        object.__setattr__(self, "rates", check_rates(f"{NAME}(rates)", self.rates, in_unit))
        _checks.positive_int(f"{NAME}(max_size)", self.max_size)
        if self.dtype is not None:
            _checks.one_of(f"{NAME}(dtype)", self.dtype, DTYPES)
        if self.batch_size is not None:
            _checks.number_in(f"{NAME}(batch_size)", self.batch_size, 0.0, open_low=True)

    @property
    def rule(self) -> Rule:
        """The rule by which factors move; what was left open has the defaults."""
        return rule_of(self.rate, self.momentum, self.damping)

    def init(self, objective, params) -> InverseFreeFactors:
        view, tensors = EachParameter.of(NAME, params, scan_axes(NAME, objective, params)), []
        for name, (copies, sides) in view.shapes().items():
            structures = structures_for(f"{NAME}(structure)", self.structure, name, sides, self.max_size)
            tensors.append(Tensor(name, copies, sides, structures, _rate_of(self.rates, name)))
        return InverseFreeFactors.begin(view, tuple(tensors), self.rule, "gradient", self.dtype)

    def update(self, curvature: InverseFreeFactors, objective, params, batch, key, *, grads=None) -> InverseFreeFactors:
        c = curvature
        grads = objective.value_and_grad(params, batch, key)[1] if grads is None else grads
        arrays = c.view.read(trees.wide(grads))
        B = self._examples(c, objective, params, batch, key)
        finite = [jnp.all(jnp.isfinite(G)) for G in arrays.values()]
        usable = functools.reduce(jnp.logical_and, finite, jnp.isfinite(B) & (B > 0))
        T = lambda stack, K: of_gradient(stack, K, stack.read(arrays), B)
        return c.moved(T, usable, fold(key, Purpose.FIT))

    def _examples(self, c: InverseFreeFactors, objective, params, batch, key) -> jax.Array:
        """B, () in the curvature's dtype."""
        if self.batch_size is not None:
            return jnp.asarray(self.batch_size, c.view.width)
        if objective is None:
            raise TypeError(
                f"{NAME} multiplies squares of the mean gradient by the number of examples, which the objective knows, "
                f"and there is none. Pass update() the objective and the batch, or give {NAME}(batch_size=...)."
            )
        if not objective.has_outputs:
            self._check_examples(batch)
            return loss_only_weight(batch, split=True).astype(c.view.width)  # the same in one piece and in several
        # of all that the loss is made of, only the weights are needed: the compiler leaves out the rest
        weight = lambda piece, key: objective.total(params, piece, key)[1]
        return objective.accumulate(weight, batch, key).astype(c.view.width)

    def _check_examples(self, batch: Any) -> None:
        """Raises ValueError unless all arrays of a batch have one length, which is then that of its examples."""
        try:
            batch_size(batch)
        except ValueError as error:
            raise ValueError(
                f"{NAME} multiplies squares of the mean gradient by the number of examples, and this batch does not "
                f"say it. Give {NAME}(batch_size=...). {error}"
            ) from None

    def refresh(self, curvature, objective, params, batch, key, damping=None) -> InverseFreeFactors:
        """The factors as they are."""
        return curvature

    def partition_specs(self, curvature: InverseFreeFactors, param_specs, mesh):
        return curvature.partition_specs(mesh)

    def overview(self, objective, params) -> str:
        c = jax.eval_shape(self.init, objective, params)
        return table([("parameter", "sides", "factors", "bytes"), *c.rows()], left=3)


def rule_of(rate: float | None, momentum: float | None, damping: float | None, **rest: Any) -> Rule:
    """Returns a rule, with defaults in the place of None."""
    chosen = lambda value, default: default if value is None else float(value)
    return Rule(chosen(rate, RATE), chosen(momentum, MOMENTUM), chosen(damping, DAMPING), **rest)


def check_rule(name: str, rate: Any, momentum: Any, damping: Any) -> None:
    """Raises TypeError or ValueError unless these are numbers of a rule, or None."""
    if rate is not None:
        _checks.number_in(f"{name}(rate)", rate, 0.0, 1.0, open_low=True, open_high=True)
    if momentum is not None:
        _checks.number_in(f"{name}(momentum)", momentum, 0.0, 1.0, open_high=True)
    if damping is not None:
        _checks.number_in(f"{name}(damping)", damping, 0.0, open_low=True)


def _rate_of(rates: Any, name: str) -> float:
    return next((factor for regex, factor in rates if re.search(regex, name)), 1.0)
