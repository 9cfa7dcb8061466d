"""Statistics of layers: what an estimator asks of every layer of a model, for sums over a batch.

Symbols as in `layers`, and: w_n, the weight of example n: its cotangents s come multiplied by sqrt(w_n), so products of
two are weighted.

A layer that is called more than once for one example (a recurrent cell, a shared block, a tied table) adds up its calls
in D_n before any product is taken: such statistics, which `of_examples` names, are taken of the gradients of single
examples, see `singly.py`. Kronecker factors are sums over rows, so every call counts as a position of its own
("expand"); with "reduce" the positions of one call are averaged, and calls count as examples.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from curvtrain.curvature.capture.layers import Backward, Gradients, Layer, Options

Arrays = dict[str, jax.Array]
Shapes = dict[str, tuple[int, ...]]

WEIGHT_SHARING = ("expand", "reduce")


@dataclasses.dataclass(frozen=True)
class Statistic(abc.ABC):
    """What is measured of every layer: static, it becomes part of a tapped module's graph.

    Attributes:
      needs: methods of `Layer` of which a layer's class has to define one.
    """

    needs: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def shapes(self, layer: Layer) -> Shapes:
        """The statistics of one call of a layer, by name: (g, ...), sums over examples."""

    def sized(self, layer: Layer, inputs: tuple[int, ...]) -> Shapes:
        """`shapes`, where they depend on the shape of the layer's inputs, too: (N, ...), examples first."""
        return self.shapes(layer)

    def saved(self, layer: Layer, module: Any, x: Any, options: Mapping[str, Any]) -> Any:
        """Returns what is kept of a call with input x, and other arguments by name: it becomes `Backward.saved`.

        The default is what the layer says, of a norm layer the normalised input.
        """
        return layer.saved(module, x, options)

    def given(self, layer: Layer) -> tuple[str, ...]:
        """Names of the arrays that the measurement needs."""
        return ()

    @abc.abstractmethod
    def __call__(self, layer: Layer, backward: Backward) -> Arrays:
        """The statistics of one call of a layer."""

    def of_examples(self, layer: Layer) -> tuple[str, ...]:
        """Names of the statistics that are sums over examples of products of D_n with itself."""
        return ()

    def measure_examples(self, layer: Layer, gradients: Gradients, given: Arrays) -> Arrays:
        """The statistics that `of_examples` names, from the gradients of examples, whatever the layer's calls."""
        return {}

    def check(self, layer: Layer, who: str) -> None:
        """Raises TypeError if the layer's class lacks what the statistic needs."""
        if layer.tapped and all(layer.lacks(method) for method in self.needs):
            raise TypeError(
                f"{who} needs {' or '.join(f'{method}()' for method in self.needs)} of a layer, and "
                f"{type(layer).__name__}, the layer of {layer.kind} {layer.name!r}, defines neither: write "
                f"{type(layer).__name__}.{self.needs[0]} (see curvature.Layer), or treat its parameters as plain ones "
                f"({who}(plain={layer.name!r}))."
            )


@dataclasses.dataclass(frozen=True)
class KroneckerStatistic(Statistic):
    """Kronecker factors, unnormalised, as the layer's `block` has them.

    Attributes:
      weight_sharing, diagonal, scales, sometimes: as in `Options`.
    """

    weight_sharing: str = "expand"
    diagonal: bool = False
    scales: bool = False
    sometimes: bool = False

    needs = ("block",)

    @property
    def options(self) -> Options:
        return Options(self.weight_sharing, self.diagonal, self.scales, self.sometimes)

    def shapes(self, layer) -> Shapes:
        return layer.block().shapes(layer, self.options)

    def given(self, layer):
        return layer.block().given(self.options)

    def __call__(self, layer, backward):
        return layer.block().measure(layer, backward, self.options)

    def of_examples(self, layer):
        return layer.block().of_examples(self.options)

    def measure_examples(self, layer, gradients, given):
        return layer.block().measure_examples(gradients, given, self.options)


@dataclasses.dataclass(frozen=True)
class DiagonalStatistic(Statistic):
    """`D2`: sum_n D_n^2 elementwise, (g, d_i, d_o)."""

    needs = ("gradients", "squares")

    def shapes(self, layer) -> Shapes:
        return {"D2": (layer.groups, layer.d_i, layer.d_o)}

    def __call__(self, layer, backward):
        return {"D2": layer.squares(backward)}

    def of_examples(self, layer):
        return ("D2",)

    def measure_examples(self, layer, gradients, given):
        return {"D2": gradients.squares()}


@dataclasses.dataclass(frozen=True)
class UnitStatistic(Statistic):
    """`F`: sum_n of outer products of D_n's columns, one block for each unit (output or channel): (g, d_o, d_i, d_i).

    For a norm layer p x p, p = 2 for scale and bias (Osawa et al. 2020, arXiv 2002.06015, section 4.2).
    """

    needs = ("gradients", "units")

    def shapes(self, layer) -> Shapes:
        return {"F": (layer.groups, layer.d_o, layer.d_i, layer.d_i)}

    def __call__(self, layer, backward):
        return {"F": layer.units(backward)}

    def of_examples(self, layer):
        return ("F",)

    def measure_examples(self, layer, gradients, given):
        return {"F": gradients.units()}


@dataclasses.dataclass(frozen=True)
class FullStatistic(Statistic):
    """`F`: sum_n vec(D_n) vec(D_n)^T, (g, d_i d_o, d_i d_o), row-major vec: the whole block of a layer."""

    needs = ("gradients", "full")

    def shapes(self, layer) -> Shapes:
        size = layer.d_i * layer.d_o
        return {"F": (layer.groups, size, size)}

    def __call__(self, layer, backward):
        return {"F": layer.full(backward)}

    def of_examples(self, layer):
        return ("F",)

    def measure_examples(self, layer, gradients, given):
        return {"F": gradients.full()}
