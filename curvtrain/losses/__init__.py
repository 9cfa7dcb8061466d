"""Losses that know more than their value: output-space curvature, the model's own distribution, host-side checks.

A loss sees `outputs` (what `predict` returned) and the `batch` (a dict), and gives one value per *example*.
For `SoftmaxCrossEntropy` every label is an example, so a sequence model with outputs (batch, time, classes) and
labels (batch, time) averages over tokens. `SquaredError` and `SigmoidCrossEntropy` sum over the outputs of an
example: everything but the batch axis, or everything but batch and time with `sequence=True`.

The mean is sum(weights * values) / sum(weights), zero where all weights are. Weights come from entries of the batch:

| `weighted_by` of a loss | entries that weight |
|---|---|
| None, the default | `mask` and `weights`, unless the loss reads them as its targets |
| a name or several | these, which have to be in the batch |
| `()` | none: `mask` and `weights` are like any other entry |

`mask` is bool or 0/1, any other entry holds finite numbers of zero or more; their shape is (batch,) or begins the shape
of the values. A mask in the shape of the outputs leaves single outputs out of the sums of the two elementwise losses.
By default, an entry that could be something else is refused: one of three or more axes that is not bool (a `mask`) or
floating-point (`weights`), and one that a loss of yours reads itself.

An example of weight zero may hold anything in its targets and outputs, NaN included; its inputs should be finite, for a
model's derivatives multiply them by zero. Wrong weights and labels are errors where their values are known, in a
Trainer always, and make the loss NaN where they are not.

Symbols: z the outputs of one example, t its target, l(z, t) its value, p the probabilities that z stands for.
"""

from curvtrain.losses.base import Batch as Batch
from curvtrain.losses.base import Loss as Loss
from curvtrain.losses.elementwise import SigmoidCrossEntropy as SigmoidCrossEntropy
from curvtrain.losses.elementwise import SquaredError as SquaredError
from curvtrain.losses.masking import unmasked as unmasked
from curvtrain.losses.masking import weight_like as weight_like
from curvtrain.losses.per_example import PerExample as PerExample
from curvtrain.losses.softmax import SoftmaxCrossEntropy as SoftmaxCrossEntropy
from curvtrain.losses.weighing import KnownWeights as KnownWeights
from curvtrain.losses.weighing import loss_only_weights as loss_only_weights
