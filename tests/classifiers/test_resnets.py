"""FairFace and described ResNets: probabilities against explicit arithmetic, how files are told apart, refusals."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet

from difflens_core.classifiers import decided, labels_of, load_any_classifier, shares_left_out
from difflens_core.classifiers.readings import MISTAKE, NO_FACE, left_out
from difflens_core.classifiers.resnets import FAIRFACE, ResNetClassifier
from difflens_core.files import DiffLensError

AVATARS = Path(__file__).resolve().parents[2] / "models" / "avatars"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def images(n: int, height: int = 224, width: int = 224, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, height, width, 3, generator=torch.Generator().manual_seed(seed))


def random_resnet(make, outputs: int) -> nn.Module:
    """A torchvision ResNet with random weights and running statistics, and clearly different outputs."""
    torch.manual_seed(0)
    network = make(num_classes=outputs).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    nn.init.normal_(network.fc.weight, 0, 0.3)
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def fairface(tmp_path_factory):
    """A network in FairFace's layout, and its state dict as a file."""
    network = random_resnet(resnet.resnet34, 18)
    path = tmp_path_factory.mktemp("fairface") / "res34_fair_align_multi_7.pt"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A ResNet-18 with five outputs, and its state dict as a file without a description."""
    network = random_resnet(resnet.resnet18, 5)
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_file(network.state_dict(), path)
    return network, path


class Means(nn.Module):
    """A network of 18 outputs that depend on the mean colour alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(18, 3, generator=torch.Generator().manual_seed(3)), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)) @ self.weight.T


def test_fairface_against_torchvision_and_explicit_columns(fairface):
    network, path = fairface
    model, report = load_any_classifier(path)
    pictures = images(2)
    logits = network(((pictures - MEAN) / STD).permute(0, 3, 1, 2))
    race, gender, age = (logits[:, a:b].double().softmax(dim=1) for a, b in ((0, 7), (7, 9), (9, 18)))
    found = model.classify(pictures)
    kept = torch.stack([race[:, 0], race[:, 1], race[:, 3] + race[:, 4], race[:, 5]], dim=1)
    expected = {
        "gender": gender,
        "age": torch.stack([age[:, :3].sum(1), age[:, 3:7].sum(1), age[:, 7:].sum(1)], dim=1),
        "race": kept / kept.sum(dim=1, keepdim=True),
        f"race{MISTAKE}": race[:, :4],
        left_out("race"): race[:, 2] + race[:, 6],
        left_out(f"race{MISTAKE}"): race[:, 4:].sum(dim=1),
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values, atol=1e-5, rtol=1e-4)
    assert model.attributes["gender"] == ("male", "female") and model.attributes["age"] == ("young", "adult", "old")
    assert "FairFace" in report and "young is 0 to 19" in report and "whole pictures, 224 x 224" in report
    assert not model.training and not any(p.requires_grad for p in model.parameters())


RACE_COLUMNS = {
    "White": "white", "Black": "black", "Latino_Hispanic": None, "East Asian": "asian", "Southeast Asian": "asian",
    "Indian": "indian", "Middle Eastern": None,
}  # fmt: skip
REFERENCE_COLUMNS = dict(zip(RACE_COLUMNS, ("white", "black", "asian", "indian", None, None, None), strict=True))


@pytest.mark.parametrize(("column", "label"), list(enumerate(RACE_COLUMNS)))
def test_the_race_mapping_column_by_column(column, label):
    logits = torch.zeros(1, 18)
    logits[0, column] = 20.0
    for name, columns in (("race", RACE_COLUMNS), (f"race{MISTAKE}", REFERENCE_COLUMNS)):
        readout, expected = FAIRFACE[name], columns[label]
        p, left = readout.log_probabilities(logits).exp()[0], readout.share_left_out(logits)[0]
        if expected is None:
            assert left > 0.999
        else:
            assert p[readout.classes.index(expected)] > 0.999 and left < 1e-6
    assert FAIRFACE["race"].log_probabilities(logits).exp().sum() == pytest.approx(1)


