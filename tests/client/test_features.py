"""The feature cache: right, bounded, and unreadable without its key."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.data import load_cohort
from client.features import FeatureCache, cache_key
from medfed.errors import SiteError
from medfed.models.adapted import AdaptedModel
from medfed.study import StudyConfig


def items_of(study: StudyConfig, model: AdaptedModel) -> tuple:
    data = study.sites[0].data
    assert data is not None
    return load_cohort("north", [data], study.task, model.pixels).items


def test_features_are_those_of_the_frozen_prefix(study: StudyConfig, model: AdaptedModel) -> None:
    item = items_of(study, model)[0]
    features = FeatureCache().features_of(item, model)
    expected = model.backbone.prefix(item.image_CHW.expand(3, -1, -1)[None], model.num_frozen_stages)[0]
    assert torch.equal(features, expected)
    assert model.num_frozen_stages == 6


def test_adapter_does_not_change_the_features(study: StudyConfig, model: AdaptedModel) -> None:
    item = items_of(study, model)[0]
    model.load(model.initial_P)
    before = FeatureCache().features_of(item, model)
    model.load(torch.randn_like(model.initial_P))
    assert torch.equal(FeatureCache().features_of(item, model), before)


def test_another_process_finds_them_on_disk_bit_for_bit(
    study: StudyConfig, model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, item = cache_key(tmp_path / "key"), items_of(study, model)[0]
    stored = FeatureCache(tmp_path / "features", key).features_of(item, model)
    monkeypatch.setattr(AdaptedModel, "encode", lambda *_: pytest.fail("encoded a cached image"))
    assert torch.equal(FeatureCache(tmp_path / "features", key).features_of(item, model), stored)


def test_features_on_disk_are_encrypted(study: StudyConfig, model: AdaptedModel, tmp_path: Path) -> None:
    key = cache_key(tmp_path / "key")
    features = FeatureCache(tmp_path / "features", key).features_of(items_of(study, model)[0], model)
    (entry,) = (tmp_path / "features").iterdir()
    sealed = entry.read_bytes()
    raw = features.numpy().tobytes()
    assert all(raw[start : start + 16] not in sealed for start in range(0, len(raw) - 16, 997))
    assert entry.name not in str(study.sites[0].data)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:5], lambda b: bytes([b[0] ^ 1]) + b[1:]])
def test_damaged_entry_or_other_key_is_computed_again(
    study: StudyConfig, model: AdaptedModel, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    key, item = cache_key(tmp_path / "key"), items_of(study, model)[0]
    stored = FeatureCache(tmp_path / "features", key).features_of(item, model)
    (entry,) = (tmp_path / "features").iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert torch.equal(FeatureCache(tmp_path / "features", key).features_of(item, model), stored)
    assert torch.equal(FeatureCache(tmp_path / "features", os.urandom(32)).features_of(item, model), stored)


def test_memory_and_disk_are_bounded(study: StudyConfig, model: AdaptedModel, tmp_path: Path) -> None:
    items = items_of(study, model)
    size = FeatureCache().features_of(items[0], model).nbytes
    cache = FeatureCache(
        tmp_path / "f", cache_key(tmp_path / "key"), max_memory_bytes=2 * size, max_disk_bytes=3 * size
    )
    for item in items:
        cache.features_of(item, model)
    assert cache._memory_bytes <= 2 * size
    assert sum(entry.stat().st_size for entry in (tmp_path / "f").iterdir()) <= 3 * size


def test_stand_ins_of_two_seeds_do_not_share_features(
    make_study: Callable[..., StudyConfig], study: StudyConfig
) -> None:
    other = study.replace(seed=study.seed + 1)
    digests = {AdaptedModel(each, torch.device("cpu")).prefix_digest for each in (study, other)}
    assert len(digests) == 2


def test_cache_that_cannot_be_written_costs_time_and_nothing_else(
    study: StudyConfig, model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    item = items_of(study, model)[0]
    expected = FeatureCache().features_of(item, model)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert torch.equal(FeatureCache(tmp_path / "f", bytes(32)).features_of(item, model), expected)


def test_disk_without_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patient data"):
        FeatureCache(tmp_path)


def test_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "key"
    assert cache_key(path) == cache_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(SiteError, match="chmod 600"):
        cache_key(path)
