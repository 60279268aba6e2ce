"""Pictures of what the adapter changes, on a stub of a model whose one parameter says how wrong it is."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client.policy import SitePolicy
from client.site import Site
from medfed.models.folding import ModelState
from medfed.models.pixels import PixelSpec
from medfed.study import StudyConfig
from simulation.overlays import displayable, draw_overlays

SIZE = 64
SPEC = PixelSpec(image_size=None)


class StubModel:
    """Predicts each box with a shift of ``flat[0]`` pixels; for classes, ``flat[0]`` is the prediction."""

    def __init__(self, shift: float) -> None:
        self.initial_P = torch.tensor([shift])
        self.flat = torch.tensor([5.0])
        self.pixels, self.device, self.backbone = SPEC, torch.device("cpu"), self
        self.loaded: list[float] = []

    def put(self, state):
        self.load(state.adapter_P)

    def load(self, vector_P):
        self.flat = vector_P.clone()
        self.loaded.append(float(vector_P[0]))

    def read(self):
        return self.flat.clone()

    def train(self, mode=True):
        self.training = mode

    def embed(self, features):
        return features

    def decode(self, _embedding, box_N4, _owner_N):
        logits = torch.full((len(box_N4), SIZE, SIZE), -9.0)
        for index, box in enumerate((box_N4 + self.flat[0]).int().tolist()):
            logits[index, box[1] : box[3] + 1, box[0] : box[2] + 1] = 9.0
        return logits

    def classify(self, features):
        logits = torch.zeros(len(features), 2)
        logits[:, int(self.flat[0])] = 1.0
        return {"lesion": logits}


class StubFeatures:
    def features_of(self, item, _model):
        return item.image_CHW


def make_study(task: str, *, sites=("north", "south"), simulated=True) -> StudyConfig:
    segmentation = task == "segmentation"
    site = {"scanner": "bias-3t", "train_patients": 1, "test_patients": 1}
    return StudyConfig.model_validate(
        {
            "name": "s",
            "seed": 1,
            "backbone": {"name": "stub", "sha256": "0" * 64},
            "adapter": {"rank": 1, "alpha": 1, "targets": "all"},
            "task": {"kind": "segmentation", "classes": ["putamen", "caudate"]}
            if segmentation
            else {"kind": "classification", "targets": {"lesion": ["absent", "present"]}},
            "training": {"local_epochs": 1, "batch_size": 1, "learning_rate": 0.1},
            "rounds": {"num_rounds": 1},
            "cohort": {"kind": "brain-structures" if segmentation else "brain-lesions"} if simulated else None,
            "sites": [
                {
                    "name": name,
                    **(site if simulated else {}),
                    **({} if segmentation else {"lesion_prevalence": 0.5}),
                }
                for name in sites
            ],
        }
    )


def make_site(folder: Path, name: str, *, empty_first=False, no_structure=False, num_test=2) -> Site:
    folder = folder / name
    folder.mkdir(parents=True)
    generator = np.random.default_rng(3)
    rows = []
    for number in range(1 + num_test):
        label = np.zeros((SIZE, SIZE), dtype=np.int16)
        if not no_structure and not (empty_first and number == 1):
            label[10:24, 20:32] = 1
            label[30:44, 40:50] = 2
        np.save(folder / f"{number}.npy", generator.random((SIZE, SIZE), dtype=np.float32))
        np.save(folder / f"{number}-label.npy", label)
        rows.append({"image": f"{number}.npy", "label": f"{number}-label.npy", "patient_id": f"{name}-{number}",
                     "split": "train" if number == 0 else "test", "lesion": number % 2})  # fmt: skip
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Site(
        name,
        (folder / "manifest.csv",),
        device=torch.device("cpu"),
        features=StubFeatures(),
        policy=lambda: SitePolicy(minimum_patients=1, allow_unprotected=False),
        cohorts={},
        ledger=folder / "ledger.sqlite",
        ledger_key=folder / "ledger.key",
        identity=folder / "identity",
        journal=folder / "journal",
        memory=folder / "memory",
        noise_seed=None,
    )


def draw(tmp_path: Path, study: StudyConfig, sites: list[Site], model: StubModel, adapter: float) -> list[dict]:
    draw_overlays(tmp_path / "figures", study, sites, model, lambda _site: ModelState(torch.tensor([adapter])))
    return json.loads((tmp_path / "figures/captions.json").read_text())


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_each_site_but_the_pooled_one_has_a_small_png_with_a_caption(tmp_path: Path, task: str) -> None:
    sites = [make_site(tmp_path, name) for name in ("north", "south", "pooled")]
    captions = draw(tmp_path, make_study(task), sites, StubModel(0), 1)
    assert [caption["file"] for caption in captions] == ["overlay-north.png", "overlay-south.png"]
    assert captions[0]["caption"].startswith("Virtual patient of site north, scanner bias-3t")
    for caption in captions:
        data = (tmp_path / "figures" / caption["file"]).read_bytes()
        assert len(data) < 250_000
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
            assert image.width >= 800


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_the_adapter_that_was_in_place_is_there_again(tmp_path: Path, task: str) -> None:
    model = StubModel(0)
    draw(tmp_path, make_study(task), [make_site(tmp_path, "north")], model, 1)
    assert model.flat.tolist() == [5.0]
    assert model.training is False


def test_the_adapter_is_put_back_when_drawing_fails(tmp_path: Path) -> None:
    model = StubModel(0)
    model.classify = None
    with pytest.raises(TypeError):
        draw(tmp_path, make_study("classification"), [make_site(tmp_path, "north")], model, 1)
    assert model.flat.tolist() == [5.0]


def test_before_is_the_initial_adapter_and_after_the_final_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    from matplotlib.axes import Axes

    plain = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **kw: titles.append(text) or plain(self, text, **kw))
    model = StubModel(3)
    draw(tmp_path, make_study("segmentation"), [make_site(tmp_path, "north")], model, 0)
    assert titles[:2] == ["image", "reference"]
    assert titles[3] == "after: Dice 1.000"
    assert 0.3 < float(titles[2].removeprefix("before: Dice ")) < 0.9
    assert model.loaded == [3.0, 0.0, 5.0]


def test_first_held_out_image_with_a_structure_is_drawn(tmp_path: Path) -> None:
    captions = draw(
        tmp_path,
        make_study("segmentation"),
        [make_site(tmp_path, "north", empty_first=True)],
        StubModel(0),
        1,
    )
    assert len(captions) == 1


def test_site_without_any_structure_has_no_picture(tmp_path: Path) -> None:
    sites = [make_site(tmp_path, "north", no_structure=True), make_site(tmp_path, "south")]
    captions = draw(tmp_path, make_study("segmentation"), sites, StubModel(0), 1)
    assert [caption["title"] for caption in captions] == ["south"]


def test_adapter_that_predicts_nothing_is_drawn_too(tmp_path: Path) -> None:
    captions = draw(tmp_path, make_study("segmentation"), [make_site(tmp_path, "north")], StubModel(0), 10 * SIZE)
    assert len(captions) == 1


def test_many_held_out_images_are_cut_to_six(tmp_path: Path) -> None:
    site = make_site(tmp_path, "north", num_test=9)
    assert len(draw(tmp_path, make_study("classification"), [site], StubModel(0), 1)) == 1


def test_own_data_is_not_called_virtual(tmp_path: Path) -> None:
    study = make_study("segmentation", simulated=False)
    (caption,) = draw(tmp_path, study, [make_site(tmp_path, "north")], StubModel(0), 1)
    assert caption["caption"].startswith("Held-out patient of site north, from the user's own data")


def test_display_undoes_the_normalisation() -> None:
    pixels = PixelSpec(image_size=None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    grey_HW = torch.linspace(0, 1, 16).view(4, 4)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (pixels.mean, pixels.std))
    shown = displayable((grey_HW.expand(3, 4, 4) - mean) / std, pixels)
    np.testing.assert_allclose(shown, grey_HW.numpy(), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_constant_image_is_black(channels: int) -> None:
    assert not displayable(torch.full((channels, 4, 4), 0.7), SPEC).any()
