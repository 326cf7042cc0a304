"""The nodes, a file per stage. host.py alone touches ComfyUI's internals."""

from comfy_api.latest import ComfyExtension, io

from .attribute import AttributeFeatures, TrainProbes
from .capture import CaptureActivations, LoadActivations
from .explore import RankByEffect, SiteScan
from .load import LoadClassifier, LoadFeatures, LoadModel, LoadRecipe, LoadSAE, SaveRecipe
from .measure import ClassifyImages, CompareImages, FairnessReport
from .steer import Steer
from .train import TrainSAE

NODES: list[type[io.ComfyNode]] = [
    LoadModel, LoadSAE, LoadFeatures, LoadClassifier, LoadRecipe, SaveRecipe,
    CaptureActivations, LoadActivations, TrainSAE, ClassifyImages, TrainProbes, AttributeFeatures,
    SiteScan, RankByEffect,
    Steer, FairnessReport, CompareImages,
]  # fmt: skip


class DiffLensExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> DiffLensExtension:
    """Called by ComfyUI when it loads the pack."""
    return DiffLensExtension()
