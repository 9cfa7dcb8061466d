"""Kronecker-factored curvature: the factors, and the estimator that maintains them."""

from curvtrain.curvature.kfac.estimator import KFAC as KFAC
from curvtrain.curvature.kfac.factors import KroneckerFactors as KroneckerFactors
