"""Tables of embeddings."""

import dataclasses
import math

import jax.numpy as jnp

from curvtrain.curvature.capture.layers.base import Layer, stack_of


@dataclasses.dataclass(frozen=True)
class EmbedLayer(Layer):
    """`nnx.Embed`: M is the table (K, V, D); its rows are one-hot, and of `attend` its columns multiply queries."""

    @classmethod
    def from_module(cls, path, module):
        shape = (module.num_embeddings, module.features)
        stack = stack_of(module, "embedding", module.embedding.get_value(), shape)
        return cls(path, type(module).__name__, stack, (("embedding", shape),))

    def saved(self, module, x, options):
        if self.vocabulary == 1:  # nnx.Embed then ignores the index
            return jnp.zeros_like(x)
        return jnp.where(x < 0, x + self.vocabulary, x)

    def leading(self, shape):
        return shape[0] if shape else 1

    @property
    def copies(self) -> int:
        return math.prod(self.stack)

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
