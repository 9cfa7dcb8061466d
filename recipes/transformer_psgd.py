"""A character transformer with PSGD: Kronecker-factored preconditioners that whiten the gradient.

python recipes/transformer_psgd.py                              # the Python standard library's own source
python recipes/transformer_psgd.py --preconditioner low_rank
python recipes/transformer_psgd.py --fit hessian --learning-rate 0.03

The model, the data and the other optimizers are those of char_lm.py.

Measured on 2026-11-21 (2 CPU cores, jax 0.10.2) with --steps 150, by benchmarks/convergence.py: mean test loss of seeds
1 to 3 2.226, AdamW 2.389, each at the best of nine learning rates.
"""

import dataclasses
from typing import Literal

import tyro

from char_lm import Options as CharOptions
from char_lm import main
from common.optimizers import OptimizerName


@dataclasses.dataclass(frozen=True)
class Options(CharOptions):
    """Options of char_lm.py, with other defaults."""

    optimizer: OptimizerName = "psgd"
    decay: Literal["none", "cosine"] = "cosine"
    workdir: str = "runs/transformer_psgd"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
