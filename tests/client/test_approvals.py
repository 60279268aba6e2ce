"""What a coordinator signs and a hospital approves: exactly that trains, from the moment on and not after."""

import json
from collections.abc import Callable

import pytest

from client import serve
from client.approvals import read_approvals, remove_approval, store_approval
from client.open_site import open_site
from client.study_in_words import study_in_words
from medfed.cli import main
from medfed.errors import BudgetError, ConsortiumError, DocumentError, PolicyError, StudyError
from medfed.messages import RoundInstruction
from medfed.signed_document import sign_document
from medfed.signed_study import SignedStudy, read_signed_study
from medfed.signing import read_key
from medfed.study import StudyConfig, parse_study
from privacy.accounting import Mechanism, epsilon_spent
from privacy.ledger import PrivacyLedger
from privacy.ledger_entry import Cap, Charge
from server.study_signing import StudyToApprove, for_hospitals, sign_study

POLICY = "minimum_patients = 3\nallow_unprotected = false\n[budget]\nepsilon = 30.0\ndelta = 0.01\nunit = 'patient'\n"


@pytest.fixture
def made(make_consortium: Callable):
    return make_consortium("north", "south", policy=POLICY)


@pytest.fixture
def signed(made, make_private_study: Callable[..., StudyConfig], monkeypatch: pytest.MonkeyPatch) -> StudyToApprove:
    return sign_study(hospital_study(make_private_study), made.coordinator)


def hospital_study(make: Callable[..., StudyConfig], *sites: str) -> StudyConfig:
    """A study of two sites without their data; cohorts are there already and are not made again."""
    study = make(sites or ("x-north", "x-south"))
    names = [site.name.removeprefix("x-") for site in study.sites]
    renamed = [
        site.model_copy(update={"name": name, "data": None}) for site, name in zip(study.sites, names, strict=True)
    ]
    return study.replace(sites=renamed)


def approve(made, signed: StudyToApprove, *options: str) -> None:
    main(["site", "approve", str(made.sites["north"].root), str(signed.path), *options])


def test_signed_study_is_resolved_calibrated_and_the_same_each_time(made, signed: StudyToApprove) -> None:
    read = made.coordinator.signed_study(signed.path)
    assert read.study == signed.study
    assert read.study.manifest is not None
    assert parse_study(read.study.canonical, digest=signed.study.digest) == signed.study
    before = signed.path.read_bytes()
    assert sign_study(signed.study.replace(manifest=None), made.coordinator).path.read_bytes() == before


def test_every_byte_of_a_signed_study_counts(made, signed: StudyToApprove) -> None:
    data = signed.path.read_bytes()
    key = made.coordinator.coordinator_public_key
    for position in range(0, len(data), 97):
        signed.path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(DocumentError):
            read_signed_study(signed.path, public_key=key)


def test_study_of_another_coordinator_or_consortium_is_not_shown(made, make_consortium, signed: StudyToApprove) -> None:
    other = make_consortium("west", name="others").coordinator
    body = SignedStudy(consortium="brains", roster_serial=1, study=signed.study)
    signed.path.write_bytes(sign_document(body, other.coordinator_key()))
    with pytest.raises(SystemExit) as ended:
        approve(made, signed, "--yes")
    assert ended.value.code == DocumentError.exit_code
    folder = made.sites["north"]
    with pytest.raises(ConsortiumError, match="Expected a study of 'brains', got one of 'others'"):
        study_in_words(body.model_copy(update={"consortium": "others"}), folder)
    elsewhere = signed.study.replace(sites=[site for site in signed.study.sites if site.name == "south"])
    with pytest.raises(ConsortiumError, match="not for this hospital"):
        study_in_words(SignedStudy(consortium="brains", roster_serial=1, study=elsewhere), folder)


