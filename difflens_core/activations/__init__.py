"""What the denoiser computes inside: the sites where it is read and changed, and the activations captured there."""

from .capture import Draw, Edit, Kept, Sampler, at_step, capture, noise_batches
from .captured import ROWS, Activations
from .cells import FINEST, cells_of, coarse, one_of_each
from .differentiable import Leaf, OnPrediction, differentiable
from .frames import GRID, FramedActivations, into_frames, out_of_frames, slopes_in_frames
from .rehearsal import Drawer, Held, HoldingEdit, Rehearsal, Shown, draw_held, holds, innermost
from .sites import UPDATE, Whole, edit_site, find_site, from_map, reads_update, to_map
from .store import DTYPES, INDEX, SAMPLES, Index, Shard, Store, load_labels, open_store, record, save_labels

__all__ = [
    "Activations",
    "DTYPES",
    "Draw",
    "Drawer",
    "Edit",
    "FINEST",
    "FramedActivations",
    "GRID",
    "Held",
    "HoldingEdit",
    "INDEX",
    "Index",
    "Kept",
    "Leaf",
    "OnPrediction",
    "ROWS",
    "Rehearsal",
    "SAMPLES",
    "Sampler",
    "Shard",
    "Shown",
    "Store",
    "UPDATE",
    "Whole",
    "at_step",
    "capture",
    "cells_of",
    "coarse",
    "differentiable",
    "draw_held",
    "edit_site",
    "find_site",
    "from_map",
    "holds",
    "innermost",
    "into_frames",
    "load_labels",
    "noise_batches",
    "one_of_each",
    "open_store",
    "out_of_frames",
    "reads_update",
    "record",
    "save_labels",
    "slopes_in_frames",
    "to_map",
]
