"""Simpler Fisher blocks than K-FAC's: diagonal, diagonal Kronecker factors, one block per unit, one block per layer.

All use exact per-example sums, never the square of a mean gradient (but for `KroneckerDiagonal(faithful=True)`, which
keeps what AdaFisher's released code keeps); of a layer that is called several times in one
example (a recurrent cell, a tied table), too, at the cost of a forward and a backward pass for it. Only Kronecker
factors count every call as a position of its own. Symbols in `capture/layers`.
"""

from curvtrain.curvature.fisher.base import LayerEstimator as LayerEstimator
from curvtrain.curvature.fisher.blocks import Blocks as Blocks
from curvtrain.curvature.fisher.blocks import FullBlock as FullBlock
from curvtrain.curvature.fisher.blocks import UnitWise as UnitWise
from curvtrain.curvature.fisher.diagonal import Diagonal as Diagonal
from curvtrain.curvature.fisher.diagonal import DiagonalFisher as DiagonalFisher
from curvtrain.curvature.fisher.kronecker_diagonal import DiagonalFactors as DiagonalFactors
from curvtrain.curvature.fisher.kronecker_diagonal import KroneckerDiagonal as KroneckerDiagonal
from curvtrain.curvature.fisher.released import ReleasedFactors as ReleasedFactors
