"""The files of a run: its folder and lock, checkpoints, and compiled programs."""
