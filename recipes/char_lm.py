"""A character language model, a small transformer or a GRU, over any text file, with FOSI.

python recipes/char_lm.py                                       # the Python standard library's own source
python recipes/char_lm.py --model gru --optimizer adam
python recipes/char_lm.py --text shakespeare.txt --layers 4 --width 256 --steps 5000

Measured on 2026-11-21 (2 CPU cores, jax 0.10.2, seed 0, 55 s) with --steps 150 --refresh-every 50 --eval-every 150:
test loss 2.302 with FOSI and 2.318 with Adam at the same rate, which was not tuned. With --steps 150 --decay cosine,
the best of nine trials of each optimizer, mean test loss of seeds 1 to 3 (benchmarks/convergence.py --recipe
transformer): AdamW 2.389, --optimizer kfac --learning-rate 0.032 --momentum 0.9 --damping 0.1 2.349, --optimizer psgd
2.226.
"""

import dataclasses
from typing import Literal

import tyro
from flax import nnx

import curvtrain
from curvtrain import losses

from common.language import GRU, Transformer
from common.runs import RunOptions, run
from common.text import TextData, load_text

# Tuned: those of AdamW and PSGD, for the transformer with --steps 150 --decay cosine, by the command above. The others
# were not.
RATES = {"adam": 3e-3, "adamw": 3e-3, "momentum": 0.3, "nesterov": 0.3, "sgd": 1.0}
RATES |= {"psgd": 3e-2} | {f"fosi_{name}": rate for name, rate in RATES.items()}
RATES |= {"soap": 1e-2, "shampoo": 1e-2, "kl_shampoo": 1e-2, "muon": 1e-2, "fadam": 1e-2, "natural_gradient": 1e-2}
RATES |= {"sirfshampoo": 1e-2, "if_shampoo": 1e-2, "singd": 1e-2, "adafisher": 1e-2, "adafisherw": 1e-2}


@dataclasses.dataclass(frozen=True)
class Options(RunOptions):
    """Options of this recipe, besides those of `RunOptions`.

    Attributes:
      text: a text file; None is the source of the Python standard library, which every machine has.
      length: characters per example.
      model: "transformer" or "gru".
      layers: of the model.
      width: of the model.
      heads: of the transformer's attention.
      dropout: rate.
      scan: keep the transformer's blocks in one stack: compile time does not grow with the depth.
      remat: recompute the transformer's blocks in the backward pass: less memory, more time.
    """

    text: str | None = None
    length: int = 64
    model: Literal["transformer", "gru"] = "transformer"
    layers: int = 2
    width: int = 64
    heads: int = 4
    dropout: float = 0.0
    scan: bool = False
    remat: bool = False
    batch_size: int = 32
    steps: int = 500
    workdir: str = "runs/char_lm"


class CharTrainer(curvtrain.Trainer):
    loss = losses.SoftmaxCrossEntropy(labels="targets")

    def __init__(self, config, *, data: TextData, options: Options, **optimizer):
        self.data, self.options = data, options
        super().__init__(config, train_data=data.train, eval_data=data.test, **optimizer)

    def build_model(self, rngs: nnx.Rngs) -> nnx.Module:
        o, vocabulary = self.options, len(self.data.vocabulary)
        if o.model == "gru":
            return GRU(vocabulary, layers=o.layers, width=o.width, dropout=o.dropout, rngs=rngs)
        return Transformer(
            vocabulary,
            o.length,
            layers=o.layers,
            width=o.width,
            heads=o.heads,
            dropout=o.dropout,
            scan=o.scan,
            remat=o.remat,
            rngs=rngs,
        )

    def predict(self, model, batch):
        return model(batch["tokens"])


def main(options: Options) -> None:
    data = load_text(options.text, length=options.length)
    run(options, RATES, lambda config, **optimizer: CharTrainer(config, data=data, options=options, **optimizer))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
