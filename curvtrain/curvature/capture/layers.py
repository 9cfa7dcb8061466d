"""What is known of each layer class: how its parameters form a matrix, and which rows that matrix multiplies.

Symbols, after Martens and Grosse (2015), arXiv 1503.05671, in Flax's layout:

| symbol | shape | meaning |
|---|---|---|
| K | | copies of the layer's matrix: stacked by `nnx.scan` or `nnx.vmap`, times the groups of a convolution |
| N, R | | examples of a batch, and positions of one that share the matrix: pixels, tokens, 1 for plain `Linear` |
| d_i, d_o | | inputs, plus 1 if there is a bias (homogeneous coordinate, last), and outputs |
| M | (K, d_i, d_o) | the layer's parameters as matrices; a bias is the last row |
| a | (g, N, R, d_i) | what M multiplies, for each of g groups: the gradient of example n is sum_r a s^T |
| s | (g, N, R, d_o) | gradient with respect to the layer's output |

Embeddings have one-hot rows a, kept as indices; a norm layer has (scale, bias) as its M (K, p, C) and the normalised
input as its a; any other parameter is `plain`: a vector of its own.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

PyTree = Any
Path = tuple[Any, ...]


class Unsupported(Exception):
    """Why a module of a known class cannot be covered."""


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


@dataclasses.dataclass(frozen=True)
class Layer(abc.ABC):
    """One module of the model, as static data. `register_layer` adds classes; `from_module` makes one of a module.

    Attributes:
      path: of the module in the model.
      kind: its class name.
      stack: leading axes that `nnx.scan` or `nnx.vmap` gave its parameters.
      shapes: (name, shape without the stack) of each of its parameters, those that M is made of.
    """

    path: Path
    kind: str
    stack: tuple[int, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    @abc.abstractmethod
    def from_module(cls, path: Path, module: Any) -> "Layer":
        """The layer of a module. Raises Unsupported with a reason."""

    @property
    def size(self) -> int:
        """Number of parameters."""
        return _size(self.stack) * sum(_size(shape) for _, shape in self.shapes)

    @property
    def name(self) -> str:
        return "/".join(map(str, self.path))

    def saved(self, module: Any, x: Any, options: Mapping[str, Any]) -> PyTree:
        """What of a call with input x, and other arguments by name, is kept for its statistics."""
        return x

    def leading(self, shape: tuple[int, ...]) -> int:
        """Length of the first axis of an input of this shape that is neither features nor groups; 1 if there is none.

        For a model that is called on a batch, this axis is that of the examples.
        """
        return shape[0] if len(shape) > 1 else 1

    @abc.abstractmethod
    def matrix(self, parameters: Mapping[str, jax.Array]) -> jax.Array:
        """The parameters, or a vector like them, as M."""

    @abc.abstractmethod
    def parameters(self, matrix: jax.Array) -> dict[str, jax.Array]:
        """The inverse of `matrix`."""


def _stack_of(module: Any, name: str, array: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The leading axes of a parameter beyond `shape`. Raises Unsupported if the rest of it is not `shape`."""
    lead = array.ndim - len(shape)
    if lead < 0 or array.shape[lead:] != shape:
        raise Unsupported(
            f"its {name} has shape {array.shape}, not (..., {', '.join(map(str, shape))}): axes that nnx.scan or "
            f"nnx.vmap add should lead"
        )
    return array.shape[:lead]