def test_sites_that_have_not_enrolled_and_simulated_studies_are_not_signed(
    made, make_study: Callable[..., StudyConfig], signed: StudyToApprove
) -> None:
    study = signed.study.replace(manifest=None)
    stranger = study.sites[0].model_copy(update={"name": "west"})
    with pytest.raises(ConsortiumError, match="got 'west'"):
        sign_study(study.replace(sites=[*study.sites, stranger]), made.coordinator)
    forged = study.sites[0].model_copy(update={"signing_key": "0" * 64})
    with pytest.raises(ConsortiumError, match="got another in the study"):
        sign_study(study.replace(sites=[forged, study.sites[1]]), made.coordinator)
    with_data = make_study(("y-north",))
    with pytest.raises(StudyError, match="Expected a study for real hospitals"):
        sign_study(with_data, made.coordinator)
    assert for_hospitals(with_data).is_for_hospitals


def test_secure_study_carries_the_keys_of_the_roster_and_no_others(
    make_consortium: Callable, make_secure_study: Callable[..., StudyConfig]
) -> None:
    study = make_secure_study()
    study = study.replace(sites=[site.model_copy(update={"data": None}) for site in study.sites])
    made = make_consortium(*study.site_names, policy=POLICY.replace("false", "true"))
    signed = sign_study(study, made.coordinator)
    keys = {site: folder.own_identity().signing_key.hex() for site, folder in made.sites.items()}
    assert {site.name: site.signing_key for site in signed.study.sites} == keys
    body = made.coordinator.signed_study(signed.path)
    words = study_in_words(body, made.sites["north"])
    assert "one sum over at least 3 sites, if no site helps it" in " ".join(words.protected)
    swapped = [site.model_copy(update={"signing_key": keys[other]}) for site, other in
               zip(signed.study.sites, reversed(signed.study.site_names), strict=True)]  # fmt: skip
    with pytest.raises(ConsortiumError, match="Expected this site's own key"):
        study_in_words(body.model_copy(update={"study": signed.study.replace(sites=swapped)}), made.sites["north"])


def test_approval_and_withdrawal_count_from_the_next_request_on(made, signed: StudyToApprove) -> None:
    site = open_site(made.sites["north"].root)
    with pytest.raises(PolicyError, match="run 'medfed site approve'"):
        site.policy.check_study(signed.study)
    approve(made, signed, "--yes")
    site.policy.check_study(signed.study)
    with pytest.raises(PolicyError):
        site.policy.check_study(signed.study.replace(seed=6))
    main(["site", "withdraw", str(made.sites["north"].root), signed.study.digest[:12]])
    with pytest.raises(PolicyError):
        site.policy.check_study(signed.study)
    with pytest.raises(ConsortiumError, match="approved: none"):
        remove_approval(made.sites["north"], signed.study.digest)


def test_real_site_serves_an_approved_study_on_its_own_images(made, signed: StudyToApprove) -> None:
    site = open_site(made.sites["north"].root)
    instruction = RoundInstruction(study_digest=signed.study.digest, round=0)
    fields = instruction.to_fields(study=signed.study.canonical, adapter=b"")
    with pytest.raises(PolicyError, match="approved studies"):
        serve.describe(instruction, fields, site)
    approve(made, signed, "--yes")
    header = json.loads(serve.describe(instruction, fields, site)["header"])
    assert (header["site"], header["num_examples"], header["refusal"]) == ("north", 3, None)
    assert list(made.sites["north"].features.iterdir())


def test_withdrawal_says_if_the_policy_still_allows_the_study(made, signed: StudyToApprove) -> None:
    approve(made, signed, "--yes")
    policy = made.sites["north"].policy_file
    policy.write_text(f"approved_studies = ['{signed.study.digest}']\n{POLICY}")
    with pytest.raises(SystemExit) as ended:
        main(["site", "withdraw", str(made.sites["north"].root), signed.study.digest])
    assert ended.value.code == PolicyError.exit_code


def test_approving_twice_is_harmless(made, signed: StudyToApprove) -> None:
    approve(made, signed, "--yes")
    (path,) = made.sites["north"].approvals.glob("*.json")
    before = path.read_bytes()
    approve(made, signed, "--yes")
    assert path.read_bytes() == before
    assert path.with_suffix(".study").read_bytes() == signed.path.read_bytes()


