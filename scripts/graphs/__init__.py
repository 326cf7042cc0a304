"""The workflows, each described once, and the two forms in which ComfyUI takes them.

graph     a graph in the making, and as `/prompt` takes it
canvas    as ComfyUI's page opens it
pieces    what several workflows have in common
sources   where the files are from that do not come with the pack
steering, finding, paper, own   the workflows
blueprints   subgraphs that the page offers among its nodes
"""

from environment import REPOSITORY

from .blueprints import find_and_debias
from .canvas import to_blueprint, to_ui
from .finding import find_the_bias_features, where_is_it_decided, which_features_count, why_does_it_not_work
from .graph import Graph, Link, Node, to_api
from .own import your_own_model
from .paper import paper_stable_diffusion, paper_unconditional
from .pieces import load_classifier, load_model, sampler, steer
from .steering import any_size, debias_a_prompt, debias_the_avatars, dose_response, start_here, three_attributes_at_once

FOLDER, BLUEPRINTS = REPOSITORY / "workflows", REPOSITORY / "subgraphs"
SUBGRAPHS = (find_and_debias,)
GRAPHS = (
    start_here, debias_the_avatars, find_the_bias_features, dose_response, debias_a_prompt, paper_unconditional,
    paper_stable_diffusion, three_attributes_at_once, where_is_it_decided, which_features_count,
    why_does_it_not_work, your_own_model, any_size,
)  # fmt: skip

__all__ = [
    "BLUEPRINTS",
    "FOLDER",
    "GRAPHS",
    "Graph",
    "Link",
    "Node",
    "SUBGRAPHS",
    "any_size",
    "load_classifier",
    "load_model",
    "sampler",
    "steer",
    "to_api",
    "to_blueprint",
    "to_ui",
]
