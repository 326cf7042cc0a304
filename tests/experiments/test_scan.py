"""The site scan on a sampler whose one site decides, and in one third of the sampling only."""

from __future__ import annotations

import pytest
import torch
from toy import Draws

from difflens_core.activations import Drawer
from difflens_core.classifiers.readings import NO_CLASS, NO_FACE, left_out
from difflens_core.experiments import SiteEffect, scan_sites
from difflens_core.experiments.scan import PARTS, ClassMeans, Collector, MeanShift
from difflens_core.files import DiffLensError
from difflens_core.networks import DenoiserSampler, start_noise
from difflens_core.report import scan_chart, scan_table

CLASSES = ("dark", "light", "never")
STEPS = 6


def codes(count: int = 40) -> torch.Tensor:
    """What the deciding site puts out for each noise: its mean is the picture's brightness (n x 3 x 2 x 2)."""
    draw = torch.Generator().manual_seed(0)
    brightness = torch.where(torch.arange(count) % 4 == 0, 1.0, -1.0)
    return brightness[:, None, None, None] + 0.3 * torch.randn(count, 3, 2, 2, generator=draw)


@Draws
def draw(edits, which: torch.Tensor) -> torch.Tensor:
    """Samples in six steps: site "decides" makes the picture in the last third, site "idle" is run for nothing."""
    rows, code = torch.arange(len(which)), codes()[which]
    for step in range(STEPS):
        for site in ("decides", "idle"):
            h = code if site == "decides" else code.flip(1) * 5
            for edit in edits:
                h = edit(h, step / STEPS, rows) if edit.site == site else h
            if site == "decides" and step >= 4:
                picture = h
    return (picture.movedim(1, -1) / 8 + 0.5).clamp(0, 1)


def classify(images: torch.Tensor) -> dict[str, torch.Tensor]:
    bright = (images.mean(dim=(1, 2, 3)) - 0.5) * 40
    return {
        "tone": torch.stack([-bright, bright, torch.full_like(bright, -99)], dim=1).softmax(dim=1),
        "size": torch.stack([torch.ones(len(images)), torch.zeros(len(images))], dim=1),
    }


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], SiteEffect]:
    rows = scan_sites(["decides", "idle"], draw, classify, "tone", CLASSES, 40, 6, 1.0, 16)
    assert [row.site for row in rows] == ["decides"] * len(PARTS) + ["idle"] * len(PARTS)
    return {(row.site, row.part): row for row in rows}


def test_readings_beside_the_attributes_change_nothing(found):
    def classify_more(images):
        return classify(images) | {NO_FACE: torch.zeros(len(images)), left_out("tone"): torch.ones(len(images))}

    rows = scan_sites(["decides", "idle"], draw, classify_more, "tone", CLASSES, 40, 6, 1.0, 16)
    assert {(row.site, row.part): row for row in rows} == found


def test_pictures_without_a_face_are_in_no_mean_and_in_no_share():
    """Every fifth picture has no face, and it would be read as light: its code is that of a dark one."""

    def classify_faces(images):
        gone = (images[..., 2].mean(dim=(1, 2)) * 1000).long() % 5 == 0
        read = classify(images)
        read["tone"][gone] = torch.tensor([0.0, 1.0, 0.0])
        return read | {NO_FACE: gone.float()}

    base = classify_faces(draw([], torch.arange(40)))
    known = base[NO_FACE] == 0
    assert 4 <= (~known).sum() <= 14
    (row,) = scan_sites(["decides"], draw, classify_faces, "tone", CLASSES, 40, 6, 1.0, 40, parts=("whole",))
    assert row.success == 1 and 0 < row.no_face < 0.5
    assert "Steered pictures without a face, up to" in scan_table([row], "tone", CLASSES)
    labels = torch.where(known, base["tone"].argmax(dim=1), NO_CLASS)
    collector = Collector("decides", labels, {}, {}, 3)
    draw([collector], torch.arange(40))
    for c in (0, 1):
        own = known & (base["tone"].argmax(dim=1) == c)
        torch.testing.assert_close(ClassMeans.of(collector).means[0][c], codes()[own].mean(dim=0))


def test_some_parts_and_pictures_drawn_before_give_the_same_rows(found):
    seen = []

    @Draws
    def draw_and_count(edits, which):
        seen.append(len(which) * (not edits))
        return draw(edits, which)

    before, progress = draw([], torch.arange(40)), []
    rows = scan_sites(
        ["decides", "idle"], draw_and_count, classify, "tone", CLASSES, 40, 6, 1.0, 16,
        lambda *now: progress.append(now), ("whole", "last third"), before,
    )  # fmt: skip
    assert rows == [found[site, part] for site in ("decides", "idle") for part in ("whole", "last third")]
    assert sum(seen) == 0 and progress[-1][0] == progress[-1][1] == 40 + 2 * 2 * 2 * 6
    assert progress[0] == (16, 40 + 2 * 2 * 3 * 6)


def test_only_the_deciding_site_and_third_succeed(found):
    for part, success in {"whole": 1, "first third": 0, "middle third": 0, "last third": 1, "reversed": 0}.items():
        row = found["decides", part]
        assert row.success == success and row.per_class == (success, success, None), part
        assert row.change == pytest.approx(0.25 if success or part == "reversed" else 0, abs=0.05)
    for part in PARTS:
        row = found["idle", part]
        assert row.success == 0 and row.change == 0 and row.kept == 1


