"""curvtrain: training Flax NNX models in JAX with the curvature of the loss as a first-class citizen."""

from curvtrain import curvature as curvature
from curvtrain import losses as losses
from curvtrain import optim as optim
from curvtrain._version import __version__ as __version__
from curvtrain.curvature.schedule import CurvatureSchedule as CurvatureSchedule
from curvtrain.objective import Objective as Objective
from curvtrain.trainer import Trainer as Trainer
from curvtrain.trainer import TrainerConfig as TrainerConfig
from curvtrain.trainer import hooks as hooks
