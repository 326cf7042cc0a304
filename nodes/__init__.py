"""The nodes, a file per stage. The room host alone touches ComfyUI's internals."""

from comfy_api.latest import ComfyExtension, io

from . import host
from .attribute import AttributeFeatures, TrainProbes
from .calibrate import Calibrate, CrossEffects, PlanTargets
from .capture import CaptureActivations, LoadActivations
from .classify import ClassifyImages, ZeroShot
from .debias import Debias
from .diagnose import Diagnose
from .explore import RankByEffect, SiteScan
from .features import ExploreFeatures
from .judge import JudgeByEye
from .load import LoadClassifier, LoadFeatures, LoadRecipe, LoadSAE, SaveRecipe
from .models import LoadModel, LoadPromptedModel
from .prompts import PromptList
from .report import CompareImages, FairnessReport
from .sampling import DDIMSigmas, ReferenceSampler
from .steer import Steer
from .train import TrainSAE

NODES: list[type[io.ComfyNode]] = [
    Debias, LoadModel, LoadPromptedModel, LoadSAE, LoadFeatures, LoadClassifier, LoadRecipe, SaveRecipe,
    CaptureActivations, LoadActivations, TrainSAE, ClassifyImages, TrainProbes, AttributeFeatures,
    SiteScan, RankByEffect, ExploreFeatures, Diagnose, ZeroShot,
    Calibrate, PlanTargets, CrossEffects, Steer, FairnessReport, CompareImages, JudgeByEye,
    DDIMSigmas, ReferenceSampler, PromptList,
]  # fmt: skip


class DiffLensExtension(ComfyExtension):
    async def on_load(self) -> None:
        host.serve_help()
        host.serve_judging()
        host.serve_provenance()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> DiffLensExtension:
    """Called by ComfyUI when it loads the pack."""
    return DiffLensExtension()
