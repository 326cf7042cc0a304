"""What is measured of steered pictures, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from difflens_core.experiments.outcomes import paired_interval, probe_score


def test_the_interval_is_that_of_the_mean_difference():
    difference = np.random.default_rng(1).normal(0.3, 1.0, 400)
    low, high = paired_interval(difference)
    error = difference.std(ddof=1) / 20
    assert low == pytest.approx(difference.mean() - 1.96 * error, abs=0.02)
    assert high == pytest.approx(difference.mean() + 1.96 * error, abs=0.02)


def test_the_score_is_the_contrastive_one_by_hand(toys):
    recipe = toys.recipe()
    for c in range(3):
        for f in range(5):
            expected = 0.0
            for s in range(3):
                level, read_off = recipe.levels.dense()[s, :, f].double().mean(dim=1), recipe.probe_weight[s].double()
                pull = read_off @ recipe.decoder[f].double()
                rest = [k for k in range(3) if k != c]
                expected += (level[c] - level[rest].mean()) * (pull[c] - pull[rest].mean())
            assert float(probe_score(recipe)[c, f]) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)
