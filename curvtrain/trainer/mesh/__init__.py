"""The device mesh and the processes that share it: where every array of a run lives."""
