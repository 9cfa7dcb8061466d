"""Tables of embeddings."""

import dataclasses

import jax
import jax.numpy as jnp

from curvtrain._dtypes import wide
from curvtrain.curvature.capture.layers.base import Layer, scan_axes_of
from curvtrain.curvature.capture.layers.gradients import Products
from curvtrain.curvature.capture.layers.table import TableBlock


@dataclasses.dataclass(frozen=True)
class EmbedLayer(Layer):
    """`nnx.Embed`: M is the table (K, V, D); its rows are one-hot, and of `attend` its columns multiply queries."""

    @classmethod
    def from_module(cls, path, module):
        shape = (module.num_embeddings, module.features)
        scan_axes = scan_axes_of(module.embedding.get_value(), "embedding", shape)
        return cls(path, type(module).__name__, scan_axes, (("embedding", shape),))

    @property
    def d_i(self):
        return self.shapes[0][1][0]

    @property
    def d_o(self):
        return self.shapes[0][1][1]

    def matrix(self, parameters):
        return parameters["embedding"].reshape(self.copies, self.d_i, self.d_o)

    def parameters(self, matrix):
        return {"embedding": matrix.reshape(*self.scan_axes, self.d_i, self.d_o)}

    def saved(self, module, x, options):
        if self.d_i == 1:  # nnx.Embed then ignores the index
            return jnp.zeros_like(x)
        return jnp.where(x < 0, x + self.d_i, x)

    def leading(self, shape):
        return shape[0] if shape else 1

    def gradients(self, backward):
        """With the one-hot rows written out: for small tables."""
        n, s = backward.examples, wide(backward.s)
        if backward.use == "attend":
            queries = wide(backward.saved).reshape(1, n, -1, self.d_o)
            return Products(s.reshape(1, n, -1, self.d_i), queries)
        rows = jax.nn.one_hot(backward.saved.reshape(1, n, -1), self.d_i, dtype=s.dtype)
        return Products(rows, s.reshape(1, n, -1, self.d_o))

    def squares(self, backward):
        n = backward.examples
        if backward.use == "attend":
            return super().squares(backward)
        index = backward.saved.reshape(n, -1)
        s = backward.corrected(wide(backward.s).reshape(1, n, -1, self.d_o))[0]
        # (sum of s over the positions of one token)^2 = sum over them of s times that sum
        same = (index[:, :, None] == index[:, None, :]).astype(s.dtype)
        together = jnp.einsum("nrq,nqd->nrd", same, s)
        return jnp.zeros((1, self.d_i, self.d_o), s.dtype).at[0, index].add(s * together)

    def block(self):
        return TableBlock(self.d_i, self.d_o)
