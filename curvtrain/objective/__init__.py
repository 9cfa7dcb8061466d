"""A model, a prediction and a loss as pure functions of the parameters: the only place where a module is split."""

from curvtrain.objective.objective import Objective as Objective
from curvtrain.objective.paths import Path as Path
from curvtrain.objective.paths import by_path as by_path
from curvtrain.objective.paths import nested as nested
from curvtrain.objective.paths import path_name as path_name
from curvtrain.objective.pieces import Measure as Measure
from curvtrain.objective.pieces import batch_size as batch_size
from curvtrain.objective.pieces import loss_only_weight as loss_only_weight
from curvtrain.objective.pieces import safe as safe
from curvtrain.objective.split_model import annotated_specs as annotated_specs
