"""Factors of a preconditioner that approach inverse roots by matrix products alone, for states in bfloat16."""

from curvtrain.curvature.inverse_free.estimator import InverseFree as InverseFree
from curvtrain.curvature.inverse_free.factors import InverseFreeFactors as InverseFreeFactors
from curvtrain.curvature.inverse_free.layers import InverseFreeKFAC as InverseFreeKFAC
from curvtrain.curvature.inverse_free.period import Warmed as Warmed
