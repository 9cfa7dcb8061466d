"""Optax transformations that consume a curvature."""

from curvtrain.optim.base import self_contained as self_contained
from curvtrain.optim.fosi import fosi as fosi
from curvtrain.optim.fosi_dropin import fosi_adam as fosi_adam
from curvtrain.optim.fosi_dropin import fosi_momentum as fosi_momentum
from curvtrain.optim.fosi_dropin import fosi_nesterov as fosi_nesterov
from curvtrain.optim.fosi_dropin import fosi_sgd as fosi_sgd
from curvtrain.optim.kfac import kfac as kfac
from curvtrain.optim.natural_gradient import natural_gradient as natural_gradient
from curvtrain.optim.psgd import psgd as psgd
from curvtrain.optim.psgd import scale_by_psgd as scale_by_psgd
from curvtrain.optim.scale_by_curvature import scale_by_curvature as scale_by_curvature
