"""A small classifier, a multilayer perceptron or a convolutional network, with any optimizer of the project.

python recipes/classification.py                                # digits, which come with scikit-learn, with SOAP
python recipes/classification.py --optimizer muon --model cnn
python recipes/classification.py --optimizer kfac --dataset fashion_mnist --data-folder ~/data --steps 2000
"""

import dataclasses
import math
from typing import Literal

import tyro
from flax import nnx

import curvtrain
from curvtrain import losses

from common.classifiers import CNN, MLP
from common.images import ImageData, load_images
from common.optimizers import OptimizerName
from common.runs import RunOptions, run

RATES: dict[str, float] = {}


@dataclasses.dataclass(frozen=True)
class Options(RunOptions):
    """Options of this recipe, besides those of `RunOptions`.

    Attributes:
      dataset: "digits" (bundled with scikit-learn), "fashion_mnist" (IDX files), "cifar10" (python pickle files).
      data_folder: where the files of fashion_mnist and cifar10 are.
      model: "mlp" or "cnn".
      sizes: units of the perceptron's hidden layers, or channels of the convolutions.
    """

    optimizer: OptimizerName = "soap"
    dataset: Literal["digits", "fashion_mnist", "cifar10"] = "digits"
    data_folder: str | None = None
    model: Literal["mlp", "cnn"] = "mlp"
    sizes: tuple[int, ...] = (64, 64)
    steps: int = 200
    workdir: str = "runs/classification"


class ClassifierTrainer(curvtrain.Trainer):
    loss = losses.SoftmaxCrossEntropy(labels="label")

    def __init__(self, config, *, data: ImageData, model: str, sizes: tuple[int, ...], **optimizer):
        self.data, self.kind, self.sizes = data, model, sizes
        super().__init__(config, train_data=data.train, eval_data=data.test, **optimizer)

    def build_model(self, rngs: nnx.Rngs) -> nnx.Module:
        if self.kind == "cnn":
            return CNN(self.data.shape[-1], self.sizes, self.data.classes, rngs=rngs)
        return MLP(math.prod(self.data.shape), self.sizes, self.data.classes, rngs=rngs)

    def predict(self, model, batch):
        return model(batch["image"])


def main(options: Options) -> None:
    data = load_images(options.dataset, options.data_folder)
    make = lambda config, **optimizer: ClassifierTrainer(
        config, data=data, model=options.model, sizes=options.sizes, **optimizer
    )
    run(options, RATES, make)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
