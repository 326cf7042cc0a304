"""What the denoiser computes inside: the sites where it is read and changed, and the activations captured there."""

from .capture import Draw, Edit, Kept, Sampler, at_step, capture, noise_batches
from .captured import Activations
from .differentiable import Leaf, OnPrediction, differentiable
from .rehearsal import Held, HoldingEdit, Rehearsal, Shown, draw_held, drawer, holds
from .sites import UPDATE, Whole, edit_site, find_site, from_map, reads_update, to_map
from .store import DTYPES, INDEX, SAMPLES, Index, Shard, Store, load_labels, open_store, record, save_labels

__all__ = [
    "Activations",
    "DTYPES",
    "Draw",
    "Edit",
    "Held",
    "HoldingEdit",
    "INDEX",
    "Index",
    "Kept",
    "Leaf",
    "OnPrediction",
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
    "differentiable",
    "draw_held",
    "drawer",
    "edit_site",
    "find_site",
    "from_map",
    "holds",
    "load_labels",
    "noise_batches",
    "open_store",
    "reads_update",
    "record",
    "save_labels",
    "to_map",
]
