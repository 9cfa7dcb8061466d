"""A character transformer with PSGD: Kronecker-factored preconditioners that whiten the gradient.

python recipes/transformer_psgd.py                              # the Python standard library's own source
python recipes/transformer_psgd.py --preconditioner low_rank
python recipes/transformer_psgd.py --fit hessian --learning-rate 0.03

The model, the data and the other optimizers are those of char_lm.py.
"""

import dataclasses

import tyro

from char_lm import Options as CharOptions
from char_lm import main
from common.runs import OptimizerName


@dataclasses.dataclass(frozen=True)
class Options(CharOptions):
    """Options of char_lm.py, with other defaults."""

    optimizer: OptimizerName = "psgd"
    workdir: str = "runs/transformer_psgd"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
