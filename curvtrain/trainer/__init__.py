"""The Trainer: loop, state, mesh, data, checkpoints, metrics and hooks."""

from curvtrain.trainer import distributed as distributed
from curvtrain.trainer.checkpoint import CheckpointError as CheckpointError
from curvtrain.trainer.checkpoint import Mismatch as Mismatch
from curvtrain.trainer.config import TrainerConfig as TrainerConfig
from curvtrain.trainer.hooks import Call as Call
from curvtrain.trainer.hooks import EarlyStopping as EarlyStopping
from curvtrain.trainer.hooks import Hook as Hook
from curvtrain.trainer.hooks import Profiler as Profiler
from curvtrain.trainer.hooks import Run as Run
from curvtrain.trainer.loop import Diverged as Diverged
from curvtrain.trainer.loop import FitResult as FitResult
from curvtrain.trainer.loop import Preempted as Preempted
from curvtrain.trainer.state import TrainState as TrainState
from curvtrain.trainer.trainer import Trainer as Trainer
from curvtrain.trainer.workdir import WorkdirInUse as WorkdirInUse
from curvtrain.trainer.writers import read_jsonl as read_jsonl
