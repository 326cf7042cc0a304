"""The command line: the whole way from a model to a report, one study in a file, all it makes in a folder."""

from .cli import main
from .study import Study, read_study

__all__ = ["Study", "main", "read_study"]
