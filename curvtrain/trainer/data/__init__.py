"""Batches as a pure function of (seed, step), from arrays in memory or from a grain dataset."""

from curvtrain.trainer.data.evaluation import eval_batches as eval_batches
from curvtrain.trainer.data.evaluation import first_and_sample as first_and_sample
from curvtrain.trainer.data.fingerprint import checksum as checksum
from curvtrain.trainer.data.fingerprint import rows_checksum as rows_checksum
from curvtrain.trainer.data.nested import Batch as Batch
from curvtrain.trainer.data.nested import check_arrays as check_arrays
from curvtrain.trainer.data.nested import map_arrays as map_arrays
from curvtrain.trainer.data.streams import Streams as Streams
from curvtrain.trainer.data.streams import own_positions as own_positions
from curvtrain.trainer.data.streams import saved_positions as saved_positions
from curvtrain.trainer.data.training import CURVATURE as CURVATURE
from curvtrain.trainer.data.training import TRAIN as TRAIN
from curvtrain.trainer.data.training import ArrayData as ArrayData
from curvtrain.trainer.data.training import GrainData as GrainData
from curvtrain.trainer.data.training import TrainData as TrainData
from curvtrain.trainer.data.training import make_train_data as make_train_data