def test_damaged_foreign_and_renamed_approvals_allow_nothing_and_are_named(made, signed: StudyToApprove) -> None:
    north, south, digest = made.sites["north"], made.sites["south"], signed.study.digest
    key = north.own_identity().signing_key.hex()
    store_approval(north, signed.study.name, digest)
    path = north.approvals / f"{digest}.json"
    own = path.read_bytes()
    assert read_approvals(north, signing_key=key).digests == (digest,)
    store_approval(south, signed.study.name, digest)
    theirs = (south.approvals / f"{digest}.json").read_bytes()
    for position in range(0, len(own), 41):
        path.write_bytes(own[:position] + bytes([own[position] ^ 1]) + own[position + 1 :])
        refused = read_approvals(north, signing_key=key)
        assert (refused.digests, len(refused.refused)) == ((), 1)
    path.write_bytes(theirs)
    assert "not believed here" in read_approvals(north, signing_key=key).refused[0]
    path.write_bytes(own)
    other = "0" * 64
    path.rename(north.approvals / f"{other}.json")
    renamed = read_approvals(north, signing_key=key)
    assert renamed.digests == ()
    assert other[:12] in renamed.refused[0]


def test_damaged_policy_stops_everything(made, signed: StudyToApprove) -> None:
    site = open_site(made.sites["north"].root)
    approve(made, signed, "--yes")
    made.sites["north"].policy_file.write_text("minimum_patients = ")
    with pytest.raises(Exception, match="nothing trains without"):
        site.policy.check_study(signed.study)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (POLICY.split("[budget]", maxsplit=1)[0], r"Expected a \[budget\]"),
        (POLICY.replace("'patient'", "'record'"), "Expected protection of each record"),
    ],
)
def test_what_the_policy_forbids_is_not_even_asked(made, signed: StudyToApprove, policy: str, says: str) -> None:
    folder = made.sites["north"]
    folder.policy_file.write_text(policy)
    with pytest.raises(PolicyError, match=says):
        study_in_words(made.coordinator.signed_study(signed.path), folder)
    with pytest.raises(SystemExit):
        approve(made, signed, "--yes")
    assert not list(folder.approvals.iterdir())


