"""What is told a person whose file or setting does not fit."""

from __future__ import annotations

LONGEST_MESSAGE, ITS_END = 1000, 300  # letters; of the end, which says what to do


class DiffLensError(ValueError):
    """Something the user gave does not fit. The message says what was found, what was expected and what to do.

    It is one line of printable letters and not too long, whatever a stranger's file calls its parts.
    """

    def __init__(self, message: str):
        message = "".join(letter if letter.isprintable() else " " for letter in message)
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE - ITS_END]} ... {message[-ITS_END:]}"
        super().__init__(message)


class NotWritten(DiffLensError):
    """A file could not be written. The message says why and what to do."""
