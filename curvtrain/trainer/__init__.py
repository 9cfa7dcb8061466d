"""The Trainer: loop, state, mesh, data, checkpoints, metrics and hooks."""

from curvtrain.trainer.config import TrainerConfig as TrainerConfig
from curvtrain.trainer.disk.reading import CheckpointError as CheckpointError
from curvtrain.trainer.disk.reading import Mismatch as Mismatch
from curvtrain.trainer.disk.workdir import WorkdirInUse as WorkdirInUse
from curvtrain.trainer.live import Run as Run
from curvtrain.trainer.mesh import distributed as distributed
from curvtrain.trainer.run.results import Diverged as Diverged
from curvtrain.trainer.run.results import FitResult as FitResult
from curvtrain.trainer.run.results import Preempted as Preempted
from curvtrain.trainer.state import TrainState as TrainState
from curvtrain.trainer.trainer import Trainer as Trainer
from curvtrain.trainer.watch import calibration as calibration
from curvtrain.trainer.watch import hooks as hooks
from curvtrain.trainer.watch.hooks import Call as Call
from curvtrain.trainer.watch.hooks import EarlyStopping as EarlyStopping
from curvtrain.trainer.watch.hooks import Hook as Hook
from curvtrain.trainer.watch.hooks import Profiler as Profiler
from curvtrain.trainer.watch.writers import read_jsonl as read_jsonl
