"""The version of this package, read by `pyproject.toml` too."""

__version__ = "0.2.0.dev0"
