"""Study files: one clear line for every mistake, one digest for every study."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import StudyError
from medfed.study import StudyConfig, parse_study, read_study

VALID: dict[str, Any] = {
    "name": "example",
    "seed": 7,
    "backbone": {"name": "lite-medsam", "sha256": "0" * 64},
    "adapter": {"rank": 4, "alpha": 8.0, "targets": "decoder-qv"},
    "task": {"kind": "segmentation", "classes": ["thalamus"]},
    "training": {"local_epochs": 1, "batch_size": 2, "learning_rate": 1e-3},
    "rounds": {"num_rounds": 2},
    "cohort": {"kind": "brain-structures"},
    "sites": [
        {"name": "north", "scanner": "reference-3t", "train_patients": 2, "test_patients": 1},
        {"name": "south", "scanner": "reference-3t", "train_patients": 2, "test_patients": 1},
    ],
}

TEXT = """
name = "example"
seed = 7
[backbone]
name = "lite-medsam"
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
[adapter]
rank = 4
alpha = 8.0
targets = "decoder-qv"
[task]
kind = "segmentation"
classes = ["thalamus"]
[training]
local_epochs = 1
batch_size = 2
learning_rate = 1e-3
[rounds]
num_rounds = 2
[cohort]
kind = "brain-structures"
[[sites]]
name = "north"
scanner = "reference-3t"
train_patients = 2
test_patients = 1
[[sites]]
name = "south"
scanner = "reference-3t"
train_patients = 2
test_patients = 1
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def test_file_and_object_are_the_same_study(tmp_path: Path) -> None:
    assert read_study(write(tmp_path, TEXT)) == StudyConfig.model_validate(VALID)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("batch_size", "batch_sise", r"unknown key 'training.batch_sise'; did you mean 'batch_size'\?"),
        ("seed = 7", "seed = 7\nepsilon = 3", "unknown key 'epsilon'"),
        ("rank = 4", "rank = 0", "adapter.rank"),
        ('targets = "decoder-qv"', 'targets = "regex:("', "not a regular expression"),
        ("rank = 4", 'method = "heads"\nrank = 4', "unknown key 'adapter.rank'"),
        ("rank = 4", 'method = "prefix"\nrank = 4', "adapter"),
        ("0000000000", "xyz", "backbone.sha256"),
        ("num_rounds = 2", "num_rounds = 2\nquorum = 3", "quorum is 3 but there are 2 sites"),
        ('name = "south"', 'name = "north"', "site 'north' appears twice"),
        ('name = "south"', 'name = "pooled"', "reserved"),
        ('name = "south"', 'name = "../south"', "sites.1.name"),
        ('kind = "brain-structures"', 'kind = "brain-lesions"', "classification cohort"),
        ('kind = "segmentation"', 'kind = "detection"', "task"),
        ('classes = ["thalamus"]', "classes = []", "task.classes"),
        ('scanner = "reference-3t"\n', "", "scanner is missing"),
        ('[cohort]\nkind = "brain-structures"\n', "", "needs a \\[cohort\\] section"),
        (
            "learning_rate = 1e-3",
            'learning_rate = 1e-3\noptimizer="sgd"\nweight_decay=0.1',
            "weight_decay needs",
        ),
        ("[rounds]", "[rounds", "valid TOML"),
        ("alpha = 8.0", "alpha = inf", "adapter.alpha"),
        ("learning_rate = 1e-3", "learning_rate = nan", "training.learning_rate"),
    ],
)
def test_mistake_gives_one_line_that_names_it(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in TEXT
    with pytest.raises(StudyError, match=expected) as caught:
        read_study(write(tmp_path, TEXT.replace(old, new, 1)))
    assert "\n" not in str(caught.value)
    assert "study.toml" in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="nowhere.toml"):
        read_study(tmp_path / "nowhere.toml")


def test_site_data_is_relative_to_the_study_file_and_must_exist(tmp_path: Path) -> None:
    text = TEXT.split("[cohort]")[0] + '[[sites]]\nname = "north"\ndata = "north/manifest.csv"\n'
    with pytest.raises(StudyError, match="manifest.csv"):
        read_study(write(tmp_path, text))
    (tmp_path / "north").mkdir()
    (tmp_path / "north" / "manifest.csv").write_text("image\n")
    assert read_study(write(tmp_path, text)).sites[0].data == tmp_path / "north" / "manifest.csv"


def test_study_for_hospitals_names_no_data_at_all_and_declares_what_divides(tmp_path: Path) -> None:
    start, sites = TEXT.split("[cohort]")[0], '[[sites]]\nname = "north"\n[[sites]]\nname = "south"\n'
    assert read_study(write(tmp_path, start + sites)).is_for_hospitals
    assert not read_study(write(tmp_path, TEXT)).is_for_hospitals
    with pytest.raises(StudyError, match="'north' has no data and others do"):
        read_study(write(tmp_path, start + sites + 'data = "manifest.csv"\n'))
    secure = "[secure_aggregation]\nenabled = true\nmax_colluding = 0\nupdate_clip_norm = 1.0\n"
    with pytest.raises(StudyError, match="declared_patients is missing"):
        read_study(write(tmp_path, start + secure + sites + '[[sites]]\nname = "west"\n'))


