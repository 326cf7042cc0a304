"""Reading and writing the pack's files: safetensors with JSON metadata, written whole or not at all."""

from .errors import LONGEST_MESSAGE, DiffLensError, NotWritten
from .guards import check_room, read_json
from .loading import difflens_info, difflens_kind, load_tensors, read_content, read_tensors, reading, told
from .marks import digest, fingerprint, made_by, same_weights, sums_mark
from .numbers import as_half, finite, in_bytes, out_of_bytes, refuse_whole_numbers
from .writing import replacing, save_tensors, write_whole, written

__all__ = [
    "DiffLensError",
    "LONGEST_MESSAGE",
    "NotWritten",
    "as_half",
    "check_room",
    "difflens_info",
    "difflens_kind",
    "digest",
    "fingerprint",
    "finite",
    "in_bytes",
    "load_tensors",
    "made_by",
    "out_of_bytes",
    "read_content",
    "read_json",
    "read_tensors",
    "reading",
    "refuse_whole_numbers",
    "replacing",
    "same_weights",
    "save_tensors",
    "sums_mark",
    "told",
    "write_whole",
    "written",
]
