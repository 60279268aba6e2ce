"""``adapter.method = "full"``: linear layers train in full, on every seam that an adapter has."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medfed.errors import StudyError
from medfed.models.adapted import AdaptedModel, load_adapter
from medfed.models.folding import ModelState
from medfed.models.registry import backbone_of
from medfed.study import StudyConfig
from simulation.harness import simulate

CPU = torch.device("cpu")
FULL = {"method": "full", "targets": "decoder-qv"}
MakeStudy = Callable[..., StudyConfig]


def test_adapter_is_the_weights_themselves(make_study: MakeStudy) -> None:
    study = make_study(adapter=FULL)
    model = AdaptedModel(study, CPU)
    assert (model.manifest.method, model.manifest.rank) == ("full", None)
    names = [spec.name for spec in model.manifest.tensors]
    assert all(".q_proj." in name or ".v_proj." in name for name in names)
    plain = backbone_of(study.backbone).build(study.task, torch.Generator().manual_seed(0))
    shapes = {name: tuple(p.shape) for name, p in plain.named_parameters()}
    for spec in model.manifest.tensors:
        assert shapes[spec.name.removeprefix("base_model.model.").replace("modules_to_save.", "")] == spec.shape


def test_saved_weights_come_back_through_peft(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(adapter=FULL)
    model = AdaptedModel(study, CPU)
    trained_P = model.initial_P + 0.1 * torch.randn(model.initial_P.shape)
    model.save(tmp_path, ModelState(trained_P))
    bare = AdaptedModel(study, CPU)._peft.unload()
    loaded = load_adapter(tmp_path, bare).get_base_model()
    image, box = torch.rand(1, 3, 64, 64), torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    owner = torch.zeros(1, dtype=torch.int64)
    model.load(trained_P)
    model.train(False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image, box, owner), model.backbone(image, box, owner))


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("trust", [None, "site"])
def test_layers_train_in_full_with_and_without_privacy(
    make_study: MakeStudy,
    make_private_study: MakeStudy,
    study_file: Callable[[StudyConfig], Path],
    tmp_path: Path,
    trust: str | None,
) -> None:
    study = make_study(adapter=FULL) if trust is None else make_private_study().replace(adapter=FULL)
    run = simulate(study_file(study), out=tmp_path, workers=0, baselines=False)
    assert run.summary.rounds == 2


def test_targets_that_name_no_linear_layer_are_refused(make_study: MakeStudy) -> None:
    with pytest.raises(StudyError, match="names none"):
        AdaptedModel(make_study(adapter={"method": "full", "targets": "regex:nothing"}), CPU)
