"""The covariance of gradients, one Kronecker product per matrix: Shampoo, SOAP and KL-Shampoo take its root."""

from curvtrain.curvature.gradient_kronecker.estimator import GradientKronecker as GradientKronecker
from curvtrain.curvature.gradient_kronecker.factors import GradientFactors as GradientFactors