@pytest.mark.parametrize("column", range(9))
def test_the_age_mapping_column_by_column(column):
    logits = torch.zeros(1, 18)
    logits[0, 9 + column] = 20.0
    expected = ("young",) * 3 + ("adult",) * 4 + ("old",) * 2
    p = FAIRFACE["age"].log_probabilities(logits).exp()[0]
    assert p[FAIRFACE["age"].classes.index(expected[column])] > 0.999
    assert not FAIRFACE["age"].missing


def test_classes_that_are_almost_impossible_stay_finite():
    logits = torch.zeros(1, 18)
    logits[0, 2] = 1000.0  # all Latino_Hispanic: the four classes have nothing, and share it evenly by their logits
    p = FAIRFACE["race"].log_probabilities(logits).exp()
    torch.testing.assert_close(p, torch.tensor([[1.0, 1.0, 2.0, 1.0]]) / 5)
    assert FAIRFACE["race"].share_left_out(logits) == 1


def test_batches_of_any_size_give_the_same():
    model = ResNetClassifier(Means(), FAIRFACE).eval()
    pictures = images(7, 40, 30)
    whole = model.classify(pictures, batch=7)
    for name, values in model.classify(pictures, batch=3).items():
        torch.testing.assert_close(values, whole[name], atol=1e-6, rtol=1e-5)
        assert values.device.type == "cpu" and values.dtype == torch.float32


def test_pictures_are_resized_and_normalised():
    model = ResNetClassifier(Means(), FAIRFACE, size=8).eval()
    grey = torch.full((1, 16, 32, 3), 0.25)
    logits = Means()(((0.25 - MEAN) / STD).reshape(1, 3, 1, 1))
    torch.testing.assert_close(model.classify(grey)["gender"], logits[:, 7:9].softmax(dim=1))
    with_alpha = torch.cat([grey, torch.zeros(1, 16, 32, 1)], dim=-1)
    assert torch.equal(model.classify(with_alpha)["gender"], model.classify(grey)["gender"])


def test_faces_are_looked_at_alone_and_pictures_without_one_are_told_apart():
    pictures = torch.zeros(3, 40, 40, 3)
    pictures[:, :20, :20] = torch.tensor([0.9, 0.2, 0.4])

    def by_hand(x: torch.Tensor) -> list[torch.Tensor]:
        face, smaller = [0.125, 0.125, 0.375, 0.375], [0.6, 0.6, 0.7, 0.7]
        return [torch.tensor([smaller, face]), torch.empty(0, 4), torch.tensor([[0.625, 0.625, 0.875, 0.875]])]

    found = ResNetClassifier(Means(), FAIRFACE, size=8, faces=by_hand).eval().classify(pictures)
    plain = ResNetClassifier(Means(), FAIRFACE, size=8).eval()
    for i, seen in ((0, pictures[:1, :20, :20]), (1, pictures[:1]), (2, torch.zeros(1, 8, 8, 3))):
        torch.testing.assert_close(found["age"][i : i + 1], plain.classify(seen)["age"])
    assert found[NO_FACE].tolist() == [0, 1, 0] and decided(found).tolist() == [True, False, True]
    labels = labels_of(found, "age", FAIRFACE["age"].classes)
    assert labels[1] is None and labels[0] in FAIRFACE["age"].classes
    shares = shares_left_out(found, "race")
    assert shares["no face"] == pytest.approx(1 / 3)
    assert shares["other classes"] == pytest.approx(float(found[left_out("race")][[0, 2]].mean()))
    assert shares_left_out(plain.classify(pictures), "gender") == {}


FIVE = {"attributes": {"mood": ["glad", "sad"], "hat": ["none", "cap", "crown"]}, "size": 32, "mean": [0.5] * 3}


def check_five(model, network) -> None:
    pictures = images(2, 32, 32)
    logits = network(((pictures - 0.5) / STD).permute(0, 3, 1, 2))
    found = model.classify(pictures)
    assert model.attributes == {"mood": ("glad", "sad"), "hat": ("none", "cap", "crown")} == {**model.attributes}
    torch.testing.assert_close(found["mood"], logits[:, :2].softmax(dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["hat"], logits[:, 2:].softmax(dim=1), atol=1e-5, rtol=1e-4)
    assert found.keys() == {"mood", "hat"}


def test_a_torchvision_file_with_a_side_car(small, tmp_path):
    network, path = small[0], tmp_path / "mine.pth"
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, path)
    (tmp_path / "mine.pth.json").write_text(json.dumps(FIVE))
    model, report = load_any_classifier(path)
    assert report.splitlines() == [
        "format: ResNet-18", "input: whole pictures, 32 x 32", "mood: glad, sad", "hat: none, cap, crown",
    ]  # fmt: skip
    check_five(model, network)