def test_sites_that_decide_only_together_are_found_together():
    """A picture is the mean of three sites: one cannot turn it, two can. The best two alone are tried first."""

    @Draws
    def draw_mean(edits, which):
        rows, code, total = torch.arange(len(which)), codes()[which], 0
        for site in ("idle", "a", "b", "c"):
            h = code
            for edit in edits:
                h = edit(h, 0.0, rows) if edit.site == site else h
            total = total + {"idle": 0.0, "a": 0.3, "b": 0.4, "c": 0.3}[site] * h
        return (total.movedim(1, -1) / 8 + 0.5).clamp(0, 1)

    rows = scan_sites(["idle", "a", "b"], draw_mean, classify, "tone", CLASSES, 40, 6, 1.0, 16, together=3)
    assert [row.site for row in rows[15:]] == ["a + b"] and rows[15].part == "whole"
    assert max(row.success for row in rows[:15]) == 0 and rows[15].success == 1
    told = []
    rows = scan_sites(
        ["a", "idle"], draw_mean, classify, "tone", CLASSES, 40, 6, 1.0, 16, lambda *x: told.append(x), ("whole",),
        together=3,
    )  # fmt: skip
    assert [row.site for row in rows] == ["a", "idle", "a + idle"] and told[-1][0] == told[-1][1]
    assert "a + idle" in scan_table(rows, "tone", CLASSES)


def test_class_means_are_the_means_of_the_pictures_of_each_class():
    labels, sums, counts = torch.tensor([0, 1, 1, 0, 1]), {}, {}
    h = torch.randn(2, 5, 3, 2, 2, generator=torch.Generator().manual_seed(1))  # two steps
    for rows in torch.arange(5).split(2):
        collector = Collector("a", labels[rows], sums, counts, 2)
        for step in range(2):
            part = h[step, rows]
            assert collector(part, step / 2, torch.arange(len(rows))) is part
    means = ClassMeans.of(collector)
    expected = torch.stack([torch.stack([h[s, labels == c].mean(dim=0) for c in (0, 1)]) for s in range(2)])
    torch.testing.assert_close(torch.stack(means.means), expected)
    own, target = torch.tensor([0, 1]), torch.tensor([1, 1])
    shift = MeanShift(means, own, target, 1.5, 0.4, 1.0)
    before = h[0, :2]
    assert shift(before, 0.3, torch.arange(2)) is before
    d = expected[1, 1] - expected[1, 0]
    for way, left in ((-0.5, 1.0), (0.0, 1.0), (0.25, 0.75), (1.0, 0.0), (1.5, 0.0)):
        states = torch.stack([expected[1, 0] + way * d, h[1, 1]]).half()
        moved = shift(states, 0.5, torch.arange(2))
        torch.testing.assert_close(moved[0].float(), states[0].float() + 1.5 * left * d, atol=1e-2, rtol=0)
        assert torch.equal(moved[1], states[1]) and moved.dtype == torch.float16


def test_the_pictures_done_are_told_up_to_the_total():
    told, rows = [], []
    found = scan_sites(
        ["idle"], draw, classify, "tone", CLASSES, 20, 3, 1.0, 8, lambda *x: told.append(x),
        on_found=lambda so_far: rows.append([*so_far]),
    )  # fmt: skip
    assert rows == [found[:count] for count in range(1, len(PARTS) + 1)]
    assert told[-1] == (20 * 2 + 5 * 6,) * 2 and [done for done, _ in told] == sorted(done for done, _ in told)


def test_sites_of_a_real_network_are_scanned(toys):
    sample = Drawer(DenoiserSampler(toys.denoiser(), 3), start_noise(24, 4, 16))
    middle = sample([], torch.arange(24))[..., 0].mean(dim=(1, 2)).median()

    def classify_red(images):
        bright = (images[..., 0].mean(dim=(1, 2)) - middle) * 200
        return {"red": torch.stack([-bright, bright], dim=1).softmax(dim=1)}

    rows = scan_sites(["middle_block", "decoder.0"], sample, classify_red, "red", ("less", "more"), 24, 4, 2.0, 24)
    whole = {row.site: row for row in rows if row.part == "whole"}
    assert whole["middle_block"].change > 0.001 and whole["decoder.0"].change > 0.001
    assert max(row.success for row in rows) > 0.5


def test_what_cannot_be_scanned_is_refused():
    with pytest.raises(DiffLensError, match="cellar was never run"):
        scan_sites(["cellar"], draw, classify, "tone", CLASSES, 20, 3)
    with pytest.raises(DiffLensError, match="dark 2, light 1, never 0; two classes"):
        scan_sites(["idle"], draw, classify, "tone", CLASSES, 3, 1)
    flat = Collector("embed", torch.tensor([0]), {}, {}, 2)
    with pytest.raises(DiffLensError, match="embed puts out 2 dimensions"):
        flat(torch.zeros(1, 4), 0.0, torch.arange(1))


def test_table_and_chart_show_every_site(found):
    rows = [*found.values()]
    table = scan_table(rows, "tone", CLASSES)
    assert len(table.splitlines()) == 2 + len(rows) and "too rare" in table
    line = next(line for line in table.splitlines() if line.startswith("decides  whole"))
    assert line.split()[2:4] == ["100", "100"]
    assert scan_chart(rows, "tone").shape == (440, 720, 3)
