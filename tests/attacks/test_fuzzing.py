"""Broken copies of files of every format: each is loaded, or refused in a sentence that names it, and nothing else.

The short form of `python scripts/fuzz.py`, whose last run stands in docs/survived.md.
"""

from __future__ import annotations

import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the worker looks at /proc")

EACH = 2  # broken files of a format: the first of those that the long form makes


def test_broken_files_of_every_format_are_refused_in_a_sentence_or_loaded():
    from formats import FORMATS
    from fuzzing import tally

    found = tally(list(FORMATS), EACH)
    assert not [crash for one in found.values() for crash in one.crashes]
    assert {one.tried for one in found.values()} == {EACH} and len(found) > 60
    refused = sum(one.refused for one in found.values())
    assert 0.3 < refused / (EACH * len(found)) < 0.95, "broken enough, and not only nonsense"