def test_a_torchvision_file_in_half_precision_with_metadata(small, tmp_path):
    path = tmp_path / "mine.safetensors"
    half = {name: t.half() if t.is_floating_point() else t for name, t in small[0].state_dict().items()}
    save_file(half, path, {"difflens": json.dumps(FIVE)})
    network = resnet.resnet18(num_classes=5).eval()  # computes in fp32 on weights that were rounded
    network.load_state_dict(half)
    check_five(load_any_classifier(path)[0], network)


def test_a_torchvision_file_in_fp8(small, tmp_path):
    path = tmp_path / "mine.safetensors"
    weights = {n: t.to(torch.float8_e4m3fn) if t.is_floating_point() else t for n, t in small[0].state_dict().items()}
    save_file(weights, path, {"difflens": json.dumps(FIVE)})
    network = resnet.resnet18(num_classes=5).eval()
    network.load_state_dict(weights)
    check_five(load_any_classifier(path)[0], network)


# --- FairFace's two models ---


def fairface_file(folder: Path, name: str, trained: slice) -> Path:
    """Weights in FairFace's layout, in which only those rows of the last layer are as training leaves them."""
    with torch.device("meta"):
        shapes = resnet.resnet34(num_classes=18).state_dict()
    weights = {key: torch.zeros(t.shape, dtype=torch.float16) for key, t in shapes.items()}
    rows = torch.nn.Linear(512, 18).weight.data
    rows[trained] += 0.1 * torch.randn(rows[trained].shape)
    torch.save(weights | {"fc.weight": rows}, folder / name)
    return folder / name


ALL, FOUR = slice(None), [0, 1, 2, 3, *range(7, 18)]
FILES = {
    "renamed, seven": ("mine.pt", ALL, 7, "seven races; if it is FairFace's model with four"),
    "renamed, four": ("mine.pt", FOUR, 4, "the model with four races"),
    "seven": ("res34_fair_align_multi_7_20190809.pt", ALL, 7, "Latino_Hispanic and Middle Eastern are left out"),
    "four": ("res34_fair_align_multi_4_20190809.pt", FOUR, 4, "the model with four races"),
    "four by its name alone": ("res34_fair_align_multi_4.pt", ALL, 4, "four races by the file's name"),
}