def test_digest_covers_the_manifest_and_is_never_stale() -> None:
    study = StudyConfig.model_validate(VALID)
    before = study.digest, study.model_digest
    manifest = AdapterManifest.of({"a": torch.zeros(2)}, method="lora", rank=1)
    resolved = study.with_manifest(manifest)
    assert resolved.digest != before[0]
    assert resolved.model_digest == before[1]
    assert resolved.resolved_manifest == manifest
    with pytest.raises(StudyError, match="resolve"):
        _ = study.resolved_manifest


def test_study_survives_the_wire_and_nothing_else_does() -> None:
    study = StudyConfig.model_validate(VALID)
    assert parse_study(study.canonical, digest=study.digest) == study
    with pytest.raises(StudyError, match="digest"):
        parse_study(study.canonical.replace(b'"seed":7', b'"seed":8'), digest=study.digest)
    with pytest.raises(StudyError, match="canonical"):
        parse_study(study.canonical.replace(b'"seed":7', b'"seed": 7'))
    with pytest.raises(StudyError):
        parse_study(b"\xff not a study")


def test_study_is_immutable() -> None:
    study = StudyConfig.model_validate(VALID)
    with pytest.raises(ValueError, match="frozen"):
        study.seed = 8  # type: ignore[misc]


SECURE: dict[str, Any] = {"enabled": True, "max_colluding": 1, "update_clip_norm": 1.0}
SHARED: dict[str, Any] = {
    "trust": "consortium",
    "unit": "patient",
    "epsilon": 8.0,
    "delta": 1e-3,
    "clip_norm": 1.0,
    "sampling_rate": 0.5,
    "steps_per_round": 1,
    "images_per_patient": 1,
    "evaluation": "exact",
}
FIVE = [{**VALID["sites"][0], "name": name} for name in ("a", "b", "c", "d", "e")]


def secure(**sections: Any) -> StudyConfig:
    return StudyConfig.model_validate({**VALID, "sites": FIVE, "secure_aggregation": SECURE, **sections})


def shared(**sections: Any) -> StudyConfig:
    training = {"batch_size": 2, "learning_rate": 1.0, "optimizer": "sgd"}
    without_clip = {"enabled": True, "max_colluding": 1}
    return secure(**{"privacy": SHARED, "training": training, "secure_aggregation": without_clip, **sections})


def test_study_with_secure_aggregation_has_its_least_numbers_and_public_weights() -> None:
    study = secure()
    assert (study.secure_quorum.threshold, study.secure_quorum.min_sites, study.quorum) == (4, 4, 4)
    assert study.declared_units("a") == 2
    assert study.sums_securely_in("federated")
    assert not study.sums_securely_in("local-a")
    assert not secure(secure_aggregation={**SECURE, "enabled": False}).sums_securely
    assert shared().secure_quorum.min_honest == 3


@pytest.mark.parametrize(
    ("make", "sections", "message"),
    [
        (secure, {"sites": FIVE[:2]}, "secure_aggregation: Expected 3 to 128 sites, got 2"),
        (secure, {"secure_aggregation": {**SECURE, "threshold": 3}}, "set threshold to at least 4"),
        (secure, {"secure_aggregation": {**SECURE, "min_sites": 3}}, "set min_sites to at least 4"),
        (secure, {"secure_aggregation": {**SECURE, "max_colluding": 4}}, "set max_colluding to at most 3"),
        (secure, {"secure_aggregation": {"enabled": True, "max_colluding": 1}}, "update_clip_norm is missing"),
        (secure, {"rounds": {"num_rounds": 2, "quorum": 3}}, "rounds.quorum is 3, but no sum of fewer than 4 sites"),
        (secure, {"sites": [*FIVE[:4], {**FIVE[4], "name": "all-sites"}]}, "'all-sites' is reserved for sums over"),
        (shared, {"secure_aggregation": None}, "trust = 'consortium' needs .secure_aggregation. with enabled = true"),
        (shared, {"secure_aggregation": {"enabled": False, "max_colluding": 1}}, "needs .secure_aggregation."),
        (shared, {"secure_aggregation": SECURE}, "update_clip_norm has no meaning with trust = 'consortium'"),
        (shared, {"secure_aggregation": {"enabled": True, "max_colluding": 0}}, "max_colluding of at least 1"),
        (shared, {"training": {"batch_size": 2, "learning_rate": 1.0}}, "needs training.optimizer = 'sgd'"),
        (shared, {"privacy": {**SHARED, "steps_per_round": 2}}, "trust = 'consortium' needs steps_per_round = 1"),
        (shared, {"privacy": {**SHARED, "epsilon": None}}, "trust = 'consortium' needs epsilon or noise_multiplier"),
    ],
)
def test_combination_that_cannot_work_is_refused_with_what_to_change(
    make: Callable[..., StudyConfig], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        make(**sections)