@dataclasses.dataclass(frozen=True)
class MatrixLayer(Layer):
    """A layer y = a M whose parameters are a kernel and perhaps a bias.

    Attributes:
      groups: g, copies of M within the layer.
      order: axes of the kernel in the order (groups, inputs, outputs), as indices into its shape.
      inputs: number of inputs of a group, without the bias.
      outputs: of a group.
    """

    groups: int
    order: tuple[int, ...]
    inputs: int
    outputs: int

    @property
    def copies(self) -> int:
        """K."""
        return _size(self.stack) * self.groups

    @property
    def has_bias(self) -> bool:
        return len(self.shapes) > 1

    @property
    def d_i(self) -> int:
        return self.inputs + self.has_bias

    @property
    def d_o(self) -> int:
        return self.outputs

    def matrix(self, parameters):
        lead = len(self.stack)
        kernel = parameters["kernel"]
        axes = (*range(lead), *(lead + axis for axis in self.order))
        kernel = self._split_groups(kernel.transpose(axes)).reshape(self.copies, self.inputs, self.outputs)
        if not self.has_bias:
            return kernel
        bias = parameters["bias"].reshape(self.copies, 1, self.outputs)
        return jnp.concatenate([kernel, bias.astype(kernel.dtype)], axis=1)

    def parameters(self, matrix):
        lead, shapes = len(self.stack), dict(self.shapes)
        shape = shapes["kernel"]
        kernel = self._join_groups(matrix[:, : self.inputs]).reshape(*self.stack, *(shape[axis] for axis in self.order))
        back = sorted(range(len(shape)), key=self.order.__getitem__)
        found = {"kernel": kernel.transpose((*range(lead), *(lead + axis for axis in back)))}
        if self.has_bias:
            found["bias"] = matrix[:, self.inputs].reshape(*self.stack, *shapes["bias"])
        return found

    def _split_groups(self, kernel):
        """The kernel with its groups as a leading axis after the stack; here they are there already."""
        return kernel

    def _join_groups(self, kernel):
        return kernel

    @abc.abstractmethod
    def rows(self, x: jax.Array, examples: int) -> jax.Array:
        """a without the bias's 1: (g, N, R, inputs), float32."""

    @abc.abstractmethod
    def cotangents(self, s: jax.Array, examples: int) -> jax.Array:
        """s as (g, N, R, outputs), float32."""

    def with_one(self, a: jax.Array) -> jax.Array:
        """a with the bias's 1 appended."""
        return jnp.concatenate([a, jnp.ones((*a.shape[:-1], 1), a.dtype)], axis=-1) if self.has_bias else a


def _kernel_shapes(module: Any, names: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], tuple]:
    """(stack, shapes) of a module's kernel and bias, which should have the shapes in `names` after the stack."""
    stack = _stack_of(module, "kernel", module.kernel.get_value(), names["kernel"])
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = (("kernel", names["kernel"]),)
    if module.bias is not None:
        if _stack_of(module, "bias", module.bias.get_value(), names["bias"]) != stack:
            raise Unsupported("its kernel and bias are stacked differently")
        shapes += (("bias", names["bias"]),)
    return stack, shapes


@dataclasses.dataclass(frozen=True)
class DenseLayer(MatrixLayer):
    """`nnx.Linear` and `nnx.LinearGeneral` (so the projections of `nnx.MultiHeadAttention`): any contracted axes.

    Attributes:
      axis: contracted axes of the input, as the module has them.
      batch: axes that input, kernel and output share (groups).
    """

    axis: tuple[int, ...] = (-1,)
    batch: tuple[int, ...] = ()

    @classmethod
    def from_module(cls, path, module):
        if isinstance(module, nnx.LinearGeneral):
            sizes, axis = tuple(module.batch_axis.values()), tuple(module.axis)
            ins, outs, batch = module.in_features, module.out_features, tuple(sorted(module.batch_axis))
        else:
            sizes, axis, ins, outs, batch = (), (-1,), (module.in_features,), (module.out_features,), ()
        if getattr(module, "dot_general_cls", None) is not None:
            raise Unsupported("it has a dot_general_cls, so what it multiplies is not known")
        names = {"kernel": (*sizes, *ins, *outs), "bias": (*sizes, *outs)}
        stack, shapes = _kernel_shapes(module, names)
        order = tuple(range(len(names["kernel"])))
        return cls(
            path, type(module).__name__, stack, shapes, _size(sizes), order, _size(ins), _size(outs), axis, batch
        )

    def leading(self, shape):
        axis = tuple(a % len(shape) for a in self.axis)
        rest = [n for i, n in enumerate(shape) if i not in axis and i not in self.batch]
        return rest[0] if rest else 1

    def rows(self, x, examples):
        x = x.astype(jnp.float32)
        axis = sorted(a % x.ndim for a in self.axis)  # nnx.LinearGeneral contracts them in this order, however given
        rest = tuple(i for i in range(x.ndim) if i not in axis and i not in self.batch)
        x = x.transpose((*self.batch, *rest, *axis))
        return x.reshape(self.groups, examples, -1, self.inputs)

    def cotangents(self, s, examples):
        return s.astype(jnp.float32).reshape(self.groups, examples, -1, self.outputs)


