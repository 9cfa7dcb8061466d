"""What is watched of a run: metrics and who writes them, hooks, progress on the console, and reports."""
