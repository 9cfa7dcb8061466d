"""curvtrain: training Flax NNX models in JAX with the curvature of the loss as a first-class citizen."""

from curvtrain import curvature as curvature
from curvtrain import losses as losses
from curvtrain import optim as optim
from curvtrain.curvature.schedule import CurvatureSchedule as CurvatureSchedule
from curvtrain.objective import Objective as Objective
