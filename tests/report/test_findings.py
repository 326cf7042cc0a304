"""What the rankings say of a latent: whose it is, by how much, and how sure that is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from difflens_core.experiments import Effects
from difflens_core.locate import Attribution
from difflens_core.report import effect_chart, effect_table, ranking_chart, ranking_table
from difflens_core.report.charts import PALETTE


def ranking(scores, difference, margin, classes) -> Attribution:
    scores, difference, margin = (torch.tensor(rows) for rows in (scores, difference, margin))
    return Attribution(scores, torch.zeros(1), None, "age", classes, "contrastive", difference, margin)


TWO = ranking(
    [[0.3, 0.0193, 0.2, -0.1], [0.3, 0.0193, 0.2, -0.1]],
    [[0.842, -0.2, 0.04, -0.5], [-0.842, 0.2, -0.04, 0.5]],
    [[0.13, 0.05, 0.05, 0.1], [0.13, 0.05, 0.05, 0.1]],
    ("young", "senior"),
)
THREE = ranking(
    [[0.1, -0.4], [0.2, 0.3], [0.4, -0.5]],
    [[-1.0, 0.2], [0.25, 0.1], [0.75, -0.3]],
    [[0.1, 0.1], [0.1, 0.1], [0.1, 0.1]],
    ("young", "adult", "senior"),
)


def test_the_table_says_whose_a_latent_is_by_how_much_and_how_sure():
    assert ranking_table(TWO, 2).splitlines() == [
        "age, by contrastive",
        "latent   class       score  more active by [95 % interval]",
        "#0       young         0.3  0.842 [0.712, 0.972]",
        "#2       young         0.2  0.04 [-0.01, 0.09]  may be chance",
        "#1       senior     0.0193  0.2 [0.15, 0.25]",
        "senior has 1 of 2: no other latent speaks for it.",
    ]


def test_of_three_classes_the_table_says_which_uses_a_latent_even_more():
    lines = ranking_table(THREE, 2).splitlines()
    assert lines[2:5] == [
        "#1       adult         0.3  0.1 [0, 0.2]  may be chance  most active in young",
        "#0       adult         0.2  0.25 [0.15, 0.35]  most active in senior",
        "#0       senior        0.4  0.75 [0.65, 0.85]",
    ]
    assert lines[5:] == [
        f"{name} has {n} of 2: no other latent speaks for it." for name, n in (("young", 0), ("senior", 1))
    ]


def bars(chart: np.ndarray, number: int) -> int:
    """Pixels of a group's colour."""
    wanted = [int(PALETTE[number][i : i + 2], 16) for i in (1, 3, 5)]
    return int((chart == wanted).all(axis=-1).sum())


def test_the_chart_draws_the_difference_with_its_interval():
    chart = ranking_chart(TWO)
    assert chart.shape == (440, 720, 3)
    # Latents 0 and 2 of one class, 1 of the other, in bars of equal width.
    assert bars(chart, 0) / bars(chart, 1) == pytest.approx((0.842 + 0.04) / 0.2, rel=0.15)
    sure = ranking_chart(ranking(TWO.scores.tolist(), TWO.difference.tolist(), [[0.0] * 4] * 2, TWO.classes))
    assert not np.array_equal(chart, sure)
    assert bars(ranking_chart(THREE), 0) == 0 < bars(ranking_chart(THREE), 2), "nothing speaks for the young"


@pytest.mark.parametrize("mode", ["amplify", "ablate"])
def test_the_table_of_effects_says_which_class_a_latent_stands_for(toys, mode):
    effect = torch.tensor([[0.3, -0.3, 0.0], [0.0, 0.05, -0.05], [0.0, 0.0, 0.2], [0.1, 0.0, 0.0], [0.0, 0.1, 0.0]])
    margin = torch.full((5, 3), 0.08)
    recipe = toys.recipe()
    effects = Effects(recipe.features, -effect if mode == "ablate" else effect, margin, mode, 8)
    lines = {line.split()[0]: line for line in effect_table(effects, recipe).splitlines()[2:]}
    ends = ["(8.00)  young", "(8.00)  adult, may be chance", "(8.00)  senior", "(8.00)  young", "(8.00)  adult"]
    assert [lines[f"#{f}"].endswith(end) for f, end in enumerate(ends)] == [True] * 5
    narrow = Effects(recipe.features, effects.effect, margin / 8, mode, 8)
    assert not np.array_equal(effect_chart(effects, recipe), effect_chart(narrow, recipe))
