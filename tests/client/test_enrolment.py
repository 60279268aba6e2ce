"""``medfed site init``: keys are made at the site, nothing is overwritten, and a changed kit is no kit."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.enrolment import init_site
from client.open_site import open_site
from client.policy import Budget
from client.site import SITE_VARIABLE, SITES_VARIABLE, forget_sites, site_of
from client.site_folder import existing_site, make_folders
from medfed.cli import main
from medfed.errors import ConsortiumError, DocumentError, PolicyError, SiteError
from medfed.signing import fingerprint
from medfed.study import StudyConfig


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_everything_is_for_the_owner_alone_and_the_kit_stays_as_it_was(make_consortium: Callable) -> None:
    made = make_consortium("north")
    root = made.sites["north"].root
    for path in (root, *root.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    kit = contents(made.coordinator.kit("north"))
    secrets = [path.read_bytes() for path in (root / "keys").iterdir()]
    assert len(secrets) == 4
    sent = b"".join([*kit.values(), made.sites["north"].enrolment_file.read_bytes()])
    assert not any(secret in sent or secret.hex().encode() in sent for secret in secrets)


def test_folders_that_a_backup_does_not_hold_are_made_at_the_start(make_consortium: Callable) -> None:
    folder = make_consortium("north").sites["north"]
    for place in (folder.journals, folder.memories, folder.inflight):
        place.rmdir()
    make_folders(folder)
    assert all(stat.S_IMODE(place.stat().st_mode) == 0o700 for place in folder.private_folders)


@pytest.mark.parametrize("mode", [0o701, 0o720, 0o755])
def test_folder_that_others_may_use_is_refused_at_the_start(make_consortium: Callable, mode: int) -> None:
    folder = make_consortium("north").sites["north"]
    folder.state.chmod(mode)
    with pytest.raises(SiteError, match=rf"Expected .*state for its owner alone \(mode 0700\), got mode {mode:04o}"):
        make_folders(folder)


def test_second_init_is_refused_and_nothing_is_lost(make_consortium: Callable) -> None:
    made = make_consortium("north")
    root = made.sites["north"].root
    before, data = contents(root), made.sites["north"].settings().data
    with pytest.raises(SiteError, match="a site that is there already; its keys are kept"):
        init_site(made.coordinator.kit("north"), root, data=data)
    assert contents(root) == before
    made.sites["north"].enrolment_file.unlink()
    with pytest.raises(SiteError, match="interrupted init"):
        init_site(made.coordinator.kit("north"), root, data=data)


@pytest.mark.parametrize("change", ["port", "coordinator_key", "ca_certificate", "site", "byte"])
def test_changed_kit_makes_no_site(make_consortium: Callable, tmp_path: Path, change: str) -> None:
    made, other = make_consortium("north"), make_consortium("west", name="others")
    kit = tmp_path / "kit"
    shutil.copytree(made.coordinator.kit("north"), kit)
    document = json.loads((kit / "startup" / "kit.json").read_bytes())
    stranger = json.loads(other.coordinator.kit_document("west").read_bytes())
    if change == "port":
        document["body"]["server"]["port"] = 8444
    elif change == "byte":
        document["signature"] = document["signature"][:-1] + ("0" if document["signature"][-1] != "0" else "1")
    else:
        document["body"][change] = stranger["body"][change]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
    (kit / "startup" / "kit.json").write_text(text)
    with pytest.raises(DocumentError):
        init_site(kit, tmp_path / "site", data=made.sites["north"].settings().data)
    assert not (tmp_path / "site").exists()


def test_kit_of_another_coordinator_is_found_out_by_its_fingerprint(make_consortium: Callable, tmp_path: Path) -> None:
    made, other = make_consortium("north"), make_consortium("west", name="others")
    data = made.sites["north"].settings().data
    heard = fingerprint(made.coordinator.coordinator_public_key)
    with pytest.raises(ConsortiumError, match="Expected a kit of the coordinator with fingerprint"):
        init_site(other.coordinator.kit("west"), tmp_path / "site", data=data, expected_fingerprint=heard)
    assert not (tmp_path / "site").exists()
    spoken = heard.upper().replace("-", " ")
    init_site(made.coordinator.kit("north"), tmp_path / "site", data=data, expected_fingerprint=spoken)


def test_site_whose_kit_identity_or_enrolment_was_exchanged_is_not_opened(make_consortium: Callable) -> None:
    made, other = make_consortium("north"), make_consortium("west", name="others")
    north, west = made.sites["north"], other.sites["west"]
    for name, error, says in (
        ("kit_file", SiteError, "the kit with which this site enrolled"),
        ("identity", SiteError, "the identity with which this site enrolled"),
        ("enrolment_file", SiteError, "the kit with which this site enrolled"),
    ):
        path, before = getattr(north, name), getattr(north, name).read_bytes()
        path.write_bytes(getattr(west, name).read_bytes())
        with pytest.raises(error, match=says):
            existing_site(north.root)
        path.write_bytes(before)
    existing_site(north.root)
    north.identity.chmod(0o644)
    with pytest.raises(SiteError, match="mode 0600"):
        open_site(north.root)


def test_fresh_site_lets_nothing_train(
    make_consortium: Callable, make_study: Callable[..., StudyConfig], make_private_study: Callable[..., StudyConfig]
) -> None:
    site = open_site(make_consortium("north").sites["north"].root)
    assert (site.name, site.policy.approved_studies, site.policy.budget) == ("north", (), None)
    assert not site.policy.allow_unprotected
    with pytest.raises(PolicyError):
        site.policy.check_study(make_study(("east",)))
    assert site.cohort_name("federated") == "patients"
    with pytest.raises(PolicyError):
        site.cohort_name("local-north")


def test_draws_of_a_real_site_are_not_seeded(make_consortium: Callable) -> None:
    site = open_site(make_consortium("north").sites["north"].root)
    draws = [site.random_stream("federated", 1).bytes(16) for _ in range(2)]
    assert draws[0] != draws[1]


def test_budget_of_the_template_can_be_switched_on(make_consortium: Callable) -> None:
    folder = make_consortium("north").sites["north"]
    lines = folder.policy_file.read_text().splitlines()
    start = lines.index("#[budget]")
    lines[start:] = [line.removeprefix("#") for line in lines[start:]]
    folder.policy_file.write_text("\n".join(lines))
    budget = folder.written_policy().budget
    assert (budget.epsilon, budget.delta, budget.unit) == (8.0, 1e-5, "patient")


def init(made: Any, root: Path, *options: str) -> None:
    kit, data = made.coordinator.kit("north"), made.sites["north"].settings().data
    main(["site", "init", str(kit), str(root), "--data", str(data), *options])


def test_budget_and_fewest_patients_may_be_decided_at_init(
    make_consortium: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_consortium("north")
    init(made, tmp_path / "site", "--epsilon", "2.5", "--delta", "1e-6", "--minimum-patients", "50")
    policy = existing_site(tmp_path / "site").written_policy()
    assert policy.budget == Budget(epsilon=2.5, delta=1e-6, unit="patient")
    assert (policy.minimum_patients, policy.allow_unprotected, policy.approved_studies) == (50, False, ())
    assert "budget: epsilon 2.5 of all studies together, delta 1e-06, each patient" in capsys.readouterr().out
    init(made, tmp_path / "other")
    assert existing_site(tmp_path / "other").written_policy() == made.sites["north"].written_policy()
    assert "budget: none, so that no private study trains" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--epsilon", "8"), "--epsilon and --delta together"),
        (("--delta", "1e-5"), "--epsilon and --delta together"),
        (("--epsilon", "inf", "--delta", "1e-5"), "finite number, got inf"),
        (("--epsilon", "nan", "--delta", "1e-5"), "finite number, got nan"),
        (("--epsilon", "0", "--delta", "1e-5"), "greater than 0, got 0"),
        (("--epsilon", "8", "--delta", "1"), "less than 1, got 1"),
        (("--minimum-patients", "0"), "0 is not in the range"),
    ],
)
def test_budget_that_is_none_makes_no_site(
    make_consortium: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    says: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        init(make_consortium("north"), tmp_path / "site", *options)
    assert ended.value.code != 0
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "site").exists()


def test_app_finds_the_hospitals_site_and_is_not_both(
    make_consortium: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SITE_VARIABLE, str(make_consortium("north").sites["north"].root))
    monkeypatch.delenv(SITES_VARIABLE, raising=False)
    forget_sites()
    assert site_of({}) is site_of({"partition-id": 7})
    assert site_of({}).name == "north"
    monkeypatch.setenv(SITES_VARIABLE, "sites.json")
    with pytest.raises(SiteError, match="got both"):
        site_of({"partition-id": 0})
    forget_sites()


@pytest.mark.parametrize(
    ("text", "says"), [("", "data: Field required"), ("data = 3", "data"), ("=", "TOML"), ('data="x"\nsec=1', "cohort")]
)
def test_wrong_settings_are_one_line(make_consortium: Callable, text: str, says: str) -> None:
    folder = make_consortium("north").sites["north"]
    folder.settings_file.write_text(text)
    with pytest.raises(SiteError, match=says):
        folder.settings()


def test_command_says_what_to_read_out(
    make_consortium: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_consortium("north")
    kit, data = str(made.coordinator.kit("north")), str(made.sites["north"].settings().data)
    main(["site", "init", kit, str(tmp_path / "a"), "--data", data, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["coordinator_fingerprint"] == fingerprint(made.coordinator.coordinator_public_key)
    assert not shown["coordinator_verified"]
    main(["site", "init", kit, str(tmp_path / "b"), "--data", data])
    assert "NOT COMPARED" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["site", "init", kit, str(tmp_path / "c"), "--data", str(tmp_path / "none.csv")])
    assert ended.value.code == SiteError.exit_code