def test_only_the_studys_name_approves_it(
    made, signed: StudyToApprove, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for typed in ("yes", "", "smal"):
        monkeypatch.setattr("typer.prompt", lambda *_args, typed=typed, **_options: typed)
        with pytest.raises(SystemExit):
            approve(made, signed)
        assert "not approved" in capsys.readouterr().out
    approve(made, signed, "--json")
    assert not json.loads(capsys.readouterr().out)["approved"]
    assert not list(made.sites["north"].approvals.iterdir())
    monkeypatch.setattr("typer.prompt", lambda *_args, **_options: "small")
    approve(made, signed)
    assert len(list(made.sites["north"].approvals.glob("*.json"))) == 1


def charge(folder, mechanism: Mechanism) -> None:
    ledger = PrivacyLedger.open(folder.ledger, read_key(folder.ledger_key))
    ledger.reserve(
        Charge(cohort="patients", study="earlier", study_digest="1" * 64, scope="federated", round=1, clip_norm=1.0,
               mechanism=mechanism, delta=0.01, unit="patient", adjacency="add-remove", request_digest="2" * 64),
        Cap(epsilon=100.0, delta=0.01, unit="patient"),
    )  # fmt: skip


def test_screen_says_what_was_spent_and_what_would_be_left(made, signed: StudyToApprove) -> None:
    folder, earlier = made.sites["north"], Mechanism(0.8, 0.5, 3)
    charge(folder, earlier)
    words = study_in_words(made.coordinator.signed_study(signed.path), folder)
    study = Mechanism(1.0, 0.5, 4)
    assert words.privacy.epsilon_study == epsilon_spent([study], 0.01).value
    assert words.privacy.epsilon_round == epsilon_spent([Mechanism(1.0, 0.5, 2)], 0.01).value
    assert words.budget.spent == epsilon_spent([earlier], 0.01).value
    assert words.budget.after == epsilon_spent([earlier, study], 0.01).value
    assert words.budget.left == 30.0 - words.budget.after
    assert words.budget.rounds_that_fit == 2


def test_screen_counts_what_noised_evaluations_cost(made, make_private_study: Callable[..., StudyConfig]) -> None:
    folder, plain = made.sites["north"], hospital_study(make_private_study)
    assert plain.privacy is not None
    noised = plain.replace(privacy={**plain.privacy.model_dump(), "evaluation": {"noise_multiplier": 2.0}})
    signed = sign_study(noised, made.coordinator)
    training, evaluations = Mechanism(1.0, 0.5, 4), Mechanism(2.0, 1.0, 2)
    alone = epsilon_spent([training], 0.01).value
    folder.policy_file.write_text(POLICY.replace("30.0", str(alone + 0.01)))  # room for the training alone
    words = study_in_words(made.coordinator.signed_study(signed.path), folder)
    assert words.budget.after == epsilon_spent([training, evaluations], 0.01).value
    assert words.privacy.epsilon_study == words.budget.after
    first = [Mechanism(1.0, 0.5, 2), Mechanism(2.0, 1.0, 1)]  # one evaluation before the first round
    assert words.budget.rounds_that_fit == int(epsilon_spent(first, 0.01).value <= alone + 0.01)
    assert any(line.startswith("Counts of held-out patients: noised here") for line in words.protected)


def test_rounds_that_fit_are_those_that_the_ledger_allows(made, signed: StudyToApprove) -> None:
    folder, round_of_study = made.sites["north"], Mechanism(1.0, 0.5, 2)
    cap = epsilon_spent([round_of_study], 0.01).value + 0.01
    folder.policy_file.write_text(POLICY.replace("30.0", str(cap)))
    words = study_in_words(made.coordinator.signed_study(signed.path), folder)
    assert (words.budget.rounds_that_fit, words.budget.left) == (1, 0.0)
    charge(folder, round_of_study)
    with pytest.raises(BudgetError):
        PrivacyLedger.open(folder.ledger, read_key(folder.ledger_key)).reserve(
            Charge(cohort="patients", study="small", study_digest=words.digest, scope="federated", round=2,
                   clip_norm=1.0, mechanism=round_of_study, delta=0.01, unit="patient", adjacency="add-remove",
                   request_digest="3" * 64),
            Cap(epsilon=cap, delta=0.01, unit="patient"),
        )  # fmt: skip
    assert study_in_words(made.coordinator.signed_study(signed.path), folder).budget.rounds_that_fit == 0


def test_screen_names_every_tensor_that_leaves(
    made, signed: StudyToApprove, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = study_in_words(made.coordinator.signed_study(signed.path), made.sites["north"])
    (upload,) = words.uploads
    manifest = signed.study.resolved_manifest
    assert (upload.num_tensors, upload.num_elements) == (len(manifest.tensors), manifest.num_elements)
    assert sum(group.count for group in upload.tensors) == len(manifest.tensors)
    approve(made, signed, "--yes")
    shown = capsys.readouterr().out
    for said in (
        signed.study.digest,
        signed.study.backbone.sha256,
        f"{words.bytes_up:,} bytes a round",
        "unit patient",
    ):
        assert said in shown
    assert all(group.name in shown for group in upload.tensors)


def test_screen_breaks_no_digest_and_no_name_of_a_tensor_at_eighty_columns(
    made, signed: StudyToApprove, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = study_in_words(made.coordinator.signed_study(signed.path), made.sites["north"])
    approve(made, signed, "--yes")
    shown = capsys.readouterr().out
    for whole in (words.digest, words.coordinator, words.backbone_sha256):
        assert whole in shown
    for group in words.uploads[0].tensors:
        for part in group.name.split("."):
            assert part in shown
