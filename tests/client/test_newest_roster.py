"""A study that was signed under an older roster than a site has seen is not approved, however often it is shown."""

from collections.abc import Callable
from pathlib import Path

import pytest

from client.enrolment import init_site
from client.newest_roster import newest_serial, note_roster, refuse_older_roster
from client.preflight_inputs import inputs_of_site
from client.study_in_words import study_in_words
from medfed.cli import main
from medfed.errors import ConsortiumError, DocumentError, SiteError
from medfed.signed_document import sign_document
from medfed.signed_study import SignedStudy
from medfed.study import StudyConfig
from server.provisioning import provision
from server.study_signing import sign_study

POLICY = "minimum_patients = 3\nallow_unprotected = true\n"


@pytest.fixture
def made(make_consortium: Callable):
    return make_consortium("north", "south", "west", policy=POLICY)


@pytest.fixture
def study(make_study: Callable[..., StudyConfig]) -> StudyConfig:
    """Of hospitals whose cohorts are there already."""
    plain = make_study(("x-north", "x-south", "x-west"))
    return plain.replace(
        sites=[site.model_copy(update={"name": site.name.removeprefix("x-"), "data": None}) for site in plain.sites]
    )


def signed_now(made, study: StudyConfig, copy: Path) -> Path:
    """A copy of the study as the coordinator signs it now."""
    copy.write_bytes(sign_study(study, made.coordinator).path.read_bytes())
    return copy


def approve(made, study: Path, code: int = 0) -> None:
    if code == 0:
        return main(["site", "approve", str(made.sites["north"].root), str(study), "--yes"])
    with pytest.raises(SystemExit) as ended:
        main(["site", "approve", str(made.sites["north"].root), str(study), "--yes"])
    assert ended.value.code == code
    return None


def test_a_study_signed_before_the_roster_changed_is_refused_once_a_newer_one_was_seen(
    made, study: StudyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made.sites["north"]
    old = signed_now(made, study, tmp_path / "old.study")
    other = signed_now(made, study.replace(seed=6), tmp_path / "other.study")
    approve(made, old)
    approve(made, other)  # under the same roster
    first = newest_serial(folder)
    again = init_site(made.coordinator.kit("west"), tmp_path / "west", data=made.sites["west"].settings().data)
    made.coordinator.enrolment("west").unlink()
    provision(made.file, made.coordinator.root, enrolments=[again.enrolment_file])
    approve(made, old)  # this site has heard of no newer roster yet
    newer = signed_now(made, study.replace(seed=7), tmp_path / "newer.study")
    approve(made, newer)
    assert newest_serial(folder) == made.coordinator.roster().serial > first
    for replayed in (old, other):
        before = newest_serial(folder)
        approve(made, replayed, code=ConsortiumError.exit_code)
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0
        assert f"Expected a study signed under roster {before} or a newer one" in said
        assert newest_serial(folder) == before
        with pytest.raises(ConsortiumError, match="sign it again"):
            inputs_of_site(folder.root, replayed)
        with pytest.raises(ConsortiumError, match="sign it again"):
            study_in_words(made.coordinator.signed_study(replayed), folder)
    approve(made, signed_now(made, study, tmp_path / "old.study"))  # signed again, it is the same study


def test_a_study_that_was_only_looked_at_counts_as_seen(
    made, study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.prompt", lambda *_args, **_options: "no")
    folder, file = made.sites["north"], signed_now(made, study, tmp_path / "a.study")
    with pytest.raises(SystemExit):
        main(["site", "approve", str(folder.root), str(file)])
    assert newest_serial(folder) == made.coordinator.roster().serial
    assert not list(folder.approvals.iterdir())


def test_the_serial_is_covered_by_the_signature(made, study: StudyConfig, tmp_path: Path) -> None:
    file = signed_now(made, study, tmp_path / "a.study")
    serial = str(made.coordinator.roster().serial).encode()
    file.write_bytes(file.read_bytes().replace(b'"roster_serial":' + serial, b'"roster_serial":9999999999'))
    approve(made, file, code=DocumentError.exit_code)
    assert newest_serial(made.sites["north"]) == 0


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b'{"serial":0,"version":1}', b'{"serial":"7","version":1}',
                                  b'{"serial":7,"version":2}', b'{"serial":7,"version":1,"x":1}', b"[" * 100_000])  # fmt: skip
def test_a_damaged_file_allows_nothing(made, study: StudyConfig, tmp_path: Path, data: bytes) -> None:
    folder, file = made.sites["north"], signed_now(made, study, tmp_path / "a.study")
    folder.newest_roster.write_bytes(data)
    approve(made, file, code=SiteError.exit_code)
    assert folder.newest_roster.read_bytes() == data
    assert not list(folder.approvals.iterdir())


def test_serials_that_a_site_sees_never_go_back(made, study: StudyConfig, tmp_path: Path) -> None:
    folder = made.sites["north"]
    body = made.coordinator.signed_study(signed_now(made, study, tmp_path / "a.study"))
    highest = 0
    for serial in (5, 9, 7, 9, 1, 12, 11, 2**53 - 1, 12):
        one = body.model_copy(update={"roster_serial": serial})
        if serial < highest:
            for refuse in (refuse_older_roster, note_roster):
                with pytest.raises(ConsortiumError):
                    refuse(one, folder)
        else:
            note_roster(one, folder)
        highest = max(highest, serial)
        assert newest_serial(folder) == highest
    for serial in (0, -1, 2**53):
        with pytest.raises(ValueError, match="roster_serial"):
            SignedStudy(consortium="brains", roster_serial=serial, study=body.study)
    assert sign_document(body, made.coordinator.coordinator_key())
