"""The command line: the whole way from a model to a report, one study in a file, all it makes in a folder."""

__all__: list[str] = []  # it begins in __main__
