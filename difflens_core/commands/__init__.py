"""The command line: the whole way from a model to a report, one study in a file, all it makes in a folder."""

from .starting import main

__all__ = ["main"]
