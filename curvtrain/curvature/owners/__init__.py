"""Matrices and their square factors, shared by the devices of a mesh: whoever owns one does all of its work.

`layout.py` says which slot is whose, `slots.py` how entries get there, `execute.py` runs functions of slots on a mesh,
`table.py` shows a layout.
"""

from curvtrain.curvature.owners.choose import owners_for as owners_for
from curvtrain.curvature.owners.execute import Blocks as Blocks
from curvtrain.curvature.owners.execute import blocks as blocks
from curvtrain.curvature.owners.execute import by_shape as by_shape
from curvtrain.curvature.owners.execute import by_size as by_size
from curvtrain.curvature.owners.execute import factorise as factorise
from curvtrain.curvature.owners.execute import placed as placed
from curvtrain.curvature.owners.execute import shared as shared
from curvtrain.curvature.owners.execute import to_parameters as to_parameters
from curvtrain.curvature.owners.layout import Layout as Layout
from curvtrain.curvature.owners.layout import Matrix as Matrix
from curvtrain.curvature.owners.layout import layout_of as layout_of
from curvtrain.curvature.owners.slots import Slots as Slots
from curvtrain.curvature.owners.table import overview as overview