@dataclasses.dataclass(frozen=True)
class EinsumLayer(MatrixLayer):
    """`nnx.Einsum`: labels in input, kernel and output are groups; in input and kernel only, inputs; in kernel and
    output, outputs; in input and output, positions.

    Attributes:
      equation: (labels of the input, of the kernel, of the output), "." for an ellipsis.
    """

    equation: tuple[str, str, str] = ("", "", "")

    @classmethod
    def from_module(cls, path, module):
        if module.einsum_str is None:
            raise Unsupported("its equation is given at the call; give it to nnx.Einsum itself")
        x, rest = module.einsum_str.replace(" ", "").replace("...", ".").split(",")
        w, y = rest.split("->")
        bad = next((part for part in (x, w, y) if len(set(part)) != len(part)), None)
        if bad is not None or "." in w or set(y) - set(x) - set(w) or set(x) - set(w) - set(y):
            raise Unsupported(
                f"its equation {module.einsum_str!r} repeats a label, sums one operand alone, or has '...' in its "
                f"kernel"
            )
        if "." in y and [label for label in x if label not in w] != [label for label in y if label not in w]:
            raise Unsupported(f"its equation {module.einsum_str!r} reorders positions together with '...'")
        shape = tuple(module.kernel_shape)
        groups = [i for i, label in enumerate(w) if label in x and label in y]
        inputs = [i for i, label in enumerate(w) if label in x and label not in y]
        outputs = [i for i, label in enumerate(w) if label not in x and label in y]
        if len(groups) + len(inputs) + len(outputs) != len(w):
            raise Unsupported(f"its equation {module.einsum_str!r} sums its kernel alone")
        bias = tuple(shape[w.index(label)] for label in y if label in w)
        if module.bias is not None and [label for label in y if label in w] != [w[i] for i in (*groups, *outputs)]:
            raise Unsupported(
                f"its equation {module.einsum_str!r} orders the labels of its output differently from (shared with the "
                f"input, new), so its bias is not a row of its kernel"
            )
        if module.bias is not None:
            bias = tuple(module.bias_shape)
        stack, shapes = _kernel_shapes(module, {"kernel": shape, "bias": bias})
        of = lambda axes: _size(tuple(shape[i] for i in axes))
        return cls(
            path,
            type(module).__name__,
            stack,
            shapes,
            of(groups),
            (*groups, *inputs, *outputs),
            of(inputs),
            of(outputs),
            (x, w, y),
        )

    def leading(self, shape):
        x, w, _ = self.equation
        ellipsis = len(shape) - len(x.replace(".", ""))
        labels = [label for part in x for label in ([part] * ellipsis if part == "." else [part])]
        rest = [n for label, n in zip(labels, shape, strict=True) if label not in w]
        return rest[0] if rest else 1

    def _arranged(self, array, labels, examples, last):
        """(g, N, R, ...) of an operand with these labels; `last` are the kernel's labels that it should end in."""
        x, w, y = self.equation
        ellipsis = array.ndim - len(labels.replace(".", ""))
        expanded = [(label, i) for label in labels for i in (range(ellipsis) if label == "." else (0,))]
        shared = [label for label in w if label in x and label in y]
        positions = [pair for pair in expanded if pair[0] not in w]
        where = [expanded.index(pair) for pair in [(s, 0) for s in shared] + positions + [(s, 0) for s in last]]
        array = array.astype(jnp.float32).transpose(where)
        return array.reshape(self.groups, examples, -1, _size(array.shape[len(array.shape) - len(last) :]))

    def rows(self, x, examples):
        labels, w, y = self.equation
        return self._arranged(x, labels, examples, [label for label in w if label in labels and label not in y])

    def cotangents(self, s, examples):
        x, w, labels = self.equation
        # positions in the order of the input, so that rows and cotangents belong together
        order = [label for label in x if label not in w]
        mine = [label for label in labels if label not in w]
        if order != mine:
            new = [label for label in labels if label in w] + order
            s = s.transpose([labels.index(label) for label in new])
            labels = "".join(new)
        return self._arranged(s, labels, examples, [label for label in w if label not in x])


