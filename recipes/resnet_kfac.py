"""A CIFAR-style ResNet with K-FAC: Kronecker factors of the Fisher, with unit-wise blocks for batch normalisation.

python recipes/resnet_kfac.py                                    # digits, which come with scikit-learn
python recipes/resnet_kfac.py --weight-sharing reduce --inverse ekfac
python recipes/resnet_kfac.py --dataset cifar10 --data-folder ~/data --depth 20 --steps 20000

The model, the data and the other optimizers are those of resnet_fosi.py.

Measured on 2026-11-21 (2 CPU cores, jax 0.10.2) by benchmarks/convergence.py, means of seeds 1 to 3 after 200 steps:
training loss 3.0e-4 and test accuracy 99.1 %, AdamW 4.2e-4 and 99.3 %, each with the best of nine trials.
"""

import dataclasses
from typing import Literal

import tyro

from common.optimizers import OptimizerName
from resnet_fosi import Options as ResNetOptions
from resnet_fosi import main


@dataclasses.dataclass(frozen=True)
class Options(ResNetOptions):
    """Options of resnet_fosi.py, with other defaults."""

    optimizer: OptimizerName = "kfac"
    learning_rate: float | None = 0.32
    decay: Literal["none", "cosine"] = "cosine"
    momentum: float | None = 0.9
    damping: float | None = 0.1
    workdir: str = "runs/resnet_kfac"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
