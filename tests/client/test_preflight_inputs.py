"""What a preflight of a site's folder looks at is what the worker would use."""

from collections.abc import Callable
from pathlib import Path

import pytest

from client.enrolment import init_site
from client.preflight import preflight
from client.preflight_inputs import inputs_of_site
from client.site_folder import SiteFolder
from medfed.errors import SiteError
from medfed.study import StudyConfig


@pytest.fixture
def folder(tmp_path: Path, make_cohort: Callable[..., Path]) -> SiteFolder:
    """A site that joined a consortium, with nobody listening at its server's address."""
    from server.provisioning import provision

    (tmp_path / "c.toml").write_text(
        'name = "trial"\n[server]\nhost = "127.0.0.1"\nport = 9\n[[sites]]\nname = "north"\n[[sites]]\nname = "south"\n'
    )
    provision(tmp_path / "c.toml", tmp_path / "out", enrolments=(), renew_server_certificate=False)
    return init_site(
        tmp_path / "out/kits/north",
        tmp_path / "site",
        data=make_cohort(),
        cohort="patients",
        device="cpu",
        expected_fingerprint=None,
    )


def test_folder_gives_data_keys_policy_and_server(folder: SiteFolder) -> None:
    inputs = inputs_of_site(folder.root, None)
    assert (inputs.site_name, inputs.server, inputs.device) == ("north", "127.0.0.1:9", "cpu")
    assert inputs.manifests == (folder.settings().data,)
    checks = {check.name: check for check in preflight(inputs)}
    assert checks["patients"].outcome == "ok"
    assert checks["private files"].outcome == "ok"
    assert checks["policy"].outcome in ("ok", "warn")
    assert checks["connection"].outcome == "fail"


def test_key_that_others_may_read_is_found(folder: SiteFolder) -> None:
    folder.node_key.chmod(0o644)
    checks = [check for check in preflight(inputs_of_site(folder.root, None)) if check.name == "private files"]
    assert [check.outcome for check in checks] == ["fail"]


def test_folders_that_are_made_at_the_start_may_be_missing_and_keys_may_not(folder: SiteFolder) -> None:
    folder.journals.rmdir()
    folder.feature_key.unlink()
    found = [check for check in preflight(inputs_of_site(folder.root, None)) if check.name == "private files"]
    assert [(check.outcome, check.found) for check in found] == [("fail", f"{folder.feature_key.name}: not there.")]


def test_study_file_is_held_against_the_data(
    folder: SiteFolder, make_study: Callable[..., StudyConfig], study_file: Callable[[StudyConfig], Path]
) -> None:
    checks = preflight(inputs_of_site(folder.root, study_file(make_study(("south",)))))
    assert "not north" in next(check for check in checks if check.name == "study").found


def test_folder_that_is_no_site_is_told(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="site init"):
        inputs_of_site(tmp_path, None)