@dataclasses.dataclass(frozen=True)
class ConvLayer(MatrixLayer):
    """`nnx.Conv` of any rank, strides, padding, dilations and groups.

    Attributes:
      window: kernel size; strides, padding, input_dilation, kernel_dilation: as for `nnx.Conv`, per axis.
    """

    window: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    padding: Any = "SAME"
    input_dilation: tuple[int, ...] = ()
    kernel_dilation: tuple[int, ...] = ()

    @classmethod
    def from_module(cls, path, module):
        if module.mask is not None:
            raise Unsupported("it has a mask, so its gradient is not a sum of outer products")
        window = tuple(module.kernel_size)
        each = lambda v: (1 if v is None else v,) * len(window) if v is None or isinstance(v, int) else tuple(v)
        g, outputs = module.feature_group_count, module.out_features
        names = {"kernel": (*window, module.in_features // g, outputs), "bias": (outputs,)}
        stack, shapes = _kernel_shapes(module, names)
        padding = module.padding
        if isinstance(padding, int):
            padding = ((padding, padding),) * len(window)
        elif not isinstance(padding, str):
            padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
        return cls(
            path,
            type(module).__name__,
            stack,
            shapes,
            g,
            tuple(range(len(window) + 2)),
            _size(window) * (module.in_features // g),
            outputs // g,
            window,
            each(module.strides),
            padding,
            each(module.input_dilation),
            each(module.kernel_dilation),
        )

    def leading(self, shape):
        return shape[0] if len(shape) > len(self.window) + 1 else 1

    def _split_groups(self, kernel):  # (..., window, c_in / g, c_out), outputs group by group
        lead = len(self.stack)
        split = kernel.reshape(*self.stack, -1, self.groups, self.outputs)
        return jnp.moveaxis(split, lead + 1, lead)

    def _join_groups(self, kernel):
        lead = len(self.stack)
        return jnp.moveaxis(kernel.reshape(*self.stack, self.groups, self.inputs, self.outputs), lead, lead + 1)

    def rows(self, x, examples):
        rank = len(self.window)
        x = x.astype(jnp.float32)
        x = x.reshape(-1, *x.shape[x.ndim - rank - 1 :])
        padding = self.padding
        reach = [(k - 1) * d + 1 for k, d in zip(self.window, self.kernel_dilation, strict=True)]
        if padding in ("CIRCULAR", "REFLECT"):
            around = [((k - 1) // 2, k // 2) for k in reach]
            x = jnp.pad(x, [(0, 0), *around, (0, 0)], mode="wrap" if padding == "CIRCULAR" else "reflect")
            padding = "VALID"
        elif padding == "CAUSAL":
            x = jnp.pad(x, [(0, 0), (reach[0] - 1, 0), (0, 0)])
            padding = "VALID"
        dilated = [(n - 1) * d + 1 for n, d in zip(x.shape[1:-1], self.input_dilation, strict=True)]
        pads = jax.lax.padtype_to_pads(dilated, reach, self.strides, padding) if isinstance(padding, str) else padding
        edges = [(low, high, d - 1) for (low, high), d in zip(pads, self.input_dilation, strict=True)]
        x = jax.lax.pad(x, jnp.float32(0), [(0, 0, 0), *edges, (0, 0, 0)])
        ends = [(n - r) // s * s + 1 for n, r, s in zip(x.shape[1:-1], reach, self.strides, strict=True)]
        # A slice for each offset in the window, in the kernel's own order: conv_general_dilated_patches is a
        # convolution with as many groups as channels, which CPUs take minutes for.
        slices = []
        for offset in itertools.product(*map(range, self.window)):
            starts = [o * d for o, d in zip(offset, self.kernel_dilation, strict=True)]
            limits = [start + end for start, end in zip(starts, ends, strict=True)]
            slices.append(jax.lax.slice(x, (0, *starts, 0), (len(x), *limits, x.shape[-1]), (1, *self.strides, 1)))
        patches = jnp.stack(slices, axis=-2)  # (N, positions, window, channels)
        patches = patches.reshape(examples, -1, len(slices), self.groups, self.inputs // len(slices))
        return patches.transpose(3, 0, 1, 2, 4).reshape(self.groups, examples, -1, self.inputs)

    def cotangents(self, s, examples):
        s = s.astype(jnp.float32).reshape(examples, -1, self.groups, self.outputs)
        return s.transpose(2, 0, 1, 3)


@dataclasses.dataclass(frozen=True)
class EmbedLayer(Layer):
    """`nnx.Embed`: M is the table (K, V, D); its rows are one-hot, and of `attend` its columns multiply queries."""

    @classmethod
    def from_module(cls, path, module):
        shape = (module.num_embeddings, module.features)
        stack = _stack_of(module, "embedding", module.embedding.get_value(), shape)
        return cls(path, type(module).__name__, stack, (("embedding", shape),))

    def saved(self, module, x, options):
        if self.vocabulary == 1:  # nnx.Embed then ignores the index
            return jnp.zeros_like(x)
        return jnp.where(x < 0, x + self.vocabulary, x)

    def leading(self, shape):
        return shape[0] if shape else 1

    @property
    def copies(self) -> int:
        return _size(self.stack)

    @property
    def vocabulary(self) -> int:
        return self.shapes[0][1][0]

    @property
    def features(self) -> int:
        return self.shapes[0][1][1]

    def matrix(self, parameters):
        return parameters["embedding"].reshape(self.copies, self.vocabulary, self.features)

    def parameters(self, matrix):
        return {"embedding": matrix.reshape(*self.stack, self.vocabulary, self.features)}


@dataclasses.dataclass(frozen=True)
class NormLayer(Layer):
    """`nnx.LayerNorm`, `RMSNorm`, `GroupNorm`, `BatchNorm`: y = scale * x̂ + bias, one pair for each channel."""

    channels: int = 0

    @classmethod
    def from_module(cls, path, module):
        names = [name for name in ("scale", "bias") if getattr(module, name, None) is not None]
        if not names:
            raise Unsupported("it has no parameters")
        if isinstance(module, nnx.LayerNorm | nnx.RMSNorm):
            axes = module.feature_axes
            if axes not in (-1, (-1,), [-1]):
                raise Unsupported(f"its feature_axes are {axes}, not -1")
        elif isinstance(module, nnx.BatchNorm) and module.axis != -1:
            raise Unsupported(f"its axis is {module.axis}, not -1")
        if getattr(module, "axis_name", None) is not None:
            raise Unsupported("it has an axis_name, of a pmap or shard_map that is not visible from here")
        array = getattr(module, names[0]).get_value()
        channels = array.shape[-1]
        stack = _stack_of(module, names[0], array, (channels,))
        return cls(path, type(module).__name__, stack, tuple((name, (channels,)) for name in names), channels)

    @property
    def copies(self) -> int:
        return _size(self.stack)

    @property
    def units(self) -> int:
        """p: parameters of a channel, 2 or 1."""
        return len(self.shapes)

    def saved(self, module, x, options):
        if options.get("mask") is not None:
            raise ValueError(
                f"The statistics of {self.name} ({self.kind}) under mask= are not known: call it without, or treat its "
                f"parameters as plain ones (plain={self.name!r})."
            )
        return _normalised(module, x, options) if "scale" in dict(self.shapes) else x

    def matrix(self, parameters):
        return jnp.stack([parameters[name].reshape(self.copies, self.channels) for name, _ in self.shapes], axis=1)

    def parameters(self, matrix):
        shape = (*self.stack, self.channels)
        return {name: matrix[:, i].reshape(shape) for i, (name, _) in enumerate(self.shapes)}


def _normalised(module: Any, x: jax.Array, options: Mapping[str, Any]) -> jax.Array:
    """x̂: the input as the layer normalises it, before scale and bias; float32. Recomputed, as (y - bias) / scale is
    undefined where the scale is zero."""
    x = x.astype(jnp.float32)
    if isinstance(module, nnx.BatchNorm):
        running = options.get("use_running_average")
        running = module.use_running_average if running is None else running
        if running:
            mean, var = module.mean.get_value(), module.var.get_value()
        else:
            axes = tuple(range(x.ndim - 1))
            mean, var = x.mean(axes), x.var(axes)
        return (x - mean) * jax.lax.rsqrt(var + module.epsilon)
    if isinstance(module, nnx.GroupNorm):
        axes = module.reduction_axes
        axes = (*range(1, x.ndim - 1), -1) if axes is None else (axes,) if isinstance(axes, int) else tuple(axes)
        axes = sorted(axis % x.ndim for axis in axes)
        grouped = x.reshape(*x.shape[:-1], module.num_groups, module.group_size)
        axes = (*(axis for axis in axes if axis != x.ndim - 1), grouped.ndim - 1)
        mean, var = grouped.mean(axes, keepdims=True), grouped.var(axes, keepdims=True)
        return ((grouped - mean) * jax.lax.rsqrt(var + module.epsilon)).reshape(x.shape)
    axes = module.reduction_axes
    if isinstance(module, nnx.RMSNorm):
        return x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + module.epsilon)
    return (x - x.mean(axes, keepdims=True)) * jax.lax.rsqrt(x.var(axes, keepdims=True) + module.epsilon)


@dataclasses.dataclass(frozen=True)
class PlainParameter(Layer):
    """A parameter that belongs to no known layer: M is its vector, (1, 1, size), its path that of its module."""

    @classmethod
    def from_module(cls, path, module):
        raise Unsupported("a plain parameter is not a module")

    @property
    def name(self):
        return "/".join(map(str, (*self.path, self.shapes[0][0])))

    def matrix(self, parameters):
        return parameters[self.shapes[0][0]].reshape(1, 1, -1)

    def parameters(self, matrix):
        name, shape = self.shapes[0]
        return {name: matrix.reshape(shape)}


LAYERS: dict[type, type[Layer]] = {
    nnx.Linear: DenseLayer,
    nnx.LinearGeneral: DenseLayer,
    nnx.Einsum: EinsumLayer,
    nnx.Conv: ConvLayer,
    nnx.Embed: EmbedLayer,
    nnx.LayerNorm: NormLayer,
    nnx.RMSNorm: NormLayer,
    nnx.GroupNorm: NormLayer,
    nnx.BatchNorm: NormLayer,
}

# Wrappers that compute the parameters which the layer inside them uses: its own statistics say nothing of them.
WRAPPERS: tuple[type, ...] = (nnx.WeightNorm, nnx.SpectralNorm)


def register_layer(module: type[nnx.Module], layer: type[Layer] = DenseLayer) -> None:
    """Says that modules of class `module` (exactly: not its subclasses) behave like `layer`.

    A subclass of `nnx.Linear` is not assumed to compute x W + b, since it may not: say so with
    `register_layer(MyLinear)`. For anything else, subclass `Layer`'s children and override what differs.

    Raises:
      TypeError: not a module class, or not a layer class.
    """
    if not (isinstance(module, type) and issubclass(module, nnx.Module)):
        raise TypeError(f"register_layer(module) should be a subclass of nnx.Module, not {module!r}.")
    if not (isinstance(layer, type) and issubclass(layer, Layer)):
        raise TypeError(f"register_layer(layer) should be a subclass of curvature.Layer, not {layer!r}.")
    LAYERS[module] = layer
