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
from curvtrain.trainer import calibration

from common.classifiers import CNN, MLP
from common.images import ImageData, load_images
from common.optimizers import OptimizerName
from common.runs import RunOptions, run

# Of nine rates from 1e-4 to 1 in steps of 10^(1/2), good ones for the perceptron on digits (seed 0, 200 steps of 128);
# FOSI has those of its bases, AdaFisher, IF-Shampoo and SINGD have defaults, IVON and VOGN good ones of 1,000 steps.
RATES = {"adam": 1e-2, "adamw": 1e-2, "momentum": 0.1, "nesterov": 0.1, "sgd": 0.3}
RATES |= {f"fosi_{name}": rate for name, rate in RATES.items() if name != "adamw"}
RATES |= {"soap": 1e-2, "shampoo": 1e-2, "kl_shampoo": 1e-2, "psgd": 1e-2, "muon": 1e-2, "fadam": 1e-2}
RATES |= {"rf_rmsprop": 0.1, "rf_adamw": 0.3, "natural_gradient": 3e-3}
RATES |= {"sirfshampoo": 3e-2, "if_shampoo": 1e-2, "singd": 1e-2, "ivon": 1.0, "vogn": 1e-2}
RATES |= {"adafisher": 0.02, "adafisherw": 0.02}


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

    def metrics(self, outputs, batch):
        error = calibration.CalibrationError.of(outputs, batch["label"])
        return {**super().metrics(outputs, batch), "calibration_error": error}


def main(options: Options) -> None:
    data = load_images(options.dataset, options.data_folder)
    make = lambda config, **optimizer: ClassifierTrainer(
        config, data=data, model=options.model, sizes=options.sizes, **optimizer
    )
    run(options, RATES, make)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