@pytest.mark.parametrize("case", FILES)
def test_fairfaces_two_models_are_told_apart(tmp_path, case):
    name, trained, races, words = FILES[case]
    torch.manual_seed(0)
    path = fairface_file(tmp_path, name, trained)
    model, report = load_any_classifier(path)
    assert report.startswith("format: FairFace, ResNet-34\n") and words in report
    model.network = Means()
    found, logits = model.classify(images(3)), Means()(((images(3) - MEAN) / STD).permute(0, 3, 1, 2))
    race = logits[:, :races].softmax(dim=1)
    expected = race if races == 4 else torch.stack([race[:, 0], race[:, 1], race[:, 3] + race[:, 4], race[:, 5]], dim=1)
    torch.testing.assert_close(found["race"], expected / expected.sum(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["gender"], logits[:, 7:9].softmax(dim=1), atol=1e-5, rtol=1e-4)
    assert (f"race{MISTAKE}" in found) == (left_out("race") in found) == (races == 7)


def test_a_fairface_file_whose_name_and_weights_differ_is_asked_about(tmp_path):
    torch.manual_seed(0)
    path = fairface_file(tmp_path, "res34_fair_align_multi_7.pt", FOUR)
    with pytest.raises(DiffLensError, match="only four of them were trained. Rename it .*multi_7.pt.json beside it"):
        load_any_classifier(path)


def test_depth_and_kind_of_block_are_read_off_the_weights(tmp_path):
    with torch.device("meta"):
        shapes = resnet.resnet50(num_classes=5).state_dict()
    path = tmp_path / "deep.safetensors"
    # zeros instead of random weights: half a second less
    save_file({key: torch.zeros(t.shape, dtype=torch.float16) for key, t in shapes.items()}, path)
    (tmp_path / "deep.safetensors.json").write_text(json.dumps(FIVE))
    model, report = load_any_classifier(path)
    assert "format: ResNet-50\n" in report
    assert model.network.state_dict().keys() == shapes.keys()


def test_the_avatars_classifier_is_recognised():
    model, report = load_any_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors")
    assert report.startswith("format: DiffLens\n") and "presentation: masculine, feminine" in report
    assert model.classify(images(1, 64, 64))["age"].shape == (1, 3)
    with pytest.raises(DiffLensError, match="looks for no faces. Set face_detector to none"):
        load_any_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors", faces=lambda x: [])


def write_small(small, path: Path, description: object = None, **changes: torch.Tensor) -> Path:
    if changes:
        save_file({**small[0].state_dict(), **changes}, path)
    else:
        path.hardlink_to(small[1])
    if description is not None:
        text = description if isinstance(description, (str, bytes)) else json.dumps(description)
        Path(f"{path}.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


class Opens:
    """Its pickle runs code when it is loaded unsafely."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


TOO_FEW = {"attributes": {"mood": ["glad", "sad"]}}
BAD_DESCRIPTIONS = {
    "nothing": (None, "ResNet-18 with 5 outputs.*nothing says what they mean.*c.safetensors.json"),
    "too few classes": (TOO_FEW, "5 outputs, but its description has 2 classes"),
    "no JSON": ("{attributes", "c.safetensors.json is not readable JSON"),
    "no UTF-8": (b"\xff\xfe\xfa", "c.safetensors.json is not readable JSON"),
    "a list": ("[1]", "holds a list, expected an object"),
    "no attributes": ({"classes": ["a", "b"]}, "lacks attributes"),
    "one class": ({"attributes": {"mood": ["glad"]}}, "two different classes"),
    "a class twice": ({"attributes": {"mood": ["glad", "glad"]}}, "two different classes"),
    "size": ({**FIVE, "size": "big"}, "size 'big'"),
    "std": ({**FIVE, "std": [1, 1, 0]}, "std .1, 1, 0."),
    "mean": ({**FIVE, "mean": [1, 1]}, "mean .1, 1."),
}


@pytest.mark.parametrize("case", BAD_DESCRIPTIONS)
def test_bad_descriptions_are_refused(case, small, tmp_path):
    text, message = BAD_DESCRIPTIONS[case]
    with pytest.raises(DiffLensError, match=message):
        load_any_classifier(write_small(small, tmp_path / "c.safetensors", text))


def test_bad_files_are_refused(small, tmp_path):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(DiffLensError, match=message):
            load_any_classifier(path)

    refused(tmp_path / "gone.pt", "no such file")
    refused(AVATARS / "difflens_saes" / "avatars.safetensors", "DiffLens sae file, expected a DiffLens classifier")
    save_file({"unet.weight": torch.ones(2)}, tmp_path / "unet.safetensors")
    refused(tmp_path / "unet.safetensors", "unet.safetensors: not a classifier of a known format. Tensors: unet.weight")
    nan = torch.full((5,), torch.nan)
    refused(write_small(small, tmp_path / "nan.safetensors", FIVE, **{"fc.bias": nan}), "tensor fc.bias holds NaN")
    narrow = write_small(small, tmp_path / "narrow.safetensors", FIVE, **{"conv1.weight": torch.ones(3, 3, 7, 7)})
    refused(narrow, "looks like a ResNet-18 of torchvision, but its weights do not fit one")
    whole = write_small(small, tmp_path / "int8.safetensors", FIVE, **{"fc.weight": torch.ones(5, 512).to(torch.int8)})
    refused(whole, "int8.safetensors: tensor fc.weight holds whole numbers .int8.")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(narrow.read_bytes()[:5000])
    refused(cut, "It may be cut off")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Opens(tmp_path / "ran"), protocol=2))
    refused(tmp_path / "evil.pt", "can run code and are never loaded")
    torch.save({"state_dict": {"fc.bias": torch.ones(5)}, "x": Opens(tmp_path / "ran")}, tmp_path / "evil2.pt")
    refused(tmp_path / "evil2.pt", "can run code and are never loaded")
    assert not (tmp_path / "ran").exists()
