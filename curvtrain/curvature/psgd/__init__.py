"""Preconditioners that are fitted on Lie groups: PSGD."""

from curvtrain.curvature.psgd.base import Preconditioner as Preconditioner
from curvtrain.curvature.psgd.estimator import PSGD as PSGD
from curvtrain.curvature.psgd.estimator import FittedPreconditioner as FittedPreconditioner
from curvtrain.curvature.psgd.frequency import Annealed as Annealed
from curvtrain.curvature.psgd.kron import Affine as Affine
from curvtrain.curvature.psgd.kron import Kron as Kron
