"""Curvature of the loss: matrix-free products, estimators, and the curvature objects that they maintain."""

from curvtrain.curvature.base import Curvature as Curvature
from curvtrain.curvature.base import CurvatureEstimator as CurvatureEstimator
from curvtrain.curvature.capture import Layer as Layer
from curvtrain.curvature.capture import register_layer as register_layer
from curvtrain.curvature.eigenpairs import Eigenpairs as Eigenpairs
from curvtrain.curvature.fisher import Blocks as Blocks
from curvtrain.curvature.fisher import Diagonal as Diagonal
from curvtrain.curvature.fisher import DiagonalFactors as DiagonalFactors
from curvtrain.curvature.fisher import DiagonalFisher as DiagonalFisher
from curvtrain.curvature.fisher import FullBlock as FullBlock
from curvtrain.curvature.fisher import KroneckerDiagonal as KroneckerDiagonal
from curvtrain.curvature.fisher import UnitWise as UnitWise
from curvtrain.curvature.kfac import KFAC as KFAC
from curvtrain.curvature.kfac import KroneckerFactors as KroneckerFactors
from curvtrain.curvature.lanczos import Lanczos as Lanczos
from curvtrain.curvature.products import as_matrix as as_matrix
from curvtrain.curvature.products import fvp as fvp
from curvtrain.curvature.products import ggnvp as ggnvp
from curvtrain.curvature.products import hvp as hvp
from curvtrain.curvature.psgd import PSGD as PSGD
from curvtrain.curvature.psgd import Affine as Affine
from curvtrain.curvature.psgd import Annealed as Annealed
from curvtrain.curvature.psgd import FittedPreconditioner as FittedPreconditioner
from curvtrain.curvature.psgd import Kron as Kron
from curvtrain.curvature.psgd import Preconditioner as Preconditioner
from curvtrain.curvature.schedule import CurvatureSchedule as CurvatureSchedule
