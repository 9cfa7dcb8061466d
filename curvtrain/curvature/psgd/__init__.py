"""Preconditioners that are fitted on Lie groups: PSGD."""

from curvtrain.curvature.psgd.base import Preconditioner as Preconditioner
from curvtrain.curvature.psgd.dense import Dense as Dense
from curvtrain.curvature.psgd.elementwise import Elementwise as Elementwise
from curvtrain.curvature.psgd.estimator import PSGD as PSGD
from curvtrain.curvature.psgd.estimator import FittedPreconditioner as FittedPreconditioner
from curvtrain.curvature.psgd.frequency import Annealed as Annealed
from curvtrain.curvature.psgd.kron import Affine as Affine
from curvtrain.curvature.psgd.kron import Kron as Kron
from curvtrain.curvature.psgd.low_rank import LowRank as LowRank
from curvtrain.curvature.psgd.xmat import XMat as XMat
