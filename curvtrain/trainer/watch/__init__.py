"""The watchers of a run: metrics and their writers, hooks, progress on the console, and reports."""
