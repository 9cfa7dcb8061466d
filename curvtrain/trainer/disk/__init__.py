"""What a run keeps on disk: its folder and lock, checkpoints, and compiled programs."""
